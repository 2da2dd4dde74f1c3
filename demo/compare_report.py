"""What demo.compare measured, as tables and pictures: means over seeds, their spread, and paired
differences with intervals over scenes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from demo.curves import AHEAD, ALONE, BETWEEN, MISLED, OTHER, UNTRAINED, WRITTEN, Measured
from pvm_jax.measure.intervals import estimate

LOOKING = "PVM looks first", "PVM then LoRA"
RIVALS = "LoRA", "full"
STYLES = {  # colour, marker, line: no two differ by colour alone
    UNTRAINED: ("#555555", "o", "-"),
    "LoRA": ("#2a78b5", "s", "--"),
    "full": ("#2e8b57", "^", "-."),
    "PVM": ("#e8871e", "D", ":"),
    "PVM looks first": ("#c0392b", "o", "-"),
    "PVM then LoRA": ("#6b2fb3", "P", "-"),
    OTHER: ("#bbbbbb", "x", ":"),
    MISLED: ("#111111", "x", ":"),
    ALONE: ("#b8860b", "v", "--"),
}
PANELS = (
    "words between image and question",
    "words ahead of the image",
    "words between: does the branch look?",
)
Methods = Mapping[str, Sequence[Measured]]
"""By method: a training for each seed."""


def write_report(measured: Sequence[Measured], terms: Mapping[str, Any], out: Path) -> None:
    """Writes results.json, results.md, and a picture of each table, to `out`; prints the text."""
    content = {"terms": dict(terms), "measured": [asdict(one) for one in measured]}
    (out / "results.json").write_text(json.dumps(content) + "\n")
    parts = []
    for name in dict.fromkeys(one.table for one in measured[1:]):
        methods = of_table(measured, name)
        parts += [f"## {name}", *tables(methods)]
        plot(methods, out / f"{name.replace(', ', '_').replace(' ', '_')}")
    text = "\n\n".join(parts) + "\n"
    (out / "results.md").write_text(text)
    print(text, flush=True)


def read_measured(folder: Path) -> list[Measured]:
    """What `write_report` wrote to `folder`."""
    content = json.loads((folder / "results.json").read_text())
    return [Measured(**one) for one in content["measured"]]


def of_table(measured: Sequence[Measured], name: str) -> Methods:
    """The base, which is the first, and the trainings of one table."""
    methods = {UNTRAINED: [measured[0]]}
    for one in measured[1:]:
        if one.table == name:
            methods.setdefault(one.method, []).append(one)
    return methods


def tables(methods: Methods) -> list[str]:
    """One comparison's: every curve, the branch's controls, the differences."""
    parts = [_about(methods)]
    for curve in (BETWEEN, AHEAD, WRITTEN):
        header, rows = curve_rows(methods, curve)
        if curve == BETWEEN:
            header.append(f"base, {OTHER}")
            rows = [
                [*row, _mean_and_spread(values(methods[UNTRAINED], OTHER, row[0]))] for row in rows
            ]
        if rows:
            parts.append(table(header, rows))
    if set(RIVALS) <= set(methods):
        parts += [_differences(methods, name) for name in LOOKING if name in methods]
    for name, ones in methods.items():
        if MISLED in ones[0].curves:
            parts += [_controls(name, ones)]
    return parts


def curve_rows(methods: Methods, curve: str) -> tuple[list[str], list[list[str]]]:
    """Of one curve by words: a header, and the mean of each method with its spread over seeds."""
    return [curve, *methods], [
        [words, *(_mean_and_spread(values(ones, curve, words)) for ones in methods.values())]
        for words in methods[UNTRAINED][0].curves.get(curve, {})
    ]


def values(ones: Sequence[Measured], curve: str, words: str) -> np.ndarray:
    """[seeds, scenes]."""
    return np.array([one.curves[curve][words] for one in ones])


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _about(methods: Methods) -> str:
    """What was trained."""
    rows = [
        ["parameters", *(f"{ones[0].trained:,}" for ones in methods.values())],
        ["rate", *(f"{ones[0].rate:g}" if ones[0].rate else "" for ones in methods.values())],
        [
            "tokens read",
            *(f"{np.mean([o.tokens for o in ones]):,.0f}" for ones in methods.values()),
        ],
        ["seeds", *(str(len(ones)) if ones[0].rate else "" for ones in methods.values())],
    ]
    return table(["", *methods], rows)


def _differences(methods: Methods, branch: str) -> str:
    """Of a branch that looks first against the better of its rivals, at each number of words."""
    names = (branch, *RIVALS)
    seeds = min(len(methods[name]) for name in names)
    rows = []
    for curve in (BETWEEN, AHEAD, WRITTEN):
        for words in methods[UNTRAINED][0].curves.get(curve, {}):
            of = {name: values(methods[name][:seeds], curve, words) for name in names}
            rival = max(RIVALS, key=lambda name: of[name].mean())
            difference = of[branch] - of[rival]
            found = estimate(difference.mean(0))
            by_seed = ", ".join(f"{x:+.3f}" for x in difference.mean(1))
            interval = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            rows.append([f"{words} {curve}", rival, interval, by_seed])
    header = ["", "best rival", f"{branch} minus it, 95 % over scenes", "by seed"]
    return table(header, rows)


def _controls(name: str, ones: Sequence[Measured]) -> str:
    """What a branch reads on another scene's image and alone, and where it looks."""
    layers = list(next(iter(ones[0].attention.values())))
    rows = []
    for words in ones[0].curves[MISLED]:
        heads = [
            np.array([max(one.attention[words][layer]) for one in ones])[:, None]
            for layer in layers
        ]
        curves = [values(ones, curve, words) for curve in (BETWEEN, MISLED, ALONE)]
        rows.append([words, *map(_mean_and_spread, [*curves, *heads])])
    header = [BETWEEN, "as it is", MISLED, ALONE]
    header += [f"layer {layer}: best head's attention on the asked cell" for layer in layers]
    gates = "; ".join(
        f"layer {layer} {', '.join(f'{one.gates[layer][-1]:+.3f}' for one in ones)}"
        for layer in ones[0].gates
    )
    return f"{name}:\n\n{table(header, rows)}\n\nGates at the end: {gates}."


def _mean_and_spread(found: np.ndarray) -> str:
    """Of [seeds, scenes]: the mean, and the standard deviation over seeds."""
    by_seed = found.mean(1)
    if len(by_seed) == 1:
        return f"{by_seed[0]:.3f}"
    return f"{by_seed.mean():.3f} ± {by_seed.std(ddof=1):.3f}"


def plot(methods: Methods, path: Path) -> None:
    """Accuracy by words between and by words ahead, and the branch's controls: `path`.png,
    .svg and .pdf."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True)
    for axis, curve in zip(axes, (BETWEEN, AHEAD), strict=False):
        for name, ones in methods.items():
            _draw(axis, ones, curve, name, STYLES[name])
    base = methods[UNTRAINED]
    _draw(axes[0], base, OTHER, f"base, {OTHER}", STYLES[OTHER])
    _draw(axes[2], base, BETWEEN, UNTRAINED, STYLES[UNTRAINED])
    if looking := [name for name in LOOKING if name in methods]:
        branch = methods[looking[-1]]
        _draw(axes[2], branch, BETWEEN, looking[-1], STYLES[looking[-1]])
        for curve in (MISLED, ALONE):
            _draw(axes[2], branch, curve, curve, STYLES[curve])
    words = [int(n) for n in base[0].curves[BETWEEN]]
    for axis, title in zip(axes, PANELS, strict=True):
        axis.set(xlabel=title, ylim=(0, 1.03))
        axis.set_xticks(np.sqrt(words), [str(n) for n in words])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("values read correctly (teacher-forced)")
    figure.tight_layout()
    for kind in ("png", "svg", "pdf"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=130)
    plt.close(figure)


def _draw(
    axis: Axes,
    ones: Sequence[Measured],
    curve: str,
    label: str,
    style: tuple[str, str, str],
) -> None:
    """A curve with the spread over seeds; AHEAD begins where nothing stands between either."""
    found = {int(words): values(ones, curve, words).mean(1) for words in ones[0].curves[curve]}
    if curve == AHEAD:
        found[0] = values(ones, BETWEEN, "0").mean(1)
    words = sorted(found)
    spread = [found[n].std(ddof=1) for n in words] if len(ones) > 1 else None
    look: dict[str, Any] = dict(zip(("color", "marker", "linestyle"), style, strict=True))
    means = [found[n].mean() for n in words]
    axis.errorbar(np.sqrt(words), means, spread, label=label, capsize=3, **look)
