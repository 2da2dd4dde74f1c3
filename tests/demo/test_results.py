"""The numbers of the demo in README.md and docs/ are those of demo/results."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.compare import RATES, SEARCHED
from demo.compare_report import (
    RIVALS,
    Methods,
    curve_rows,
    of_table,
    read_measured,
    table,
    tables,
    values,
)
from demo.curves import AHEAD, BETWEEN, MISLED, OTHER, UNTRAINED, WRITTEN, Measured
from demo.recall import visual_token
from demo.trainings import METHODS
from pvm_jax.measure.intervals import estimate

RESULTS = Path("demo/results")
LATE = "200 between, late in its own answer"
VARIATIONS = {  # rows of "What was tried", by file
    "together": "a branch 64 wide and LoRA of rank 35 together",
    "beside": "LoRA of rank 35 alone, the branch as it learned to look (PVM then LoRA)",
    "token_gate": "its gate by token: 2 sigmoid of the normed stream times a vector, times the"
    " scalar (both stages)",
    "normed_query": "queries from the normed stream (both stages)",
    "places": "keys that know the patch's place (both stages)",
    "later_layers": "beside layers 2 and 3 in place of 1 and 2 (both stages)",
    "unnormalised": "its update not normalised (both stages)",
}


def page(name: str) -> str:
    """Of a document, without line breaks in its paragraphs."""
    return re.sub(r"(?<!\|)\n\s*", " ", Path(name).read_text())


def short(text: str) -> str:
    """As the documents write numbers: .995 for 0.995."""
    return re.sub(r"(?<![\d.])0\.", ".", text)


def digits(number: float, places: int = 2) -> str:
    return short(f"{number:.{places}f}")


def missing(name: str, wanted: Sequence[str]) -> list[str]:
    text = page(name)
    return [one for one in wanted if short(one) not in text]


@pytest.fixture(scope="module")
def measured() -> list[Measured]:
    return read_measured(RESULTS)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The sections of `make demo-lora`'s."""
    return json.loads((RESULTS / "report.json").read_text())["sections"]


@pytest.fixture(scope="module")
def varied() -> dict[str, list[Measured]]:
    """By name, a seed each."""
    return {
        name: [
            Measured(**json.loads(file.read_text()))
            for file in sorted((RESULTS / "variations").glob(f"{name}_seed_?.json"))
        ]
        for name in VARIATIONS
    }


def test_the_report_is_of_the_files(measured):
    """All but the search's and the variations."""
    files = {json.dumps(asdict(one)) for one in measured}
    apart = ("results.json", "terms.json", "report.json")
    of_seeds = [
        json.loads(file.read_text())
        for file in RESULTS.glob("*.json")
        if file.name not in apart and f"seed_{SEARCHED}" not in file.name
    ]
    assert {json.dumps(one) for one in of_seeds} == files
    parts = []
    for name in dict.fromkeys(one.table for one in measured[1:]):
        parts += [f"## {name}", *tables(of_table(measured, name))]
    assert (RESULTS / "results.md").read_text() == "\n\n".join(parts) + "\n"


@pytest.mark.parametrize("name", ["near", "far"])
def test_the_tables_are_of_the_files(name, measured):
    methods = of_table(measured, name)
    tokens = (f"{np.mean([one.tokens for one in ones]):,.0f}" for ones in methods.values())
    wanted = [table([], [["tokens read", "", *list(tokens)[1:]]])]
    for curve in (BETWEEN, AHEAD, WRITTEN):
        for words, *row in curve_rows(methods, curve)[1]:
            label = LATE if curve == WRITTEN else f"{words} {curve}"
            wanted.append(table([], [[label, *row]]))
    for branch in ("PVM then LoRA", "PVM looks first"):
        for words in methods[UNTRAINED][0].curves[BETWEEN]:
            wanted.append(difference(methods, branch, BETWEEN, words))
        wanted.append(difference(methods, branch, AHEAD, "1600"))
        wanted.append(difference(methods, branch, WRITTEN, "200"))
    rows = [one.splitlines()[-1] for one in wanted]
    if name == "near":
        rows += controls(methods)
    assert not missing("docs/compare.md", rows)


def difference(methods: Methods, branch: str, curve: str, words: str) -> str:
    """A branch minus each of its rivals."""
    cells = [f"{words} {BETWEEN}, {WRITTEN}" if curve == WRITTEN else f"{words} {curve}"]
    for rival in RIVALS:
        found = values(methods[branch], curve, words) - values(methods[rival], curve, words)
        cells += [paired(found), ", ".join(f"{one:+.3f}" for one in found.mean(1))]
    return table([], [cells])


def paired(difference: np.ndarray, sign: str = "+") -> str:
    """Of [seeds, scenes]: mean and interval over scenes."""
    found = estimate(difference.mean(0))
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def controls(methods: Methods) -> list[str]:
    """The rows of "another image in the branch alone" and so on, with the method ahead."""
    rows = []
    for part in tables(methods):
        if (method := part.split(":\n")[0]) in methods:
            rows += [f"| {method} {row}" for row in re.findall(r"^\| \d+ .*", part, re.MULTILINE)]
    assert len(rows) == 6
    return rows


def mean(one: Measured, curve: str, words: str | int) -> float:
    return float(np.mean(one.curves[curve][str(words)]))


def first_seeds(measured: Sequence[Measured], name: str) -> dict[str, Measured]:
    return {method: ones[0] for method, ones in of_table(measured, name).items()}


def test_without_replay(measured):
    without, with_replay = (first_seeds(measured, n) for n in ("near, without replay", "near"))
    shown = ("LoRA", "full", "PVM looks first", "PVM then LoRA")
    rows = []
    for curve, words, label in [
        *((BETWEEN, words, words) for words in (0, 200, 400, 800, 1600)),
        (AHEAD, 1600, "1600 ahead"),
    ]:
        pairs = [
            digits(mean(of[method], curve, words), 3)
            for method in shown
            for of in (without, with_replay)
        ]
        rows.append(f"| {label} | {' | '.join(pairs)} |")
    leads = []
    for branch in shown[2:]:
        for words in ("800", "1600"):
            rival = max(RIVALS, key=lambda name: mean(without[name], BETWEEN, words))
            ones = [values([without[name]], BETWEEN, words) for name in (branch, rival)]
            leads.append(paired(ones[0] - ones[1], ""))
    told = f"alone by {leads[0]} and {leads[1]}, with LoRA by {leads[2]} and {leads[3]}"
    assert not missing("docs/compare.md", [*rows, told])


def test_what_was_tried(measured, varied):
    plain = of_table(measured, "near")["PVM looks first"]
    rows = [variation("the branch, 128 wide (PVM looks first)", plain[0])]
    rows += [variation(label, varied[name][0]) for name, label in VARIATIONS.items()]
    gains = {
        name: {
            words: values(varied[name], BETWEEN, words)
            - values(plain[: len(varied[name])], BETWEEN, words)
            for words in ("400", "800", "1600")
        }
        for name in ("token_gate", "later_layers")
    }
    of = gains["token_gate"]
    assert len(of["400"]) == 3
    told = [
        f"it gains {paired(of['1600'], '')} at 1,600 words, on each of them",
        f"at 400 and 800 ({paired(of['400'], '')} and {paired(of['800'], '')}",
    ]
    of = gains["later_layers"]
    told.append(
        f"gain {paired(of['800'], '')} at 800 and {paired(of['1600'], '')} at 1,600 words and lose"
        f" {paired(-of['400'], '')} at 400, on one seed"
    )
    assert not missing("docs/compare.md", rows + told)


def variation(label: str, one: Measured) -> str:
    cells = [mean(one, BETWEEN, words) for words in (0, 200, 400, 800, 1600)]
    cells += [mean(one, AHEAD, 1600), mean(one, MISLED, 800)]
    return f"| {label} | {' | '.join(digits(cell, 3) for cell in cells)} |"


def test_the_base_and_the_search(measured):
    base = measured[0]
    rows = [
        "| between image and question |"
        + "".join(f" {mean(base, BETWEEN, words):.3f} |" for words in (0, 200, 400, 800, 1600)),
        "| between, about another image (chance) |"
        + "".join(f" {mean(base, OTHER, words):.3f} |" for words in (0, 200, 400, 800, 1600)),
        f"| ahead of the image | {mean(base, BETWEEN, 0):.3f} | |"
        + "".join(f" {mean(base, AHEAD, words):.3f} |" for words in (400, 800, 1600)),
    ]
    scores = {method: search(method) for method in METHODS}
    best = {method: max(by_rate, key=lambda r: by_rate[r]) for method, by_rate in scores.items()}
    assert best == {
        one.method: one.rate for one in measured if one.table == "far"
    }  # those that the trainings had
    spans = [
        f"{min(of):.3f} to {max(of):.3f}"
        for of in (scores["PVM"].values(), scores["PVM looks first"].values())
    ]
    top, *others = sorted(scores["PVM then LoRA"].values(), reverse=True)
    told = [
        f"({', '.join(spans)})",
        f"({top:.3f}; {min(others):.3f} to {max(others):.3f} at the others)",
    ]
    assert not missing("docs/compare.md", rows + told)


def search(method: str) -> dict[float, float]:
    """By rate, the mean of all that was measured."""
    found = {}
    for rate in RATES:
        file = f"{method}_near_{rate:g}_no_replay_0.25_seed_{SEARCHED}.json".replace(" ", "_")
        curves = json.loads((RESULTS / file).read_text())["curves"]
        found[rate] = float(np.mean([v for by in curves.values() for v in by.values()]))
    return found


def test_what_is_said_on_equal_terms(measured):
    """README's last paragraph of results, the summary of docs/compare.md, and what looking first
    costs."""
    near, far = (
        {
            method: {n: digits(values(ones, BETWEEN, n).mean()) for n in ("400", "800", "1600")}
            for method, ones in of_table(measured, name).items()
        }
        for name in ("near", "far")
    )
    both, lora, full, alone = (
        near[name] for name in ("PVM then LoRA", "LoRA", "full", "PVM looks first")
    )
    wide = {name: far[name]["1600"] for name in ("PVM then LoRA", "LoRA", "full")}
    between = f"({wide['PVM then LoRA']}; {wide['LoRA']}, {wide['full']})"
    by_800 = f"({both['800']}; {lora['800']}, {full['800']})"
    by_1600 = f"({both['1600']}; {lora['1600']}, {full['1600']})"
    told = [
        f"up to 400 ({both['400']}; full fine-tuning {full['400']}), wins at 800 {by_800}",
        f"1,600 {by_1600}",
        f"at 1,600 words ({alone['1600']}; LoRA {lora['1600']}, full fine-tuning {full['1600']})",
        f"at 800 ({full['800']}; {alone['800']})",
        f"at 1,600 is between them {between}",
        f"{near['PVM']['800']} at 800 ([compare]",
    ]
    assert not missing("README.md", told)
    summary = [
        f"{near['PVM']['800']} at 800 words.",
        f"at 800 ({alone['800']}; {lora['800']}, {full['800']})",
        f"at 1,600 ({alone['1600']}; {lora['1600']}, {full['1600']})",
        f"at 800 {by_800} and 1,600 {by_1600}",
        f"is between them {between}",
    ]
    assert not missing("docs/compare.md", summary)
    plain, looks = (of_table(measured, "near")[name] for name in ("PVM", "PVM looks first"))
    exact = [values(ones, BETWEEN, "200").mean() for ones in (looks, plain)]
    cost = [
        f"200 words ({exact[0]:.3f} against {exact[1]:.3f})",
        f"({alone['400']} against {near['PVM']['400']} at 400,"
        f" {alone['800']} against {near['PVM']['800']} at 800 words)",
    ]
    assert not missing("docs/train.md", cost)


def test_the_demo_is_told_as_its_report_has_it(report):
    figures = report["ablations"]["figures"]
    branch, base, lora = (
        dict(zip(one["x"], one["mean"], strict=True))
        for one in map(
            figures["filler"]["series"].get, ("with the branch", "without", "LoRA alone")
        )
    )
    ahead = figures["ahead"]["series"]["without"]
    assert (ahead["x"], digits(branch[0], 3)) == ([0, 800], digits(lora[0], 3))
    what = figures["ablations"]
    shares = dict(
        zip(what["names"], map(digits, what["series"]["with the branch"]["mean"]), strict=True)
    )
    told = [
        f"(it reads {each(branch, 800, 1600)} of the values; LoRA {each(lora, 800, 1600)})",
        f"**ties** (both {digits(branch[0], 3)})",
        f"**loses** ({each(branch, 200, 400)}; {each(lora, 200, 400)})",
        f"reads {ahead['mean'][1]:.3f} of the values with 800 words ahead of the image (middle)",
        "between image and question "
        + ", ".join(digits(base[words]) for words in (200, 400, 800, 1600)),
        f"the model reads {shares['as it is']}, {shares['branch off']} without its branch,"
        f" {shares['branch on another image']} where that is shown another image",
    ]
    assert not missing("README.md", told)
    hidden = report["dependency"]["figures"]["dependency"]["series"]
    from_branch, from_decoder = (
        hidden[f"with the branch, image hidden from the {who} alone"]["mean"]
        for who in ("branch", "decoder")
    )
    assert 0.8 < from_branch[-1] / from_decoder[-1] < 1  # late, "nearly as much"


def each(by_words: dict[int, float], *words: int) -> str:
    return " and ".join(digits(by_words[n]) for n in words)


def test_where_it_looked_is_told_as_the_report_has_it(report):
    """docs/looked.svg is the fourth of these (`make figures`)."""
    figures = list(report["looked"]["figures"].values())
    asked = [figure["title"].split("\n")[-1] for figure in figures]
    assert asked[3].startswith("B2 ground ")
    branch, decoder = (
        [np.array(next(m for k, m in f["maps"].items() if k.startswith(who))[0]) for f in figures]
        for who in ("branch", "decoder")
    )
    found = [
        grid.max()
        for title, grid in zip(asked, branch, strict=True)
        if grid.argmax() == visual_token(title[:2], len(grid))
    ]
    assert len(found) == 5
    told = [
        "the ground (the background's colour) of B2",
        f"with {min(found):.2f} to {max(found):.2f} of its attention",
        f"sharpest layer has at most {max(grid.max() for grid in decoder):.2f} on any cell",
    ]
    assert not missing("docs/measure.md", told)
