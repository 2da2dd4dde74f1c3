"""What attention's kernels have in common: which blocks of queries and keys meet, and what of them
each device has."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pvm_jax.sharding import partition_spec

ATTENDED = "attended"
"""How checkpoint policies name what a kernel gave."""
LANES = 128  # of a TPU's register: kernels want sequences, splash heads too, in multiples of them


def block_length(length: int, most: int) -> int:
    """Of the blocks of a padded sequence, `most` where that divides it."""
    return math.gcd(length, most)


def meeting_blocks(
    q_segment_ids: jax.Array, kv_segment_ids: jax.Array, last: jax.Array | None, most: int
) -> jax.Array:
    """[B, S / block, T / block], True where a query may see a key: all blocks in which one does,
    and none beside them where the ids of each row rise. `most`: as of `block_length`, the others
    as of `splash_attention`, padded."""
    q_ids, kv_ids = _in_blocks(q_segment_ids, most), _in_blocks(kv_segment_ids, most)
    (q_low, q_high), (kv_low, kv_high) = _range(q_ids), _range(kv_ids)
    meet = (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])
    if last is not None:
        ends = jnp.where(q_ids > 0, _in_blocks(last, most), -1).max(-1)
        starts = jnp.arange(kv_ids.shape[1]) * kv_ids.shape[2]
        meet &= starts <= ends[:, :, None]
    return meet


def pad_to_multiple(x: jax.Array, axis: int, of: int = LANES) -> jax.Array:
    """Zeros to the next multiple: zero head dimensions change no product, segment 0 is padding."""
    missing = -x.shape[axis] % of
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def on_each_device(
    attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, *rows: jax.Array
) -> jax.Array:
    """`attend` of each device's own rows and heads, by the mesh that is set.

    Args:
        q: [B, S, N, H].
        k, v: [B, T, K, H].
        rows: [B, S] or [B, T].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        q_spec = partition_spec(("batch", "length", "heads", "head_dim"), q.shape, mesh)
        kv_spec = partition_spec(("batch", "length", "kv_heads", "head_dim"), k.shape, mesh)
        if (
            kv_spec[2] is None
        ):  # the table could not split the key heads: whole on every device, and so are the queries
            q_spec = PartitionSpec(q_spec[0])
        specs = (q_spec, kv_spec, kv_spec, *[PartitionSpec(q_spec[0])] * len(rows))
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)
    return attend(q, k, v, *rows)


def _in_blocks(x: jax.Array, most: int) -> jax.Array:
    """[B, S] -> [B, S / block, block]."""
    return x.reshape(x.shape[0], -1, block_length(x.shape[1], most))


def _range(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest id of each block, [B, S / block]; of padding alone, a range that
    meets none."""
    return jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min(-1), ids.max(-1)
