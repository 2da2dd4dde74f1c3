"""Attention on a TPU: JAX's splash kernel, which is told which blocks of queries and keys meet.

`make_splash_mha`, the kernel's usual door, writes its lists of blocks while a program is traced;
which segments a row has is known when it runs. So the kernel is made here, with lists of arrays.
JAX promises nothing of `SplashAttentionKernel` and `MaskInfo`: should
tests/pvm_jax/test_segments.py fail with a later JAX, `make_splash_mha` with a CausalMask or a
FullMask, vmapped over rows, gives the same numbers without limits, and skips nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from pvm_jax.model.blocks import (
    ATTENDED,
    LANES,
    block_length,
    meeting_blocks,
    on_each_device,
    pad_to_multiple,
)
from pvm_jax.sharding import device_kind

BLOCK, KEYS_AT_ONCE = 1024, 512
"""Queries, and keys, of a block at most, and how many of its keys the kernel takes at once. By
libtpu's schedules of the kernels these cost least of what was tried (docs/performance.md)."""
LEAST = 512
"""Sequences are padded to blocks of this length, shorter ones to a power of two: blocks of 128 in
place of 512 cost six to nine times as much (benchmarks.tpu_attention), padding is not computed."""
BY_COLUMN = ("TPU v6 lite",)
"""Chips on which a head of q, k and v lies [H, length] in memory. There the compiler writes it so
as fast as it multiplies, norm over H included; the other way takes passes of its own. The kernel
turns q round block by block, in a fraction of their time. Not so a cache's keys, for many queries
to come: they lie as they are kept, and would be copied for each piece of a prompt."""


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    last: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    """Each device's own rows and heads, by the mesh that is set; arguments as of `attention`.

    Args:
        q: [B, S, N, H], scaled.
        last: [B, S], the last column whose key a query sees; None: it sees all of its segment.
    """
    length, head_dim = q.shape[1], q.shape[-1]
    q, k, v = (pad_to_multiple(pad_to_blocks(x), 3) for x in (q, k, v))
    arrays = [q, k, v, pad_to_blocks(q_segment_ids), pad_to_blocks(kv_segment_ids)]
    if last is not None:
        arrays.append(pad_to_blocks(last))

    def local(q, k, v, q_segment_ids, kv_segment_ids, last=None):
        return _of_one_device(q, k, v, q_segment_ids, kv_segment_ids, last, interpret)

    return on_each_device(local, *arrays)[:, :length, :, :head_dim]


def pad_to_blocks(x: jax.Array) -> jax.Array:
    """[B, S, ...], S as the kernel has it."""
    power = 1 << (x.shape[1] - 1).bit_length()
    return pad_to_multiple(x, 1, min(max(LANES, power), LEAST))


def fetched_blocks(meet: jax.Array, axis: int) -> jax.Array:
    """What the kernel holds at each block along `axis` of `meeting_blocks`: the next one that is
    computed, itself included; behind the last one that one. It is fetched ahead, and once where it
    is named several times in turn."""
    count = meet.shape[axis]
    index = jax.lax.broadcasted_iota(jnp.int32, meet.shape, axis)
    after = jax.lax.cummin(jnp.where(meet, index, count), axis, reverse=True)
    last = jnp.where(meet, index, 0).max(axis, keepdims=True)
    return jnp.where(after < count, after, last)


def _of_one_device(q, k, v, q_segment_ids, kv_segment_ids, last, interpret: bool) -> jax.Array:
    """The kernel knows no batch, and vmap would make a loop of it: the rows stand one after another
    in one sequence, and its lists name the blocks of a row alone."""
    meet = _with_one(meeting_blocks(q_segment_ids, kv_segment_ids, last, BLOCK))
    ends = None
    if last is not None:
        ends = (last + jnp.arange(k.shape[0])[:, None] * k.shape[1]).reshape(-1)
    of_queries, of_keys = _of_queries(meet, ends), _of_keys(meet, ends)
    attend = splash.SplashAttentionKernel(
        of_queries,
        of_queries,
        of_keys,
        block_sizes=_block_sizes(q.shape[1], k.shape[1]),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=ATTENDED,
        mask_function=None if ends is None else _not_after,
        interpret=interpret,
    )
    by_head = [jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, x.shape[3]) for x in (q, k, v)]
    ids = splash.SegmentIds(q_segment_ids.reshape(-1), kv_segment_ids.reshape(-1))
    out: Any = attend(*by_head, ids)
    return jnp.moveaxis(out.reshape(q.shape[2], *q.shape[:2], q.shape[3]), 0, 2)


def _with_one(meet: jax.Array) -> jax.Array:
    """A block of queries that meets no keys is computed against one block nevertheless, its own
    where there is one: the kernel would divide 0 by 0."""
    queries, keys = (jax.lax.broadcasted_iota(jnp.int32, meet.shape, axis) for axis in (1, 2))
    own = keys == jnp.minimum(queries, meet.shape[2] - 1)
    return meet | (own & ~meet.any(-1, keepdims=True))


def _of_queries(meet: jax.Array, ends: jax.Array | None) -> MaskInfo:
    """Of a block of queries, the blocks of keys, [1, B * S / block, T / block]."""
    rows, _, columns = meet.shape
    following = fetched_blocks(meet, 2) + columns * jnp.arange(rows)[:, None, None]
    return _mask_info(
        meet.reshape(1, -1, columns), following.reshape(1, -1, columns), rows * columns, ends
    )


def _of_keys(meet: jax.Array, ends: jax.Array | None) -> MaskInfo:
    """Of a block of keys, the blocks of queries, [1, S / block, B * T / block]."""
    rows, length, _ = meet.shape
    following = fetched_blocks(meet, 1) + length * jnp.arange(rows)[:, None, None]
    meet, following = (jnp.moveaxis(x, 1, 0).reshape(1, length, -1) for x in (meet, following))
    return _mask_info(meet, following, rows * length, ends)


def _mask_info(
    meet: jax.Array, following: jax.Array, blocks: int, ends: jax.Array | None
) -> MaskInfo:
    """The lists lie in scalar memory, which is small."""
    short = blocks <= jnp.iinfo(jnp.int16).max
    arrays: dict[str, Any] = {  # MaskInfo's annotations know NumPy's alone
        "data_next": following.astype(jnp.int16 if short else jnp.int32),
        "block_mask": meet.astype(jnp.int8),
        "q_sequence": ends,
    }
    return MaskInfo(mask_next=None, partial_mask_blocks=None, **arrays)


def _not_after(last: jax.Array, column: jax.Array) -> jax.Array:
    return column <= last


def _block_sizes(length: int, kv_length: int) -> splash.BlockSizes:
    q, kv = block_length(length, BLOCK), block_length(kv_length, BLOCK)
    part = math.gcd(kv, KEYS_AT_ONCE)
    by_column = device_kind() in BY_COLUMN and length == kv_length
    layout = splash.QKVLayout.SEQ_MINOR if by_column else splash.QKVLayout.HEAD_DIM_MINOR
    return splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=part,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=part,
        block_q_dq=q,
        block_kv_dq=kv,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
