"""How much of what attention's kernels compute is needed: blocks of queries and keys, on packed
rows of conversations about real and synthetic images.

"without segments": the blocks that a kernel computes which knows nothing of segments. A block is
needed where one of its queries sees one of its keys. "pairs" is the share of all pairs of a query
and a key in the computed blocks that see each other: the rest is lost at the blocks' edges; "pairs
in pieces" is that share where cuDNN computes in pieces of a row's queries. The others are the
TPU's.

    python -m benchmarks.attention_blocks
    python -m benchmarks.attention_blocks --tokens 16384 --patches 20480
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from demo.mixed_images import make_processor, write_mix
from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.example import Example
from pvm_jax.model.blocks import block_length, meeting_blocks, pad_to_multiple
from pvm_jax.model.cudnn_pieces import key_sizes, piece_length, seen_keys
from pvm_jax.model.splash import BLOCK, pad_to_blocks
from pvm_jax.options import run_as_command
from train.config import Bucket
from train.data.packing import make_plan

TOGETHER = 8
"""Examples, each with one image, of the rows that are put together by number."""
STEPS = BLOCK, 4 * BLOCK
"""Of which the tokens and patches of those rows are multiples."""
COLUMNS = ("rows", "attention", "without segments", "computed", "needed")
COLUMNS += ("computed / needed", "pairs", "pairs in pieces")


def main(tokens: int = 8192, patches: int = 10240, count: int = 200) -> None:
    """Prints a table.

    Args:
        tokens: of a packed row, a multiple of 128.
        patches: of a packed row, a multiple of 512.
        count: conversations.
    """
    table = Table()
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    for name, rows in mixed_rows(count, tokens, patches).items():
        for attention, counts in _counts(rows).items():
            alone, computed, needed, pairs, pieces = counts.tolist()
            table.add_row(
                name,
                attention,
                *(f"{number:,.0f}" for number in (alone, computed, needed)),
                f"{computed / needed:.2f}",
                f"{pairs / computed:.0%}",
                f"{pairs / pieces:.0%}",
            )
        table.add_section()
    Console(width=120).print(table)


def mixed_rows(count: int, tokens: int, patches: int) -> dict[str, Iterator[Batch]]:
    """Of `count` conversations about real and synthetic images: as a run packs them into rows of
    that size, and so many together."""
    with TemporaryDirectory() as scratch:
        processor, config = make_processor(Path(scratch) / "model")
        conversations = open_conversations(str(write_mix(Path(scratch) / "data", count)))
        examples = [processor.encode(conversations[i]) for i in range(len(conversations))]
    return {
        f"packed, {tokens} + {patches}": _packed(examples, config, Bucket(tokens, patches)),
        f"{TOGETHER} examples, {TOGETHER} images": _together(examples, config),
    }


def _packed(examples: list[Example], config: ModelConfig, bucket: Bucket) -> Iterator[Batch]:
    """As a run packs them."""
    sizes = np.array([_size(example) for example in examples], np.int32)
    epochs = [np.arange(len(examples), dtype=np.int32)]
    plan = make_plan(sizes, epochs, [bucket], batch_size=1, packing=True, seed=0)
    for step in range(len(plan)):
        yield _row([examples[i] for i in plan.rows(step)[0]], config, bucket.tokens, bucket.patches)


def _together(examples: list[Example], config: ModelConfig) -> Iterator[Batch]:
    one_image = [e for e in examples if e.image_grid_thw is not None and len(e.image_grid_thw) == 1]
    for start in range(0, len(one_image) - TOGETHER + 1, TOGETHER):
        some = one_image[start : start + TOGETHER]
        lengths = np.sum([_size(example) for example in some], 0)
        yield _row(some, config, *(-(-lengths // STEPS) * STEPS).tolist())


def _row(examples: Sequence[Example], config: ModelConfig, length: int, patches: int) -> Batch:
    return Batch.from_rows([list(examples)], config, length=length, patches=patches)


def _size(example: Example) -> tuple[int, int]:
    pixels = example.pixel_values
    return len(example.input_ids), 0 if pixels is None else len(pixels)


def _counts(rows: Iterator[Batch]) -> dict[str, np.ndarray]:
    """Of each attention: blocks without segments, blocks computed, blocks needed, and in blocks'
    worth pairs and what cuDNN computes."""
    counts = {name: np.zeros(5) for name in ("tower", "decoder", "branch")}
    for batch in rows:
        text, seen, frames = (
            np.asarray(ids)
            for ids in (batch.segment_ids, batch.visual_segment_ids, batch.patch_segment_ids)
        )
        counts["tower"] += _of(frames, frames, causal=False)
        counts["decoder"] += _of(text, text, causal=True)
        counts["branch"] += _of(text, seen, causal=False)
    return counts


def _of(q_ids: np.ndarray, kv_ids: np.ndarray, *, causal: bool) -> np.ndarray:
    """Of one row, [1, S] and [1, T]."""
    q, kv = pad_to_blocks(jnp.asarray(q_ids)), pad_to_blocks(jnp.asarray(kv_ids))
    q_ids, kv_ids = np.asarray(q), np.asarray(kv)
    last = jnp.arange(q.shape[1])[None] if causal else None
    computed = np.asarray(meeting_blocks(q, kv, last, BLOCK))[0]
    alone = np.asarray(meeting_blocks(jnp.ones_like(q), jnp.ones_like(kv), last, BLOCK))
    sides = tuple(block_length(ids.shape[1], BLOCK) for ids in (q_ids, kv_ids))
    needed, pairs = np.zeros_like(computed), 0
    for segment in set(q_ids[q_ids > 0].tolist()):
        columns, keys = (np.flatnonzero(ids[0] == segment) for ids in (q_ids, kv_ids))
        if not keys.size:
            continue
        for i, j in product(set(columns // sides[0]), set(keys // sides[1])):
            latest = columns[columns // sides[0] == i].max()
            needed[i, j] |= not causal or keys[keys // sides[1] == j].min() <= latest
        pairs += sum(range(len(keys) + 1)) if causal else len(columns) * len(keys)
    piece = piece_length(q_ids.shape[1])
    ends = None if last is None else pad_to_multiple(last, 1, piece)
    _, sizes = seen_keys(pad_to_multiple(q, 1, piece), kv, ends)
    taken = np.array(key_sizes(kv_ids.shape[1]))[sizes]
    in_pieces = piece * taken.sum()
    worth = np.array([pairs, in_pieces]) / np.prod(sides)
    return np.array([alone.sum(), computed.sum(), needed.sum(), *worth])


if __name__ == "__main__":
    run_as_command(main)
