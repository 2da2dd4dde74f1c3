"""What demo.compare measured, as a table and a picture: means over seeds, and their spread."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from demo.evaluate import EvaluationSettings

UNTRAINED, SHUFFLED = "base", "base, other image"
COLOURS = {
    UNTRAINED: "#555555",
    SHUFFLED: "#bbbbbb",
    "LoRA": "#2a78b5",
    "full": "#2e8b57",
    "PVM": "#e8871e",
    "PVM looks first": "#c0392b",
}
STYLES = ("-", "--", ":", "-.")
"""A layer's line."""


@dataclass(frozen=True)
class Measured:
    """One trained model, or the base.

    Attributes:
        method: its name; seed: of its training, None for the base.
        trained: parameters that were trained.
        accuracy: of the values, teacher-forced, by distance.
        shuffled: the same with the scenes' images exchanged, of the base: what guessing gives.
        misled: the accuracy where the branch, and nothing else, reads another scene's image
            (`demo.recall`).
        attention: of the branch on the asked cell, by distance, layer and head.
        gates: of the branch, by layer, at every step of the training.
    """

    method: str
    seed: int | None
    trained: int
    accuracy: dict[str, float]
    shuffled: dict[str, float] = field(default_factory=dict)
    misled: dict[str, float] = field(default_factory=dict)
    attention: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    gates: dict[str, list[float]] = field(default_factory=dict)


def write_report(
    measured: Sequence[Measured],
    settings: EvaluationSettings,
    trained_on: Sequence[int],
    how: str,
    out: Path,
) -> None:
    """Writes results.json, results.md and results.png to `out`, and prints the table."""
    by_method: dict[str, list[Measured]] = {}
    for one in measured:
        by_method.setdefault(one.method, []).append(one)
    content = {"settings": asdict(settings), "how": how, "trained_on": list(trained_on)}
    (out / "results.json").write_text(
        json.dumps(content | {"measured": [asdict(one) for one in measured]}) + "\n"
    )
    text = markdown(by_method, settings, trained_on, how)
    (out / "results.md").write_text(text)
    plot(by_method, settings, trained_on, out / "results.png")
    print(text)


def accuracies(
    by_method: Mapping[str, Sequence[Measured]], settings: EvaluationSettings
) -> dict[str, np.ndarray]:
    """By method, and for guessing, [seeds, distances]."""
    distances = [str(distance) for distance in settings.distances]
    rows = {
        name: np.array([[one.accuracy[d] for d in distances] for one in ones])
        for name, ones in by_method.items()
    }
    return rows | {SHUFFLED: np.array([[by_method[UNTRAINED][0].shuffled[d] for d in distances]])}


def markdown(
    by_method: Mapping[str, Sequence[Measured]],
    settings: EvaluationSettings,
    trained_on: Sequence[int],
    how: str,
) -> str:
    """The tables."""
    seeds = max(len(ones) for ones in by_method.values())
    rows = accuracies(by_method, settings)
    parts = [
        (
            f"Teacher-forced accuracy of the values on {settings.scenes} held-out scenes of"
            f" {settings.size} x {settings.size} cells, {settings.lines} lines each: mean and"
            f" standard deviation over {seeds} seeds. All were trained for {how} on distances from"
            f" {trained_on[0]} to {trained_on[1]}."
        ),
        table(
            ["tokens between image and question", *rows],
            [
                [
                    "trained parameters",
                    *(
                        f"{by_method[name][0].trained:,}" if name in by_method else ""
                        for name in rows
                    ),
                ],
                *(
                    [distance, *(_mean_and_spread(rows[name][:, i]) for name in rows)]
                    for i, distance in enumerate(settings.distances)
                ),
            ],
        ),
    ]
    for name, ones in by_method.items():
        if ones[0].attention:
            parts += _recall(name, ones, settings)
    return "\n\n".join(parts) + "\n"


def _recall(name: str, ones: Sequence[Measured], settings: EvaluationSettings) -> list[str]:
    """Whether the branch recalls the image."""
    cells, shares = settings.size**2, _attention(ones, settings)
    misled = np.array(
        [[one.misled[str(distance)] for distance in settings.distances] for one in ones]
    )
    heads = [which for by in shares.values() for which in (by.mean(-1), by.max(-1))]
    return [
        (
            f"{name}: does the branch recall? Its accuracy when the branch alone reads another"
            " scene's image, and the share of its attention on the cell that is asked for (chance:"
            f" 1/{cells} = {1 / cells:.3f}) where the value is to be said, as the mean over heads"
            " and of the head with the largest share:"
        ),
        table(
            [
                "tokens between image and question",
                "accuracy, branch on another image",
                *(f"layer {layer}{which}" for layer in shares for which in ("", ", best head")),
            ],
            [
                [distance, *(_mean_and_spread(values[:, i]) for values in (misled, *heads))]
                for i, distance in enumerate(settings.distances)
            ],
        ),
        "Gates at the end: "
        + "; ".join(
            f"layer {layer} {', '.join(f'{one.gates[layer][-1]:+.3f}' for one in ones)}"
            for layer in ones[0].gates
        ),
    ]


def _attention(ones: Sequence[Measured], settings: EvaluationSettings) -> dict[str, np.ndarray]:
    """By layer, [seeds, distances, heads]."""
    layers = next(iter(ones[0].attention.values()))
    return {
        layer: np.array(
            [[one.attention[str(d)][layer] for d in settings.distances] for one in ones]
        )
        for layer in layers
    }


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _mean_and_spread(values: np.ndarray) -> str:
    return (
        f"{values.mean():.3f}"
        if len(values) == 1
        else f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
    )


def plot(
    by_method: Mapping[str, Sequence[Measured]],
    settings: EvaluationSettings,
    trained_on: Sequence[int],
    path: Path,
) -> None:
    """Accuracy by distance; the branch's gates by step; its attention on the asked cell by
    distance."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5.4), width_ratios=(1.3, 1, 1))
    _plot_accuracy(left, by_method, settings, trained_on)
    _plot_gates(middle, by_method)
    _plot_attention(right, by_method, settings)
    for axis in (left, right):
        axis.set_xticks(
            np.arange(len(settings.distances)), [str(distance) for distance in settings.distances]
        )
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=2, frameon=False
        )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_accuracy(
    axis: Axes,
    by_method: Mapping[str, Sequence[Measured]],
    settings: EvaluationSettings,
    trained_on: Sequence[int],
) -> None:
    places = np.arange(len(settings.distances))
    for name, rows in accuracies(by_method, settings).items():
        spread = rows.std(axis=0, ddof=1) if len(rows) > 1 else None
        axis.errorbar(
            places, rows.mean(0), spread, label=name, color=COLOURS[name], marker="o", capsize=3
        )
    for name, ones in by_method.items():
        if ones[0].misled:
            misled = np.mean(
                [[one.misled[str(distance)] for distance in settings.distances] for one in ones],
                axis=0,
            )
            label = f"{name}, its branch on another image"
            axis.plot(places, misled, "x:", color=COLOURS[name], label=label)
    axis.axvspan(
        *np.interp(trained_on, settings.distances, places),
        color="#f3e9c8",
        label="trained distances",
        zorder=0,
    )
    axis.set(
        ylim=(0, 1.05),
        xlabel="tokens between the image and the question",
        ylabel="values read correctly (teacher-forced)",
    )


def _plot_gates(axis: Axes, by_method: Mapping[str, Sequence[Measured]]) -> None:
    for one in (one for ones in by_method.values() for one in ones if one.gates):
        for style, (layer, values) in zip(STYLES, one.gates.items(), strict=False):
            label = f"{one.method}, layer {layer}" if one.seed == 0 else None
            axis.plot(np.abs(values), style, color=COLOURS[one.method], alpha=0.7, label=label)
    axis.set(xlabel="step", ylabel="size of the branch's gate, a line a seed")


def _plot_attention(
    axis: Axes, by_method: Mapping[str, Sequence[Measured]], settings: EvaluationSettings
) -> None:
    places = np.arange(len(settings.distances))
    for name, ones in by_method.items():
        if not ones[0].attention:
            continue
        for style, (layer, shares) in zip(STYLES, _attention(ones, settings).items(), strict=False):
            by_seed = shares.mean(-1)
            spread = by_seed.std(axis=0, ddof=1) if len(by_seed) > 1 else None
            label, colour = f"{name}, layer {layer}", COLOURS[name]
            axis.errorbar(
                places,
                by_seed.mean(0),
                spread,
                fmt=style,
                color=colour,
                label=f"{label}, mean of heads",
                capsize=3,
            )
            axis.plot(
                places,
                shares.max(-1).mean(0),
                style,
                color=colour,
                alpha=0.4,
                label=f"{label}, best head",
            )
    axis.axhline(1 / settings.size**2, color=COLOURS[SHUFFLED], label="chance")
    axis.set(
        ylim=(0, None),
        xlabel="tokens between the image and the question",
        ylabel="branch's attention on the asked cell",
    )
