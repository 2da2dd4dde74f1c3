"""The page and its figures, of panels that are given."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from pvm_jax.measure.intervals import Estimate
from pvm_jax.measure.report import page as page_module
from pvm_jax.measure.report.figures import AttentionMap, Drawing, Panel, Series
from pvm_jax.measure.report.page import write_report
from pvm_jax.measure.report.provenance import provenance
from pvm_jax.measure.report.section import AnswerSample, Section


def test_figures_draw_what_is_missing_as_missing(tmp_path):
    """A single conversation has no interval, an empty series no line; the JSON says null, not
    NaN."""
    nan = float("nan")
    panels = [
        Panel(
            "line",
            "A <b>",
            "",
            "x",
            "y",
            [Series("one", [1, 2], [Estimate(0.1, nan, nan), Estimate(0.2, 0.1, 0.3)])],
            log="xy",
        ),
        Panel(
            "empty",
            "Empty",
            "",
            "x",
            "y",
            [Series("none", [], []), Series("ref", [1, 2], [Estimate(1, 1, 1)] * 2, True)],
        ),
        Panel(
            "bars",
            "Bars",
            "",
            "x",
            "",
            [Series("one", [0], [Estimate(0.5, nan, nan)])],
            names=["a"],
            bounds=(0, 1),
        ),
        AttentionMap("look", "Look", "", [np.zeros((32, 96, 3))], {"branch": [np.zeros((1, 3))]}),
    ]
    page = write_report([Section("all", "All", panels)], tmp_path, title="T").read_text()
    assert "A &lt;b&gt;" in page
    assert "<b>" not in page
    assert json.loads((tmp_path / "report.json").read_text())["sections"]["all"]["figures"]["line"][
        "series"
    ]["one"]["low"] == [
        None,
        0.1,
    ]
    assert (tmp_path / "figures" / "line.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("count", "rows"),
    [(1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (5, [2, 3]), (6, [3, 3]), (7, [2, 2, 3])],
)
def test_no_figure_stands_alone_in_a_row(count, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "draw", lambda panel: Drawing("<svg >", b"", b""))
    line = [Series("one", [1, 2], [Estimate(1, 1, 1)] * 2)]
    panels = [Panel(f"p{n}", "P", "", "x", "y", line) for n in range(count)]
    page = write_report([Section("all", "All", panels)], tmp_path, title="T").read_text()
    widths = re.findall(r'<figure class="(\w+)"', page)
    per_row = {"one": 1, "two": 2, "three": 3}
    assert sorted(widths) == sorted(
        name for row in rows for name, n in per_row.items() if n == row for _ in range(row)
    )
    assert sum(6 // per_row[width] for width in widths) == 6 * len(rows)


def test_samples_stand_beside_their_pictures(tmp_path):
    sample = AnswerSample([np.zeros((32, 900, 3))], "What?", {"true": "a < b", "it": "b"})
    section = Section("s", "S", [], samples=[sample])
    origin = [("command", "pvm measure")]
    page = write_report([section], tmp_path, title="T", origin=origin).read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "<pre>a &lt; b</pre>" in page
    assert 'style="--answers: 2"' in page  # all in one row
    assert "<td>pvm measure</td>" in page
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["origin"] == {"command": "pvm measure"}
    assert content["sections"]["s"]["samples"] == [
        {"prompt": "What?", "answers": {"true": "a < b", "it": "b"}}
    ]


def test_the_head_has_the_conversations_with_filler_text_too():
    one, other = (
        SimpleNamespace(input_ids=np.array([n]), pixel_values=None, pixel_values_videos=None)
        for n in (1, 2)
    )
    found, again, changed = (
        dict(provenance({}, [one], filler))
        for filler in ([[one] * 2, [other] * 2], [[one] * 2, [one] * 2], [])
    )
    assert re.fullmatch("2, identity [0-9a-f]{16}", found["with filler text"])
    assert found["with filler text"] != again["with filler text"]
    assert found["conversations"] == again["conversations"] == changed["conversations"]
    assert "with filler text" not in changed
