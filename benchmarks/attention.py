"""Attention's kernels against each other on the accelerator at hand, in bfloat16: rows of one
segment and of several, with padding before and behind them.

"needed" is what the pairs of a query and a key that see each other take, forward: of TFLOP/s, what
a kernel reaches of it. "error" is the distance to XLA's in float32, over its norm: of the values,
and the largest of the three gradients.

    python -m benchmarks.attention
    python -m benchmarks.attention --size 4b --tokens 4096 --patches 8192
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.device import best
from benchmarks.sizes import config_of
from pvm_jax.model.attention_kernels import attention
from pvm_jax.options import run_as_command

COLUMNS = ("forward: ms", "TFLOP/s needed", "with gradients: ms", "temporary")
COLUMNS += ("error", "gradients'")
PADDING = 64
"""One of so many columns is before a row's segments, and one behind them."""


class Case(NamedTuple):
    """`heads`: of the queries, of the keys, and how wide they are; `lengths` of a row: likewise."""

    name: str
    heads: tuple[int, int, int]
    lengths: tuple[int, int]
    causal: bool


def main(
    size: str = "8b",
    tokens: int = 8192,
    patches: int = 16384,
    rows: int = 1,
    segments: Sequence[int] = (1, 8, 20),
) -> None:
    """Prints a table.

    Args:
        size: whose heads: 2b, 4b, 8b, 32b, or "small".
        tokens: of the decoder's and the branch's rows.
        patches: of the tower's rows; a quarter as many are the branch's keys.
        rows: of a batch.
        segments: of a row.
    """
    config = config_of(size)
    text, vision = config.text, config.vision
    decoder = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    tower = vision.num_heads, vision.num_heads, vision.head_dim
    branch = text.pvm_num_heads, text.pvm_num_key_value_heads, text.head_dim
    cases = [
        Case("decoder", decoder, (tokens, tokens), causal=True),
        Case("tower", tower, (patches, patches), causal=False),
        Case("branch", branch, (tokens, patches // 4), causal=False),
    ]
    table = Table(title=f"{size}, {rows} x {tokens} and {patches}, {jax.devices()[0].device_kind}")
    for column in ("attention", "segments", "kernel"):
        table.add_column(column)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for case in cases:
        for count in segments:
            for kernel, cells in compare(case, rows, count):
                table.add_row(case.name, str(count), kernel, *cells)
            table.add_section()
    Console(width=130).print(table)


def kernels(no_limits: jax.Array) -> dict[str, dict[str, Any]]:
    """Those of this platform: what `attention` is told. cuDNN computes in pieces where there are
    limits, also such as limit nothing."""
    own = {
        "tpu": {"splash": {"kernel": "splash"}},
        "gpu": {
            "cuDNN": {"kernel": "cudnn"},
            "cuDNN, in pieces": {"kernel": "cudnn", "limits": no_limits},
        },
    }
    return own.get(jax.default_backend(), {}) | {"XLA": {"kernel": "xla"}}


def compare(case: Case, rows: int, count: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields each kernel's name and its cells."""
    rng = np.random.default_rng(0)
    ids = [ids_of(rows, length, count) for length in case.lengths]
    heads, kv_heads, head_dim = case.heads
    queries, keys = ((length, n) for length, n in zip(case.lengths, (heads, kv_heads), strict=True))
    arrays = [
        jnp.asarray(rng.standard_normal((rows, *shape, head_dim)), jnp.bfloat16)
        for shape in (queries, keys, keys, queries)  # the last: the gradient of what is attended to
    ]
    sizes = (np.bincount(each[0])[1:].tolist() for each in ids)
    pairs = sum(q * k for q, k in zip(*sizes, strict=True)) * rows
    flops = 4 * pairs * heads * head_dim / (2 if case.causal else 1)
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in arrays]
        want = jax.jit(partial(both, case, ids, {"kernel": "xla"}))(*wide)
    for name, how in kernels(jnp.full(ids[0].shape, case.lengths[1])).items():
        forward, _, _ = timed(partial(values, case, ids, how), *arrays[:3])
        whole, temporary, got = timed(partial(both, case, ids, how), *arrays)
        off = [float(distance(*pair)) for pair in zip(got, want, strict=True)]
        yield (
            name,
            (
                f"{forward * 1e3:.2f}",
                f"{flops / forward / 1e12:.0f}",
                f"{whole * 1e3:.2f}",
                f"{temporary / 2**30:.2f} GiB",
                f"{off[0]:.1e}",
                f"{max(off[1:]):.1e}",
            ),
        )


def ids_of(rows: int, length: int, count: int) -> np.ndarray:
    """[rows, length] of `count` segments of about one length, and padding.

    Raises:
        ValueError: if there are fewer columns than segments.
    """
    padding = length // PADDING
    columns = length - 2 * padding
    if columns < count:
        raise ValueError(f"a row of {length} columns has no room for {count} segments")
    numbers = np.arange(columns) * count // columns + 1
    return np.tile(np.pad(numbers, padding), (rows, 1)).astype(np.int32)


def values(case: Case, ids: list[np.ndarray], how: dict[str, Any], *qkv: jax.Array) -> jax.Array:
    q_ids, kv_ids = map(jnp.asarray, ids)
    kv_ids = q_ids if case.causal else kv_ids
    out = attention(*qkv, q_segment_ids=q_ids, kv_segment_ids=kv_ids, causal=case.causal, **how)
    return jnp.where((q_ids > 0)[..., None, None], out, 0)


def both(case: Case, ids: list[np.ndarray], how: dict[str, Any], *arrays: jax.Array) -> Any:
    """Values, and the gradients of q, k and v by the last of `arrays`."""
    *qkv, gradient = arrays
    out, pull = jax.vjp(partial(values, case, ids, how), *qkv)
    return out, *pull(gradient)


def timed(compute: Callable[..., Any], *arrays: jax.Array) -> tuple[float, int, Any]:
    """Seconds of one run, five at a time, bytes of temporaries, and what came out."""
    compiled = jax.jit(compute).lower(*arrays).compile()

    def five() -> None:
        jax.block_until_ready([compiled(*arrays) for _ in range(5)][-1])

    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else 0
    return best(five) / 5, temporary, compiled(*arrays)


def distance(got: jax.Array, want: jax.Array) -> jax.Array:
    return jnp.linalg.norm((got - want).astype(jnp.float32)) / jnp.linalg.norm(want)


if __name__ == "__main__":
    run_as_command(main)
