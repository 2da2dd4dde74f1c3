"""The measurements of demo.evaluate as a table and a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

LINE_BUCKETS = 4
COLOURS = {"before": "#555555", "after": "#c0392b"}
CHANCE_COLOUR = "#aaaaaa"


class Estimate(NamedTuple):
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: np.ndarray, resamples: int) -> Estimate:
    """Mean of `values` [scenes, ...] and its 95% interval over resampled scenes: lines about one image are not independent."""
    per_scene = values.reshape(len(values), -1).mean(1)
    drawn = np.random.default_rng(0).integers(0, len(per_scene), (resamples, len(per_scene)))
    low, high = np.quantile(per_scene[drawn].mean(1), [0.025, 0.975])
    return Estimate(float(per_scene.mean()), float(low), float(high))


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Means and intervals.

    Returns:
        `by_distance`: by model, one Estimate a distance; `gain`: after - before, paired by scene, one Estimate a distance
        (absent without "after"); `by_line`: by model, one Estimate a bucket of lines, at the shortest distance;
        `line_buckets`: (first, last) line of each, from 1; `by_attribute`: by model and attribute, one mean a distance.
    """
    settings = results["settings"]
    resamples, distances = settings["resamples"], settings["distances"]
    hits = {name: np.array([by[d] for d in distances]) for name, by in results["hits"].items()}  # [distances, scenes, lines]
    attributes = np.array(results["attributes"])
    buckets = [part for part in np.array_split(np.arange(settings["lines"]), LINE_BUCKETS) if len(part)]
    summary = {
        "by_distance": {name: [bootstrap(h, resamples) for h in by] for name, by in hits.items()},
        "by_line": {name: [bootstrap(by[0][:, part], resamples) for part in buckets] for name, by in hits.items()},
        "line_buckets": [(int(part[0]) + 1, int(part[-1]) + 1) for part in buckets],
        "by_attribute": {
            name: {a: [float(h[attributes == a].mean()) for h in by] for a in np.unique(attributes).tolist()}
            for name, by in hits.items()
        },
    }
    if "after" in hits:
        gains = hits["after"].astype(float) - hits["before"]
        summary["gain"] = [bootstrap(gain, resamples) for gain in gains]
    return summary


def write_report(results: dict[str, Any], out: Path) -> None:
    """Writes results.json, results.md and results.png to `out`, and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    summary = summarize(results)
    (out / "results.json").write_text(json.dumps({"summary": summary, **results}) + "\n")
    text = markdown(results, summary)
    (out / "results.md").write_text(text)
    plot(results, summary, out / "results.png")
    print(text)


def markdown(results: dict[str, Any], summary: dict[str, Any]) -> str:
    """The tables, with a first line that says what came out."""
    settings = results["settings"]
    names, distances = list(summary["by_distance"]), settings["distances"]
    parts = [
        verdict(summary, distances),
        f"Teacher-forced accuracy of the values and its 95% interval over {settings['scenes']} held-out scenes of "
        f"{settings['size']} x {settings['size']} cells, {settings['lines']} lines each:",
        table(
            ["tokens between image and question", *names, *(["gain, paired"] if "gain" in summary else [])],
            [
                [distance, *(summary["by_distance"][name][i] for name in names)]
                + ([summary["gain"][i]] if "gain" in summary else [])
                for i, distance in enumerate(distances)
            ],
        ),
        f"By position in the answer, {distances[0]} tokens between image and question:",
        table(
            ["lines", *names],
            [
                [f"{first} - {last}", *(summary["by_line"][name][i] for name in names)]
                for i, (first, last) in enumerate(summary["line_buckets"])
            ],
        ),
        "By attribute:",
        table(
            ["model", "attribute", *(str(distance) for distance in distances)],
            [
                [name, attribute, *(f"{mean:.2f}" for mean in means)]
                for name in names
                for attribute, means in summary["by_attribute"][name].items()
            ],
        ),
        f"Written by the model itself, greedily ({settings['written_scenes']} scenes):",
        table(
            ["model", "tokens between", "lines", "correct", "wrong value", "pair repeated", "malformed"],
            [
                [name, distance, w["lines"], w["correct"], _wrong(w), w["repeated"], w["malformed"]]
                for name, by in results["written"].items()
                for distance, w in by.items()
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def verdict(summary: dict[str, Any], distances: Sequence[int]) -> str:
    """One sentence: where the paired 95% interval of the gain excludes zero, if anywhere."""
    if "gain" not in summary:
        return "The base model alone."
    gains = list(zip(distances, summary["gain"], strict=True))
    better = [f"{distance} ({gain.mean:+.3f})" for distance, gain in gains if gain.low > 0]
    worse = [f"{distance} ({gain.mean:+.3f})" for distance, gain in gains if gain.high < 0]
    if not better and not worse:
        return "A null result: at no distance does the branch change the accuracy beyond its 95% interval."
    said = [f"{word} at {', '.join(where)} tokens" for word, where in (("better", better), ("worse", worse)) if where]
    return f"With the branch the values are read {' and '.join(said)} from the image (95% intervals exclude no change)."


def _wrong(written: dict[str, int]) -> int:
    return written["lines"] - written["correct"] - written["repeated"] - written["malformed"]


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def plot(results: dict[str, Any], summary: dict[str, Any], path: Path) -> None:
    """Accuracy by distance (left) and by position in the answer (right)."""
    settings = results["settings"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    buckets = summary["line_buckets"]
    middles = [(first + last) / 2 for first, last in buckets]
    for axis, x, key in ((axes[0], settings["distances"], "by_distance"), (axes[1], middles, "by_line")):
        for name, estimates in summary[key].items():
            means, lows, highs = np.array(estimates).T
            colour = COLOURS.get(name, CHANCE_COLOUR)
            axis.errorbar(x, means, (means - lows, highs - means), label=name, color=colour, marker="o", capsize=3)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_xlabel("tokens between the image and the question")
    axes[0].set_ylabel("values read correctly (teacher-forced)")
    axes[1].set_xlabel(f"line of the answer ({settings['distances'][0]} tokens before the question)")
    axes[0].legend()
    figure.suptitle(
        f"{settings['size']} x {settings['size']} grid of real digits, {settings['scenes']} held-out scenes, 95% intervals"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
