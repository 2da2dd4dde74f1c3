"""GRPO on the demo's task, over several seeds: held-out reward by step, as a table and a picture.

`make demo-grpo` runs this. It begins with the branch that `make demo` trained, and trains that
first where there is none. A step whose result is there already is skipped.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from demo.run import Step, branch_steps, run_steps
from pvm_jax.options import run_as_command
from train.run.events import read_values

HELD_OUT = ("--count", "48", "--mixture.digits", "heldout", "--mixture.seed", "7")
REWARD = "held_out/reward/mean"


def main(out: Path = Path("out/demo"), seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Refines the demo's branch and decoder by GRPO, once for each seed; writes results.json,
    results.md and results.png.

    Args:
        out: the demo's folder; everything here goes to its subfolder grpo.
        seeds: of the order of the prompts and of everything that is drawn.
    """
    folder = out / "grpo"
    runs = [folder / f"run_{seed}" for seed in seeds]
    run_steps([*branch_steps(out), *grpo_steps(out, folder, seeds)])
    curves = [read_values(run / "log")[REWARD] for run in runs]
    steps = [step for step, _ in curves[0]]
    rewards = np.array([[value for _, value in curve] for curve in curves])
    write_report(steps, rewards, seeds, folder)
    print((folder / "results.md").read_text())
    print(f"The picture: {folder / 'results.png'}")


def grpo_steps(out: Path, folder: Path, seeds: Sequence[int]) -> list[Step]:
    """Data, held-out data and a run for each seed."""
    data, held_out = folder / "data", folder / "held_out"
    make = ["--config", "demo/grpo_data.yaml"]
    train = [
        "train.grpo",
        "--config=demo/grpo.yaml",
        f"--checkpoint={out / 'checkpoint'}",
        f"--branch={out / 'run' / 'branch'}",
    ]
    train += [
        f"--data.sources={data / 'data.jsonl'}",
        f"--held_out.sources={held_out / 'data.jsonl'}",
    ]
    return [
        (data / "data.jsonl", ["demo.task", data, *make]),
        (held_out / "data.jsonl", ["demo.task", held_out, *make, *HELD_OUT]),
        *(
            (
                folder / f"run_{seed}" / "model",
                [*train, f"--run_dir={folder / f'run_{seed}'}", f"--seed={seed}"],
            )
            for seed in seeds
        ),
    ]


def write_report(
    steps: Sequence[int], rewards: np.ndarray, seeds: Sequence[int], folder: Path
) -> None:
    """Writes results.json, results.md and results.png to `folder`.

    Args:
        steps: at which was measured, [points].
        rewards: held-out, [seeds, points].
    """
    content = {"steps": list(steps), "seeds": list(seeds), "rewards": rewards.tolist()}
    (folder / "results.json").write_text(json.dumps(content) + "\n")
    lines = [
        f"| step | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | least to most |",
        "| ---" * (len(seeds) + 3) + " |",
    ]
    for step, column in zip(steps, rewards.T, strict=True):
        values = " | ".join(f"{value:.3f}" for value in column)
        lines.append(
            f"| {step} | {values} | {column.mean():.3f} | {column.min():.3f} to"
            f" {column.max():.3f} |"
        )
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.fill_between(
        steps, rewards.min(0), rewards.max(0), color="#c0392b", alpha=0.2, label="least to most"
    )
    axes.plot(
        steps, rewards.mean(0), color="#c0392b", marker="o", label=f"mean of {len(seeds)} seeds"
    )
    axes.axhline(rewards[:, 0].mean(), color="#555555", linestyle="--", label="before")
    axes.set(
        xlabel="step (8 prompts x 8 completions)",
        ylabel="held-out exactness, sampled",
        title="GRPO on the inventory task",
    )
    axes.legend()
    figure.savefig(folder / "results.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_as_command(main)
