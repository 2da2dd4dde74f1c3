"""The report: one JSON file of all numbers, one HTML file that needs nothing else, every figure as
a file of its own."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pvm_jax.measure.report.figures import AttentionMap, Panel, inline, standalone, svg
from pvm_jax.measure.report.section import Section

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #59636e;
  --grid: #d8dee4; --card: #f6f8fa;
  --blue: #0072b2; --orange: #d55e00; --green: #009e73; --purple: #b5558f; --sky: #3f9fd0;
  --grey: #808080; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #0d1117; --ink: #e6edf3;
  --soft: #9aa4af; --grid: #30363d;
  --card: #161b22; --blue: #58a6ff; --orange: #f0883e; --green: #3fb950; --purple: #d2a8ff;
  --sky: #79c0ff;
  --grey: #9aa4af; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink);
  font: 1rem/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.25rem; margin: 3rem 0 .75rem; padding-top: 1rem;
  border-top: 1px solid var(--grid); }}
p, ul {{ max-width: 46rem; margin: 0 0 .75rem; }}
ul {{ padding-left: 1.2rem; }}
nav a {{ color: var(--blue); margin-right: .9rem; white-space: nowrap; }}
.figures {{ display: grid; gap: 1.75rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }}
figure {{ margin: 0; min-width: 0; }}
figure h3 {{ font-size: 1rem; margin: 0 0 .35rem; overflow-wrap: anywhere; }}
figure svg {{ display: block; width: 100%; max-width: 30rem; height: auto; }}
figcaption {{ color: var(--soft); font-size: .875rem; line-height: 1.45; margin-top: .4rem;
  max-width: 30rem; }}
table {{ border-collapse: collapse; font-size: .9rem; margin: 1rem 0; display: block;
  overflow-x: auto; }}
th, td {{ text-align: right; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--grid);
  font-variant-numeric: tabular-nums; }}
th:first-child, td:first-child {{ text-align: left; }}
.about {{ color: var(--soft); }}
</style>
<h1>{title}</h1>
{about}
<nav>{links}</nav>
{sections}
</html>
"""


def write_report(
    sections: Sequence[Section],
    out: Path,
    *,
    title: str,
    about: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes report.json, report.html and figures/*.svg (on white) to the folder `out`.

    Args:
        title: of the page.
        about: what was measured on what, a paragraph each.
        settings: goes into the JSON as it is.

    Returns:
        The page's path.

    Raises:
        ImportError: without matplotlib.
    """
    drawn = {panel.key: svg(panel) for section in sections for panel in section.panels}
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for key, figure in drawn.items():
        (out / "figures" / f"{key}.svg").write_text(standalone(figure), encoding="utf-8")
    content = {
        "title": title,
        "settings": dict(settings or {}),
        "sections": {
            section.key: {
                "facts": list(section.facts),
                "table": [list(row) for row in section.rows],
                "figures": {panel.key: panel.data() for panel in section.panels},
            }
            for section in sections
        },
    }
    (out / "report.json").write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    page = _PAGE.format(
        title=escape(title),
        about="\n".join(f'<p class="about">{escape(paragraph)}</p>' for paragraph in about),
        links=" ".join(
            f'<a href="#{section.key}">{escape(section.title)}</a>' for section in sections
        ),
        sections="\n".join(_section(section, drawn) for section in sections),
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _section(section: Section, drawn: Mapping[str, str]) -> str:
    parts = [f'<section id="{section.key}"><h2>{escape(section.title)}</h2>']
    if section.text:
        parts.append(f'<p class="about">{escape(section.text)}</p>')
    if section.facts:
        parts.append(
            "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in section.facts) + "</ul>"
        )
    parts.append(
        '<div class="figures">'
        + "".join(_figure(panel, drawn[panel.key]) for panel in section.panels)
        + "</div>"
    )
    if section.rows:
        parts.append(_table(section.rows))
    return "\n".join([*parts, "</section>"])


def _figure(panel: Panel | AttentionMap, drawn: str) -> str:
    title = escape(panel.title)
    image = inline(drawn).replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    return f"<figure><h3>{title}</h3>{image}<figcaption>{escape(panel.text)}</figcaption></figure>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
