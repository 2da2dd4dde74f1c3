"""The report: one JSON file of all numbers, one HTML file that needs nothing else, every figure as
a file of its own."""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pvm_jax.measure.report.figures import AttentionMap, Drawing, Panel, draw, inline, standalone
from pvm_jax.measure.report.section import AnswerSample, Section

SAMPLE_SIDE = 448

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
.figures {{ display: grid; gap: 1.75rem 2rem; grid-template-columns: repeat(6, 1fr); }}
.figures > .one {{ grid-column: span 6; }} .figures > .two {{ grid-column: span 3; }}
.figures > .three {{ grid-column: span 2; }}
@media (max-width: 60rem) {{ .figures > * {{ grid-column: span 6 !important; }} }}
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
.origin td {{ text-align: left; }}
.origin td + td {{ overflow-wrap: anywhere; }}
.sample {{ display: grid; gap: .75rem 1.5rem; margin: 0 0 2rem;
  grid-template-columns: 14rem repeat(var(--answers), minmax(0, 1fr)); }}
@media (max-width: 60rem) {{ .sample {{ grid-template-columns: minmax(0, 1fr); }} }}
.sample img {{ width: 100%; max-width: 14rem; image-rendering: pixelated; }}
.sample h3 {{ font-size: .9rem; margin: 0; }}
.sample pre {{ font: .85rem/1.4 ui-monospace, monospace; white-space: pre-wrap; margin: .25rem 0;
  max-height: 24rem; overflow: auto; background: var(--card); padding: .4rem .6rem; }}
.sample .prompt {{ max-height: 9rem; }}
</style>
<h1>{title}</h1>
{about}
<div class="origin">{origin}</div>
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
    origin: Sequence[tuple[str, str]] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes report.json, report.html and figures/, each figure as SVG, PDF and PNG (on white), to
    the folder `out`.

    Args:
        title: of the page.
        about: what was measured on what, a paragraph each.
        origin: where the report comes from (`provenance`).
        settings: goes into the JSON as it is.

    Returns:
        The page's path.

    Raises:
        ImportError: without matplotlib.
    """
    drawn = {panel.key: draw(panel) for section in sections for panel in section.panels}
    _write_figures(drawn, out / "figures")
    content = {
        "title": title,
        "origin": dict(origin),
        "settings": dict(settings or {}),
        "sections": {
            section.key: {
                "title": section.title,
                "facts": list(section.facts),
                "table": [list(row) for row in section.rows],
                "figures": {panel.key: panel.data() for panel in section.panels},
                "samples": [
                    {"prompt": one.prompt, "answers": dict(one.answers)} for one in section.samples
                ],
            }
            for section in sections
        },
    }
    (out / "report.json").write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    page = _PAGE.format(
        title=escape(title),
        about="\n".join(f'<p class="about">{escape(paragraph)}</p>' for paragraph in about),
        origin=_table(origin),
        links=" ".join(
            f'<a href="#{section.key}">{escape(section.title)}</a>' for section in sections
        ),
        sections="\n".join(_section(section, drawn) for section in sections),
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _write_figures(drawn: Mapping[str, Drawing], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, figure in drawn.items():
        (folder / f"{key}.svg").write_text(standalone(figure.svg), encoding="utf-8")
        (folder / f"{key}.pdf").write_bytes(figure.pdf)
        (folder / f"{key}.png").write_bytes(figure.png)


def _section(section: Section, drawn: Mapping[str, Drawing]) -> str:
    parts = [f'<section id="{section.key}"><h2>{escape(section.title)}</h2>']
    if section.text:
        parts.append(f'<p class="about">{escape(section.text)}</p>')
    if section.facts:
        parts.append(
            "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in section.facts) + "</ul>"
        )
    figures = [
        _figure(panel, drawn[panel.key].svg, width)
        for panel, width in zip(section.panels, _widths(len(section.panels)), strict=True)
    ]
    if figures:
        parts.append(f'<div class="figures">{"".join(figures)}</div>')
    parts += map(_sample, section.samples)
    if section.rows:
        parts.append(_table(section.rows[1:], head=section.rows[0]))
    return "\n".join([*parts, "</section>"])


def _widths(count: int) -> list[str]:
    """How many figures share the row of each: three, or two where one would be left alone."""
    pairs = {0: 0, 1: 2, 2: 1}[count % 3] if count > 1 else 0
    return ["one"] * count if count == 1 else ["two"] * 2 * pairs + ["three"] * (count - 2 * pairs)


def _figure(panel: Panel | AttentionMap, drawn: str, width: str) -> str:
    title = escape(panel.title)
    image = inline(drawn).replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    caption = f"<figcaption>{escape(panel.text)}</figcaption>"
    return f'<figure class="{width}"><h3>{title}</h3>{image}{caption}</figure>'


def _sample(sample: AnswerSample) -> str:
    """A row: pictures above the prompt, then the answers, none of them on a row of its own."""
    shown = [f'<img alt="" src="{_png(pixels)}">' for pixels in sample.pictures]
    shown += ["<h3>prompt</h3>", f'<pre class="prompt">{escape(sample.prompt)}</pre>']
    said = [
        f"<div><h3>{escape(name)}</h3><pre>{escape(text)}</pre></div>"
        for name, text in sample.answers.items()
    ]
    return (
        f'<div class="sample" style="--answers: {len(said)}">'
        f"<div>{''.join(shown)}</div>{''.join(said)}</div>"
    )


def _png(pixels: np.ndarray) -> str:
    """A picture [height, width, 3] in [0, 1] as a data URL, at most SAMPLE_SIDE pixels a side."""
    image = Image.fromarray(np.round(255 * pixels).astype(np.uint8))
    image.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
    out = BytesIO()
    image.save(out, format="PNG")
    return f"data:image/png;base64,{b64encode(out.getvalue()).decode()}"


def _table(body: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)] if head else []
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>" if lines else ""
