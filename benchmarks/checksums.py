"""What it costs to notice damage: the checksums of a saved checkpoint, beside the reading that they
precede. All ratios are of one run.

    python -m benchmarks.checksums
    python -m benchmarks.checksums --size 2b --directory /mnt/runs
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.device import random_model
from benchmarks.sizes import config_of
from pvm_jax import load, save
from pvm_jax.checkpoint.checksums import verify_checksums
from pvm_jax.options import run_as_command


def main(size: str = "small", repeats: int = 5, directory: str | None = None) -> None:
    """Prints a table of seconds, of processor seconds for a GiB, and the ratio to loading.

    Args:
        size: of the model: small, or a preset (2b, 4b, ...).
        repeats: medians are printed.
        directory: where the checkpoint goes (None: the system's temporary directory).
    """
    model = random_model(config_of(size))
    gib = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))) / 2**30
    with TemporaryDirectory(dir=directory) as place:
        path = Path(place) / "checkpoint"
        save(path, model)
        checked = [timed(lambda: verify_checksums(path)) for _ in range(repeats)]
        loaded = [timed(lambda: nnx.state(load(path))) for _ in range(repeats)]
    table = Table(title=f"{gib:.2f} GiB; loading has the checksums in it")
    for column in ("", "seconds", "processor seconds a GiB", "of loading"):
        table.add_column(column, justify="right" if column else "left")
    whole = median(seconds for seconds, _ in loaded)
    for name, times in (("SHA256SUMS", checked), ("load", loaded)):
        seconds, busy = (median(values) for values in zip(*times, strict=True))
        table.add_row(name, f"{seconds:.2f}", f"{busy / gib:.2f}", f"{seconds / whole:.0%}")
    Console(width=100).print(table)


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and processor seconds of all threads."""
    start, busy = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - start, time.process_time() - busy


if __name__ == "__main__":
    run_as_command(main)
