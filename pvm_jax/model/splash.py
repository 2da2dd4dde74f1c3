"""Attention on a TPU: JAX's splash kernel, which is told which blocks of queries and keys meet.

`make_splash_mha`, the kernel's usual door, writes its lists of blocks while a program is traced;
which segments a row has is known when it runs. So the kernel is made here, with lists of arrays.
JAX promises nothing of `SplashAttentionKernel` and `MaskInfo`: should tests/pvm_jax/test_splash.py
fail with a later JAX, `make_splash_mha` with a CausalMask or a FullMask, vmapped over rows, gives
the same numbers without limits, and skips nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.sharding import PartitionSpec

from pvm_jax.sharding import partition_spec

LANES = 128  # of a TPU's register: the kernel wants heads and sequences in multiples of them

_BLOCK = 512


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
    q, q_segment_ids = _pad(q), _pad_to_lanes(q_segment_ids, 1)
    k, v, kv_segment_ids = _pad(k), _pad(v), _pad_to_lanes(kv_segment_ids, 1)
    arrays = [q, k, v, q_segment_ids, kv_segment_ids]
    if last is not None:
        arrays.append(_pad_to_lanes(last, 1))

    def local(q, k, v, q_segment_ids, kv_segment_ids, last=None):
        return _of_one_device(q, k, v, q_segment_ids, kv_segment_ids, last, interpret)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        q_spec = partition_spec(("batch", "length", "heads", "head_dim"), q.shape, mesh)
        kv_spec = partition_spec(("batch", "length", "kv_heads", "head_dim"), k.shape, mesh)
        if (
            kv_spec[2] is None
        ):  # the table could not split the key heads: whole on every device, and so are the queries
            q_spec = PartitionSpec(q_spec[0])
        rows = [PartitionSpec(q_spec[0])] * (len(arrays) - 3)
        specs = (q_spec, kv_spec, kv_spec, *rows)
        local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)
    return local(*arrays)[:, :length, :, :head_dim]


def block_length(length: int) -> int:
    """Of the kernel's blocks of a padded sequence."""
    return math.gcd(length, _BLOCK)


def meeting_blocks(
    q_segment_ids: jax.Array, kv_segment_ids: jax.Array, last: jax.Array | None
) -> jax.Array:
    """[B, S / block, T / block], True where a query may see a key: all blocks in which one does,
    and none beside them where the ids of each row rise. Arguments as of `splash_attention`, padded.
    """
    q_ids, kv_ids = _in_blocks(q_segment_ids), _in_blocks(kv_segment_ids)
    (q_low, q_high), (kv_low, kv_high) = _range(q_ids), _range(kv_ids)
    meet = (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])
    if last is not None:
        ends = jnp.where(q_ids > 0, _in_blocks(last), -1).max(-1)
        starts = jnp.arange(kv_ids.shape[1]) * kv_ids.shape[2]
        meet &= starts <= ends[:, :, None]
    return meet


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
    meet = _with_one(meeting_blocks(q_segment_ids, kv_segment_ids, last))
    ends = None
    if last is not None:
        ends = (last + jnp.arange(k.shape[0])[:, None] * k.shape[1]).reshape(-1)
    of_queries, of_keys = _of_queries(meet, ends), _of_keys(meet, ends)
    attend = splash.SplashAttentionKernel(
        of_queries,
        of_queries,
        of_keys,
        block_sizes=_block_sizes(block_length(q.shape[1]), block_length(k.shape[1])),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
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


def _in_blocks(x: jax.Array) -> jax.Array:
    """[B, S] -> [B, S / block, block]."""
    return x.reshape(x.shape[0], -1, block_length(x.shape[1]))


def _range(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest id of each block, [B, S / block]; of padding alone, a range that
    meets none."""
    return jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min(-1), ids.max(-1)


def _pad(x: jax.Array) -> jax.Array:
    return _pad_to_lanes(_pad_to_lanes(x, 1), 3)


def _pad_to_lanes(x: jax.Array, axis: int) -> jax.Array:
    """Zeros to the next multiple of 128: zero head dimensions change no product, segment 0 is
    padding."""
    missing = -x.shape[axis] % LANES
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _block_sizes(q: int, kv: int) -> splash.BlockSizes:
    return splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )
