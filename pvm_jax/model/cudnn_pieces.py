"""Attention on a GPU: cuDNN's kernel for one piece of a row's queries after another, each against
the keys from the first to the last that it may see.

`jax.nn.dot_product_attention` takes a mask and no segments: of a whole row that would be [S, T],
and nothing would be skipped.
"""

from functools import partial
from itertools import takewhile
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pvm_jax.model.blocks import LANES, meeting_blocks, on_each_device, pad_to_multiple

Implementation = Literal["xla", "cudnn"]

PIECE = 1024
"""Queries that are computed together, at most."""
BLOCK = 512
"""Columns by which what a piece may see is rounded up, at most; divides a piece."""


class _Piece(NamedTuple):
    """Queries of one row.

    Attributes:
        q: [piece, N, H].
        segment_ids: [piece].
        last: [piece], the last column whose key each may see.
        row: [].
        first: [], the first column with a key that one of them may see.
        size: [], which of `key_sizes` it takes from there.
    """

    q: jax.Array
    segment_ids: jax.Array
    last: jax.Array
    row: jax.Array
    first: jax.Array
    size: jax.Array


def pieces_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    last: jax.Array | None,
    *,
    scale: float,
    interpret: bool,
) -> jax.Array:
    """Each device's own rows and heads, by the mesh that is set; arguments as of `attention`.

    Args:
        last: [B, S], the last column whose key a query sees; None: it sees all of its segment.
        interpret: has XLA compute what cuDNN would.
    """
    length = q.shape[1]
    if last is None:
        last = jnp.full(q_segment_ids.shape, k.shape[1] - 1)
    piece = piece_length(length)
    q, q_segment_ids, last = (pad_to_multiple(x, 1, piece) for x in (q, q_segment_ids, last))
    k, v, kv_segment_ids = (pad_to_multiple(x, 1) for x in (k, v, kv_segment_ids))
    local = partial(_of_one_device, scale=scale, implementation="xla" if interpret else "cudnn")
    return on_each_device(local, q, k, v, q_segment_ids, kv_segment_ids, last)[:, :length]


def piece_length(length: int) -> int:
    """Of the pieces of a row, the last of which may be padded."""
    return min(length + -length % LANES, PIECE)


def key_sizes(keys: int) -> list[int]:
    """Numbers of columns that a piece may be computed against, of `keys` in a row: a third to a
    half more each time, since each is a program. 0 is for padding, which sees none."""
    steps = (PIECE * more // 4 << n for n in range(keys.bit_length()) for more in (2, 3))
    return [0, *takewhile(lambda size: size < keys, steps), keys]


def seen_keys(
    q_segment_ids: jax.Array, kv_segment_ids: jax.Array, last: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Of each piece, [B, S / piece]: the first column with a key that one of its queries may see,
    and which of `key_sizes` reaches from there to the last. Arguments as of `pieces_attention`,
    padded."""
    (rows, length), keys = q_segment_ids.shape, kv_segment_ids.shape[1]
    meet = meeting_blocks(q_segment_ids, kv_segment_ids, last, BLOCK)
    blocks = meet.shape[2]
    meet = meet.reshape(rows, length // piece_length(length), -1, blocks).any(2)
    first, behind = jnp.argmax(meet, -1), jnp.argmax(meet[..., ::-1], -1)
    count = jnp.where(meet.any(-1), blocks - behind - first, 0) * (keys // blocks)
    return first * (keys // blocks), jnp.searchsorted(jnp.array(key_sizes(keys)), count)


def _of_one_device(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    last: jax.Array,
    *,
    scale: float,
    implementation: Implementation,
) -> jax.Array:
    rows, piece = len(q), piece_length(q.shape[1])
    against = [
        partial(_against, k, v, kv_segment_ids, size, scale, implementation)
        for size in key_sizes(k.shape[1])
    ]

    @jax.checkpoint  # or else every piece would keep its keys and values for the backward pass
    def attend(one: _Piece) -> jax.Array:
        return jax.lax.switch(one.size, against, one)

    first, size = seen_keys(q_segment_ids, kv_segment_ids, last)
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], first.shape)
    in_pieces = (x.reshape(-1, piece, *x.shape[2:]) for x in (q, q_segment_ids, last))
    pieces = _Piece(*in_pieces, *(x.reshape(-1) for x in (row, first, size)))
    return jax.lax.map(attend, pieces).reshape(q.shape)


def _against(
    k: jax.Array,
    v: jax.Array,
    kv_segment_ids: jax.Array,
    size: int,
    scale: float,
    implementation: Implementation,
    one: _Piece,
) -> jax.Array:
    """[piece, N, H], of `size` columns that hold all that the piece may see."""
    if size == 0:
        return jnp.zeros_like(one.q)
    first = jnp.minimum(one.first, k.shape[1] - size)
    ids, k, v = (
        jax.lax.dynamic_slice(x, (one.row, first, *(0,) * (x.ndim - 2)), (1, size, *x.shape[2:]))
        for x in (kv_segment_ids, k, v)
    )
    mask = one.segment_ids[:, None] == ids
    mask &= first + jnp.arange(size) <= one.last[:, None]
    return jax.nn.dot_product_attention(
        one.q[None], k, v, mask=mask[None, None], scale=scale, implementation=implementation
    )[0]
