"""The whole job on real digits, one documented command after the other: convert, fine-tune the
branch, generate, measure.

`make demo` runs this. A step whose result is there already is skipped, so an interrupted demo goes
on where it was.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from demo.compare_report import curve_rows, of_table, read_measured
from demo.curves import AHEAD, BETWEEN
from pvm_jax.options import run_as_command

BASE = "demo/base"
BRANCH = ("--pvm_layers", "1", "2", "--pvm_hidden_size", "128")

DEMO_OVER_PROBE = 285.0
"""How many times longer than `probe` the whole demo takes, on two quiet cores: about 250
with AVX-512, 330 with AVX2."""

# What a command makes (the command is skipped where that exists), and the command itself: arguments
# of `python -m`.
Step = tuple[Path, Sequence[object]]


def main(out: Path = Path("out/demo")) -> None:
    """Converts the shipped checkpoint, fine-tunes its PVM branch, asks it about an image, measures
    before and after.

    Args:
        out: folder for everything that is written.
    """
    minutes = round(DEMO_OVER_PROBE * probe() / 30) / 2
    print(f"All of it takes about {minutes:g} minutes on this machine, if it does nothing else.")
    checkpoint, run, report = out / "checkpoint", out / "run", out / "report"
    run_steps(branch_steps(out))
    show_one_answer(checkpoint, run / "branch", out / "example")
    run_steps(
        [
            (
                report / "report.html",
                ["demo.evaluate", report, checkpoint, "--branch", run / "branch"],
            )
        ]
    )
    show_comparison(Path("demo/results"))
    print(f"The report: {report / 'report.html'} (open it in a browser)")


def probe() -> float:
    """Seconds that this machine takes for a little of what the demo does: to compile a layer, and
    to train it."""
    x, w = (
        jnp.ones((2048, 128)),
        {"up": jnp.full((4, 128, 512), 0.01), "down": jnp.full((4, 512, 128), 0.01)},
    )

    def loss(w: dict[str, jax.Array]) -> jax.Array:
        layer = lambda x, w: (x + jax.nn.gelu(x @ w["up"]) @ w["down"], None)  # noqa: E731
        return jnp.square(jax.lax.scan(layer, x, w)[0]).mean()

    start, step = time.perf_counter(), jax.jit(jax.grad(loss))
    for _ in range(10):
        jax.block_until_ready(step(w))
    return time.perf_counter() - start


def branch_steps(out: Path) -> list[Step]:
    """From the shipped checkpoint to `out`/checkpoint and a branch trained on it,
    `out`/run/branch."""
    checkpoint, data, run = out / "checkpoint", out / "data", out / "run"
    look_data, look = out / "look_data", out / "look"
    return [
        (checkpoint, ["convert.hf_to_orbax", BASE, checkpoint, *BRANCH]),
        (look_data / "data.jsonl", ["demo.task", look_data, "--config", "demo/look_data.yaml"]),
        (look / "branch", train("demo/look.yaml", checkpoint, look_data, look)),
        (data / "data.jsonl", ["demo.task", data, "--config", "demo/branch_data.yaml"]),
        (
            run / "branch",
            train("demo/branch.yaml", checkpoint, data, run, f"--branch={look / 'branch'}"),
        ),
    ]


def train(config: str, checkpoint: Path, data: Path, run: Path, *more: str) -> list[str]:
    """The command that trains on `data` from `checkpoint` into `run`, as the file `config` says."""
    where = (
        f"--checkpoint={checkpoint}",
        f"--data.sources={data / 'data.jsonl'}",
        f"--run_dir={run}",
    )
    return ["train.sft", f"--config={config}", *where, *more]


def run_steps(steps: Sequence[Step]) -> None:
    """Runs the commands in order, each printed as one would type it. Raises RuntimeError if one
    fails."""
    for result, arguments in steps:
        if result.exists():
            print(f"[{result} is there: skipped] {_typed(arguments)}", flush=True)
        else:
            print(f"\n$ {_typed(arguments)}", flush=True)
            _run(arguments)


def show_one_answer(checkpoint: Path, branch: Path, folder: Path) -> None:
    """Asks about one held-out image through the command line of `pvm_jax generate`."""
    if not folder.exists():
        scene = [
            "--mixture.sizes",
            "[3]",
            "--mixture.digits",
            "heldout",
            "--mixture.lines",
            "[8,8]",
        ]
        _run(["demo.task", folder, "--count", 1, *scene])
    user, assistant = json.loads((folder / "data.jsonl").read_text())["messages"]
    image, question = (part[part["type"]] for part in user["content"])
    print(f"\nThe true lines of {folder / image}, in one of their orders:\n{assistant['content']}")
    ask = ["pvm_jax", "generate", "--checkpoint", checkpoint, "--branch", branch]
    ask += ["--image", folder / image, "--max_new_tokens", 24, question]
    print(f"$ {_typed(ask)}", flush=True)
    _run(ask)


def show_comparison(results: Path) -> None:
    """What the shipped comparison found: this branch beside other ways to fine-tune."""
    methods = of_table(read_measured(results), "near")
    seeds = min(len(ones) for ones in methods.values() if ones[0].rate)
    title = f"Values read correctly, {seeds} seeds a method (make compare)"
    for curve in (BETWEEN, AHEAD):
        header, rows = curve_rows(methods, curve)
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        Console().print("", table)


def _typed(arguments: Sequence[object]) -> str:
    return shlex.join(["python", "-m", *map(str, arguments)])


def _run(arguments: Sequence[object]) -> None:
    code = subprocess.run([sys.executable, "-m", *map(str, arguments)], check=False).returncode
    if code:
        raise RuntimeError(
            f"that command failed (exit status {code}); what it says above tells why"
        )


if __name__ == "__main__":
    run_as_command(main)
