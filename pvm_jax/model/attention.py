"""One door to attention. Which kernel stands behind it depends on the platform; all compute the
same numbers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from pvm_jax.sharding import partition_spec

KERNELS = ("xla", "splash", "cudnn")

_LANES = 128  # splash wants heads and sequences in multiples of a TPU register's lanes


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    causal: bool,
    limits: jax.Array | None = None,
    kernel: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v among equal segment ids; the softmax is float32.

    Args:
        q: [B, S, N, H].
        k, v: [B, T, K, H] with N a multiple of K (grouped queries).
        q_segment_ids, kv_segment_ids: [B, S] and [B, T]; a query sees the keys that carry its own
            id.
        causal: a query at column s sees keys at columns <= s only.
        limits: [B, S]: a query sees keys at columns below its limit only.
        kernel: "splash" (TPU, no limits), "cudnn" (GPU, H <= 128), "xla" (everywhere: the
            reference) or None: by platform.
        interpret: runs the TPU kernel in its interpreter, for tests.

    Returns:
        [B, S, N, H]. For a query that sees no key at all the result is finite and means nothing:
        mask it.

    Raises:
        ValueError: for an unknown kernel, and for limits with "splash".
    """
    if kernel is None:
        kernel = _platform_kernel(q, limits is not None)
    if kernel == "xla":
        return _xla(
            q, k, v, attention_mask(q_segment_ids, kv_segment_ids, causal=causal, limits=limits)
        )
    if kernel == "cudnn":
        mask = attention_mask(q_segment_ids, kv_segment_ids, causal=causal, limits=limits)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    if kernel == "splash":
        if limits is not None:
            raise ValueError(
                "the splash kernel cannot end each query's keys at a limit of its own, which"
                " chunked prefill and pvm_visibility 'preceding' ask for: leave attention at None"
                " (by platform), or set it to 'xla'"
            )
        return _splash(q, k, v, q_segment_ids, kv_segment_ids, causal, interpret)
    raise ValueError(f"unknown attention kernel {kernel!r}; there are {', '.join(KERNELS)}")


def shared_attention(
    q: jax.Array,
    shared: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array],
    *,
    shared_mask: jax.Array,
    own_mask: jax.Array,
) -> jax.Array:
    """One softmax over keys that a row's samples share, keys that each of them has for itself,
    and its newest: a decoding step.

    Args:
        q: [B, samples, N, H], whose samples do not see each other.
        shared: keys and values [B, K, T, H].
        own: keys and values [B, K, samples, written, H].
        new: key and value [B, K, samples, H] of the query's own token.
        shared_mask: [B, samples, T], own_mask: broadcastable to [B, samples, written], True where
            the query may look.

    Returns:
        [B, samples, N, H].
    """
    # [B, K, samples, N / K, H]: batch axes lead in one order in all operands, so that no product
    # wants keys or values copied.
    grouped = q.reshape(*q.shape[:2], shared[0].shape[1], -1, q.shape[-1]).swapaxes(1, 2)
    scores = [
        jnp.einsum("bkngh,bkth->bkngt", grouped, shared[0], preferred_element_type=jnp.float32),
        jnp.einsum("bkngh,bknth->bkngt", grouped, own[0], preferred_element_type=jnp.float32),
        jnp.einsum("bkngh,bknh->bkng", grouped, new[0], preferred_element_type=jnp.float32)[
            ..., None
        ],
    ]
    masks = [
        jnp.broadcast_to(mask, (*q.shape[:2], mask.shape[-1]))
        for mask in (shared_mask, own_mask, jnp.array([True]))
    ]
    mask = jnp.concatenate(masks, -1)[:, None, :, None]
    weights = jax.nn.softmax(
        _masked(jnp.concatenate(scores, -1) * q.shape[-1] ** -0.5, mask), -1
    ).astype(q.dtype)
    of_shared, of_own, of_new = jnp.split(
        weights, [shared_mask.shape[-1], weights.shape[-1] - 1], -1
    )
    attended = jnp.einsum(
        "bkngt,bkth->bkngh", of_shared, shared[1], preferred_element_type=jnp.float32
    )
    attended += jnp.einsum("bkngt,bknth->bkngh", of_own, own[1], preferred_element_type=jnp.float32)
    attended += of_new.astype(jnp.float32) * new[1][:, :, :, None].astype(jnp.float32)
    return attended.swapaxes(1, 2).astype(q.dtype).reshape(q.shape)


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """What `attention` weighs the values with, for those who want to see it: it holds a matrix a
    head, so give it few queries.

    Args:
        q: [B, S, N, H].
        k: [B, T, K, H].
        mask: [B, S, T], True where the query may look.

    Returns:
        [B, N, S, T] float32; 0 for a query that sees no key at all.
    """
    weights = _weights(q, k, mask)
    weights = weights.reshape(q.shape[0], q.shape[2], *weights.shape[-2:])
    return jnp.where(mask.any(-1)[:, None, :, None], weights, 0)


def attention_mask(
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    *,
    causal: bool = False,
    limits: jax.Array | None = None,
) -> jax.Array:
    """[B, S, T], True where the query may look; arguments as of `attention`."""
    mask = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    if causal:
        mask &= jnp.tri(*mask.shape[1:], dtype=bool)
    if limits is not None:
        mask &= jnp.arange(mask.shape[-1]) < limits[..., None]
    return mask


def _platform_kernel(q: jax.Array, limited: bool) -> str:
    device = (
        jax.sharding.get_abstract_mesh().abstract_device
    )  # a program may be compiled for devices that are not here
    backend = device.platform if device else jax.default_backend()
    if (
        q.shape[1] < _LANES
    ):  # a decoding step's queries: a product with few rows, which no tiled kernel speeds up
        return "xla"
    if backend == "tpu" and not limited:
        return "splash"
    if backend == "gpu" and q.dtype == jnp.bfloat16 and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0:
        return "cudnn"
    return "xla"


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.einsum("bkgst,btkh->bskgh", _weights(q, k, mask).astype(v.dtype), v).reshape(q.shape)


def _weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, K, N / K, S, T] float32."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("bskgh,btkh->bkgst", grouped, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(_masked(scores * q.shape[-1] ** -0.5, mask[:, None, None]), axis=-1)


def _masked(scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)


def _splash(q, k, v, q_segment_ids, kv_segment_ids, causal: bool, interpret: bool) -> jax.Array:
    """The Pallas kernel, which works on one row of one device: vmapped over rows, shard_mapped over
    the mesh."""
    length, head_dim = q.shape[1], q.shape[-1]
    q, q_segment_ids = _pad(q * head_dim**-0.5), _pad_to_lanes(q_segment_ids, 1)
    k, v, kv_segment_ids = _pad(k), _pad(v), _pad_to_lanes(kv_segment_ids, 1)
    shape = (q.shape[1], k.shape[1])
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)

    def local(q, k, v, q_segment_ids, kv_segment_ids):
        attend = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * q.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=_block_sizes(*shape),
            interpret=interpret,
        )
        by_head = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
        out: Any = jax.vmap(attend)(*by_head, splash.SegmentIds(q_segment_ids, kv_segment_ids))
        return jnp.swapaxes(out, 1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        q_spec = partition_spec(("batch", "length", "heads", "head_dim"), q.shape, mesh)
        kv_spec = partition_spec(("batch", "length", "kv_heads", "head_dim"), k.shape, mesh)
        if (
            kv_spec[2] is None
        ):  # the table could not split the key heads: whole on every device, and so are the queries
            q_spec = PartitionSpec(q_spec[0])
        rows = PartitionSpec(q_spec[0])
        specs = (q_spec, kv_spec, kv_spec, rows, rows)
        local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)
    return local(q, k, v, q_segment_ids, kv_segment_ids)[:, :length, :, :head_dim]


def _pad(x: jax.Array) -> jax.Array:
    return _pad_to_lanes(_pad_to_lanes(x, 1), 3)


def _pad_to_lanes(x: jax.Array, axis: int) -> jax.Array:
    """Zeros to the next multiple of 128: zero head dimensions change no product, segment 0 is
    padding."""
    missing = -x.shape[axis] % _LANES
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _block_sizes(q_length: int, kv_length: int) -> splash.BlockSizes:
    q, kv = math.gcd(q_length, 512), math.gcd(kv_length, 512)
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
