"""What an asynchronous step checkpoint costs the steps: the part of `save` that blocks, and how
much slower the steps are that run while the files are written. All ratios are of one run.

    python -m benchmarks.checkpoints
    python -m benchmarks.checkpoints --sizes '[335]' --step_seconds 2 --directory /mnt/runs
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from pvm_jax import ModelConfig
from pvm_jax.options import run_as_command
from train.run.checkpoints import TrainCheckpoints
from train.sft.config import SFTConfig

_WIDTH = 512
_LAYERS = 3


class SavingCost(NamedTuple):
    """Of one save, in seconds: an undisturbed step, `save` itself, what the steps beside the
    writing lost, the writing."""

    step: float
    blocked: float
    slowed: float
    written: float


def main(
    sizes: Sequence[int] = (6, 1000),
    saves: int = 5,
    step_seconds: float = 0.5,
    every: int = SFTConfig.checkpoint_every,
    directory: str | None = None,
) -> None:
    """Prints a table with a line for each size of state.

    Args:
        sizes: megabytes of trained parameters and optimizer state (the demo's: 6; the branch of the
            8B model: 335).
        saves: measured; medians are printed.
        step_seconds: what a step is made to take, about.
        every: steps between two saves, for the share of their time that is lost.
        directory: where the checkpoints go (None: the system's temporary directory).
    """
    table = Table(title=f"Medians of {saves} saves; lost: of the time of {every} steps")
    for column in ("state", "step", "save blocks", "steps beside it lose", "written after", "lost"):
        table.add_column(column, justify="right")
    for size in sizes:
        with TemporaryDirectory(dir=directory) as place:
            costs = list(measure(size * 10**6, saves, step_seconds, Path(place)))
        cost = SavingCost(*(median(values) for values in zip(*costs, strict=True)))
        table.add_row(
            f"{size:,} MB",
            f"{cost.step:.3f} s",
            f"{cost.blocked:.3f} s",
            f"{cost.slowed:.3f} s",
            f"{cost.written:.2f} s",
            f"{(cost.blocked + cost.slowed) / (every * cost.step):.2%}",
        )
    Console(width=110).print(table)


def measure(size: int, saves: int, step_seconds: float, directory: Path) -> Iterator[SavingCost]:
    """Saves a state of `size` bytes while steps that change all of it go on."""
    side = round((size / 4 / _LAYERS / 3) ** 0.5)
    state = {
        name: jax.random.normal(jax.random.key(number), (_LAYERS, side, side))
        for number, name in enumerate(("params", "first_moment", "second_moment"))
    }

    @jax.jit
    def product(x: jax.Array, count: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(x @ x), x)

    @partial(jax.jit, donate_argnums=0)
    def update(state: dict, change: jax.Array) -> dict:
        return jax.tree.map(lambda x: x * (1 + 1e-6 * change[0, 0]), state)

    x = jax.random.normal(jax.random.key(9), (_WIDTH, _WIDTH)) / _WIDTH**0.5

    def step(state: dict, count: int) -> tuple[dict, float]:
        start = time.perf_counter()
        state = jax.block_until_ready(update(state, product(x, jnp.int32(count))))
        return state, time.perf_counter() - start

    for count in (1, 1, 100):  # the first compiles
        state, seconds = step(state, count)
    count = max(1, round(100 * step_seconds / seconds))
    with TrainCheckpoints(
        directory / "steps", ModelConfig.preset("4b"), "benchmark"
    ) as checkpoints:
        for number in range(saves + 1):
            undisturbed = []
            for _ in range(6):
                state, seconds = step(state, count)
                undisturbed.append(seconds)
            start = time.perf_counter()
            checkpoints.save(number, state)
            blocked, beside = time.perf_counter() - start, []
            while not (directory / "steps" / str(number)).is_dir():
                state, seconds = step(state, count)
                beside.append(seconds)
            written = time.perf_counter() - start
            if number:  # the first save starts threads and caches
                alone = median(undisturbed)
                yield SavingCost(
                    alone, blocked, sum(seconds - alone for seconds in beside), written
                )


if __name__ == "__main__":
    run_as_command(main)
