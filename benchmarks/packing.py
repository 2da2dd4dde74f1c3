"""Share of padding with and without packing, on conversations about real and synthetic images, and
how long a plan takes.

    python -m benchmarks.packing
    python -m benchmarks.packing --checkpoint checkpoints/8b \
        --data '{sources: data/train.jsonl, buckets: [{tokens: 8192, patches: 8192}]}'
"""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.table import Table

from demo.mixed_images import BUCKETS, make_processor, write_mix
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.processor import Processor
from pvm_jax.options import run_as_command
from train.config import Bucket, DataConfig
from train.data.packing import make_plan, padding, padding_of_single_examples
from train.data.sizes import measure

MANY = 500_000
COLUMNS = ("buckets", "", "rows", "examples a row", "padding, tokens", "padding, patches")
COLUMNS += ("in no row",)


def main(
    data: DataConfig | None = None,
    checkpoint: str | None = None,
    count: int = 500,
    batch_size: int = 4,
) -> None:
    """Prints a table.

    Args:
        data: sources and buckets (default: `count` conversations made from what scikit-image and
            scikit-learn ship).
        checkpoint: whose tokenizer and image settings measure (default: the demo's tokenizer, the
            published image settings).
        count: conversations of the default data.
        batch_size: rows of a batch.
    """
    data, sizes = _measured(data, checkpoint, count)
    buckets = sorted(data.buckets, key=lambda bucket: (bucket.tokens, bucket.patches))
    table = Table(
        title=(
            f"{len(sizes):,} conversations, {sizes[:, 1].sum() / sizes[:, 0].sum():.2f} patches a"
            " token"
        )
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    for choice in (buckets, buckets[-1:]):
        for cells in _lines(sizes, choice, batch_size):
            table.add_row(*cells)
    Console(width=150).print(table)
    many = sizes[np.random.default_rng(0).integers(len(sizes), size=MANY)]
    start = time.process_time()
    make_plan(
        many, [np.arange(MANY, dtype=np.int32)], data.buckets, batch_size=64, packing=True, seed=0
    )
    print(
        f"A plan of {MANY:,} examples of these sizes: {time.process_time() - start:.1f} s of one"
        " core"
    )


def _measured(
    data: DataConfig | None, checkpoint: str | None, count: int
) -> tuple[DataConfig, np.ndarray]:
    """The data, and (tokens, patches) of their conversations, [N, 2]."""
    with TemporaryDirectory() as scratch:
        processor = (
            Processor.from_pretrained(checkpoint)
            if checkpoint
            else make_processor(Path(scratch) / "model")[0]
        )
        if data is None:
            data = DataConfig(str(write_mix(Path(scratch) / "data", count)), BUCKETS)
        sources = [open_conversations(source.path) for source in data.mixture]
        return data, np.concatenate(
            [
                measure(source, processor.count, data.threads, videos=data.videos)
                for source in sources
            ]
        )


def _lines(sizes: np.ndarray, buckets: Sequence[Bucket], batch_size: int) -> list[list[str]]:
    """The table's two lines for these buckets, smallest first: an example a row, and packed."""
    name = ", ".join(f"{bucket.tokens} + {bucket.patches}" for bucket in buckets)
    single, order = (
        padding_of_single_examples(sizes, buckets),
        np.arange(len(sizes), dtype=np.int32),
    )
    plan = make_plan(sizes, [order], buckets, batch_size=batch_size, packing=True, seed=0)
    if not len(plan):
        raise ValueError(f"{len(sizes)} conversations fill no batch of {batch_size} rows of {name}")
    packed, rows = padding(plan, sizes, buckets), len(plan) * batch_size
    held = int((sizes <= [buckets[-1].tokens, buckets[-1].patches]).all(1).sum())
    alone = [f"{held}", "1.0", f"{single.tokens:.1%}", f"{single.patches:.1%}", ""]
    together = [
        f"{rows}",
        f"{len(plan.examples) / rows:.1f}",
        f"{packed.tokens:.1%}",
        f"{packed.patches:.1%}",
        f"{len(sizes) - len(plan.examples)}",
    ]
    return [[name, "one example a row", *alone], ["", "packed", *together]]


if __name__ == "__main__":
    run_as_command(main)
