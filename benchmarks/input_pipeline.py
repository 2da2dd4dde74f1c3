"""Whether the input pipeline keeps up with the devices: host time a row, from shards on disk to
packed arrays, by part of the work, beside the time that a training step takes a chip for the row.

The step's time is its FLOPs (counted from the traced program of the published settings: the branch
of the 8B model learns) at the chip's full peak, which no real step reaches, and without what remat
computes twice: the pipeline is measured against the fastest step there could be.

    python -m benchmarks.input_pipeline
    python -m benchmarks.input_pipeline --size 4b --tokens 4096 --patches 4096
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.step_cost import step_cost
from convert.dataset import convert
from demo.mixed_images import make_processor, write_mix
from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.options import run_as_command
from train.config import Bucket, DataConfig
from train.data.loading import TrainingData, load_training_data
from train.step.flops import peak_flops

CHIPS = ("TPU v5e", "TPU v5p", "TPU v6e", "NVIDIA H100")


def main(
    size: str = "8b", tokens: int = 8192, patches: int = 10240, count: int = 500, threads: int = 4
) -> None:
    """Prints two tables.

    Args:
        size: preset of the model whose step is compared with.
        tokens: of a row.
        patches: of a row.
        count: conversations about real and synthetic images that the rows are packed of.
        threads: that read at the same time in the last measurement.
    """
    with TemporaryDirectory() as scratch:
        processor, config = make_processor(Path(scratch) / "model")
        convert(write_mix(Path(scratch) / "data", count), Path(scratch) / "shards", processor)
        settings = DataConfig(str(Path(scratch) / "shards"), [Bucket(tokens, patches)])
        data = load_training_data(settings, processor, config, batch_size=1)
        parts = measure_parts(data, processor.encode, config, tokens, patches)
        cpu = sum(parts.values())
        wall = {number: measure_whole(data, number) for number in (1, threads)}
    rows = Table(title=f"A row of {tokens:,} tokens and {patches:,} patches")
    for column in ("part", "ms of one core", "share"):
        rows.add_column(column, justify="left" if column == "part" else "right")
    for name, seconds in parts.items():
        rows.add_row(name, f"{1e3 * seconds:.0f}", f"{seconds / cpu:.0%}")
    rows.add_row("together", f"{1e3 * cpu:.0f}", f"{1 / cpu:.1f} rows/s a core")
    flops = step_cost(
        ModelConfig.preset(size, dtype="bfloat16", remat="none", attention="xla"),
        "pvm",
        tokens,
        patches,
    ).step
    chips = Table(
        title=(
            f"One row of the {size} model's branch: {flops / 1e12:,.0f} TFLOP, at the chip's full"
            " peak"
        )
    )
    for column in ("chip", "ms a row", "rows/s", "host cores a chip"):
        chips.add_column(column, justify="left" if column == "chip" else "right")
    for chip in CHIPS:
        peak = peak_flops(chip)
        assert peak is not None
        seconds = flops / peak
        chips.add_row(chip, f"{1e3 * seconds:.0f}", f"{1 / seconds:.2f}", f"{cpu / seconds:.2f}")
    console = Console(width=130)
    console.print(data.report, rows, chips)
    row = Batch.empty(config, rows=1, length=tokens, patches=patches)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(row))
    floats = patches * config.vision.patch_dim * np.dtype(np.float32).itemsize
    print(
        f"a row is {held / 1e6:.1f} MB, of which {row.patches.nbytes / 1e6:.1f} MB are its patches:"
        f" with both frames as float32 these would be {floats / 1e6:.1f} MB"
    )
    print(
        f"{threads} threads read {wall[1] / wall[threads]:.1f} times as many rows a second as one,"
        " on this machine"
    )


def measure_parts(
    data: TrainingData,
    encode: Callable,
    config: ModelConfig,
    tokens: int,
    patches: int,
    rows: int = 20,
) -> dict[str, float]:
    """Seconds of one core a row: reading records, encoding them (decode, resize, normalize,
    tokenize), laying out arrays."""
    parts = "read from shards", "decode, resize, tokenize", "pack into arrays"
    spent = np.zeros(len(parts))
    rows = min(rows, len(data.batches))
    for step in range(rows):
        (row,) = data.plan.rows(step)
        before = time.process_time()
        conversations = [data.sources[0][example] for example in row]
        read = time.process_time()
        examples = [encode(conversation) for conversation in conversations]
        encoded = time.process_time()
        Batch.from_rows([examples], config, length=tokens, patches=patches)
        spent += np.diff([before, read, encoded, time.process_time()])
    return dict(zip(parts, (spent / rows).tolist(), strict=True))


def measure_whole(data: TrainingData, threads: int) -> float:
    """Seconds a row of the iterator that training reads, with this many threads."""
    batches = data.iterator(0, threads, prefetch=threads)
    next(batches)
    start, rows = time.perf_counter(), sum(1 for _ in batches)
    return (time.perf_counter() - start) / rows


if __name__ == "__main__":
    run_as_command(main)
