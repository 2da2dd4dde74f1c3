"""Conversion of a full-size checkpoint beside `cp` of the same files: time and memory.

Writes a checkpoint of random bfloat16 weights in Hugging Face's layout, copies it, converts it
(each in a process of its own, with the files out of the page cache before and everything on the
disk after), and prints a table. 8b takes 18 GB of disk for the checkpoint and as much for a result.

    python -m benchmarks.conversion --preset 2b
    python -m benchmarks.conversion --scratch /data --back
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.sizes import config_of
from convert.layout import layout
from convert.safetensors_files import Planned, write_safetensors
from pvm_jax.checkpoint.directory import write_config
from pvm_jax.config import ModelConfig
from pvm_jax.options import run_as_command

PIECE = 2**25


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_memory: int


def main(
    preset: Literal["small", "2b", "4b", "8b", "32b"] = "8b",
    scratch: str | None = None,
    back: bool = False,
) -> None:
    """Prints a table.

    Args:
        preset: size of the checkpoint.
        scratch: where to work (None: the system's temporary directory); cleaned up after.
        back: also convert back.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        source, copied, orbax, again = (
            Path(place) / name for name in ("hf", "copy", "orbax", "back")
        )
        write_random(source, config_of(preset).without_pvm())
        size = sum(file.stat().st_size for file in source.iterdir())
        idle = measure(
            [sys.executable, "-c", "import convert.hf_to_orbax, convert.orbax_to_hf"], source
        )
        command = [sys.executable, "-m"]
        runs = {"cp, before": copy(source, copied)}
        runs["hf_to_orbax"] = measure(
            [*command, "convert.hf_to_orbax", str(source), str(orbax)], source
        )
        if back:
            runs["orbax_to_hf"] = measure(
                [*command, "convert.orbax_to_hf", str(orbax), str(again), "--plain"], orbax
            )
            shutil.rmtree(again)
        shutil.rmtree(orbax)
        runs["cp, after"] = copy(source, copied)
    show(preset, size, idle, runs)


def write_random(directory: Path, config: ModelConfig) -> None:
    """A Hugging Face checkpoint of `config`, bfloat16, in files of 5 GB; the same random piece
    again and again."""
    directory.mkdir()
    dtype = np.dtype(ml_dtypes.bfloat16)
    tensors = {name: Planned(dtype, slot.shape) for name, slot in layout(config).items()}
    write_config(directory, config, {})
    write_safetensors(directory, tensors, _random_pieces(tensors), "5GB")


def _random_pieces(tensors: Mapping[str, Planned]) -> Iterator[np.ndarray]:
    piece = np.random.default_rng(0).normal(scale=0.02, size=PIECE).astype(ml_dtypes.bfloat16)
    for tensor in tensors.values():
        left = tensor.nbytes // piece.itemsize
        while left:
            yield piece[: min(left, PIECE)]
            left -= min(left, PIECE)


def measure(command: list[str], reads: Path) -> Run:
    """Runs `command` with what it `reads` out of the page cache, until its result is on the
    disk."""
    evict(reads)
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise RuntimeError(f"failed: {' '.join(command)}")
    return Run(time.monotonic() - start, usage.ru_maxrss * 1024)


def copy(source: Path, target: Path) -> Run:
    """Times `cp`; the copy is removed."""
    run = measure(["cp", "-r", str(source), str(target)], source)
    shutil.rmtree(target)
    return run


def evict(directory: Path) -> None:
    """Takes a directory's files out of the page cache."""
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            with open(file, "rb") as content:
                os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(preset: str, size: int, idle: Run, runs: dict[str, Run]) -> None:
    table = Table(title=f"Conversion, {preset} layout, bfloat16, {size / 2**30:.1f} GiB")
    for column in ("", "seconds", "MB/s", "time / faster cp", "peak memory above the imports, GiB"):
        table.add_column(column, justify="left" if not column else "right")
    fastest_copy = min(run.seconds for name, run in runs.items() if name.startswith("cp"))
    for name, run in runs.items():
        memory = (
            "" if name.startswith("cp") else f"{(run.peak_memory - idle.peak_memory) / 2**30:.2f}"
        )
        ratio = run.seconds / fastest_copy
        table.add_row(
            name, f"{run.seconds:.1f}", f"{size / 1e6 / run.seconds:.0f}", f"{ratio:.2f}", memory
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    run_as_command(main)
