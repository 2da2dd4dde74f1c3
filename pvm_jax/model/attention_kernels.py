"""One door to attention. Which kernel stands behind it depends on the platform; all compute the
same numbers."""

from functools import reduce

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pvm_jax.model.blocks import ATTENDED, LANES
from pvm_jax.model.cudnn_pieces import pieces_attention
from pvm_jax.model.cudnn_segments import segments_attention, takes_segments
from pvm_jax.model.splash import splash_attention
from pvm_jax.sharding import platform

KERNELS = ("xla", "splash", "cudnn")
PIECES, SHORTEST = 8, 128
"""Causal attention without a kernel: a row's queries come in at most so many pieces, none shorter;
each is computed against the keys up to its own end."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    causal: bool,
    limits: jax.Array | None = None,
    scale: float | None = None,
    kernel: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v among equal segment ids; the softmax is float32.

    Args:
        q: [B, S, N, H].
        k, v: [B, T, K, H] with N a multiple of K (grouped queries).
        q_segment_ids, kv_segment_ids: [B, S] and [B, T]; a query sees the keys that carry its own
            id. 0 is padding. Without `limits`, columns of one id stand side by side.
        causal: a query at column s sees keys at columns <= s only.
        limits: [B, S]: a query sees keys at columns below its limit only.
        scale: None: 1 / sqrt(H).
        kernel: "splash" (TPU) or "cudnn" (GPU, H <= 128), whose work follows the segments, "xla"
            (everywhere: the reference) or None: by platform.
        interpret: runs the TPU's kernel in its interpreter, XLA for cuDNN; for tests.

    Returns:
        [B, S, N, H]. For padding, and for a query that sees no key at all, the result is finite and
        means nothing: mask it.

    Raises:
        ValueError: for an unknown kernel.
    """
    if kernel is None:
        kernel = _platform_kernel(q)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if kernel == "xla":
        return _xla(
            q, k, v, q_segment_ids, kv_segment_ids, causal=causal, limits=limits, scale=factor
        )
    ids = q_segment_ids, kv_segment_ids
    whole = limits is None and (not causal or q_segment_ids is kv_segment_ids)
    whole &= q.shape[1] >= LANES  # not a decoding step, whose caches have gaps
    if kernel == "cudnn" and whole and (interpret or takes_segments()):
        attended = segments_attention(
            q, k, v, *ids, causal=causal, scale=factor, interpret=interpret
        )
        return checkpoint_name(attended, ATTENDED)
    arrays = *ids, _last_column(q, causal, limits)
    if kernel == "cudnn":
        attended = pieces_attention(q, k, v, *arrays, scale=factor, interpret=interpret)
        return checkpoint_name(attended, ATTENDED)
    if kernel == "splash":
        return splash_attention(q * factor, k, v, *arrays, interpret=interpret)
    raise ValueError(f"unknown attention kernel {kernel!r}; there are {', '.join(KERNELS)}")


def head_width(head_dim: int, kernel: str | None) -> int:
    """How wide the kernel wants heads of `head_dim`; `kernel` as of `attention`. Who makes them so
    wide, with zeros, saves it a copy of q, k and v."""
    if kernel == "splash" or (kernel is None and platform() == "tpu"):
        return -(-head_dim // LANES) * LANES
    return head_dim


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
    factor = q.shape[-1] ** -0.5
    scores = [
        jnp.einsum("bkngh,bkth->bkngt", grouped, shared[0], preferred_element_type=jnp.float32),
        jnp.einsum("bkngh,bknth->bkngt", grouped, own[0], preferred_element_type=jnp.float32),
        jnp.einsum("bkngh,bknh->bkng", grouped, new[0], preferred_element_type=jnp.float32)[
            ..., None
        ],
    ]
    masks = shared_mask, own_mask, jnp.ones((1, 1, 1), bool)
    scores = [
        _masked(score * factor, mask[:, None, :, None])
        for score, mask in zip(scores, masks, strict=True)
    ]
    # Not joined: a TPU would copy them, joined and cut again, into other layouts.
    largest = reduce(jnp.maximum, (jnp.max(score, -1, keepdims=True) for score in scores))
    powers = [jnp.exp(score - largest) for score in scores]
    total = sum(jnp.sum(power, -1, keepdims=True) for power in powers)
    of_shared, of_own, of_new = ((power / total).astype(q.dtype) for power in powers)
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
    weights = _weights(q, k, mask, q.shape[-1] ** -0.5)
    weights = weights.reshape(q.shape[0], q.shape[2], *weights.shape[-2:])
    return jnp.where(mask.any(-1)[:, None, :, None], weights, 0)


def attention_mask(
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    *,
    causal: bool = False,
    limits: jax.Array | None = None,
    first: int = 0,
) -> jax.Array:
    """[B, S, T], True where the query may look; arguments as of `attention`, `first` is the column
    of the first query."""
    mask = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    if causal:
        mask &= jnp.tri(*mask.shape[1:], k=first, dtype=bool)
    if limits is not None:
        mask &= jnp.arange(mask.shape[-1]) < limits[..., None]
    return mask


def _platform_kernel(q: jax.Array) -> str:
    backend = platform()
    if (
        q.shape[1] < LANES
    ):  # a decoding step's queries: a product with few rows, which no tiled kernel speeds up
        return "xla"
    if backend == "tpu":
        return "splash"
    if backend == "gpu" and q.dtype == jnp.bfloat16 and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0:
        return "cudnn"
    return "xla"


def _last_column(q: jax.Array, causal: bool, limits: jax.Array | None) -> jax.Array | None:
    """[B, S], the last column whose key each query may see; None: there is no such end."""
    last = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2]) if causal else None
    if limits is None:
        return last
    return limits - 1 if last is None else jnp.minimum(last, limits - 1)


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    *,
    causal: bool,
    limits: jax.Array | None,
    scale: float,
) -> jax.Array:
    length = q.shape[1]
    step = max(SHORTEST, -(-length // PIECES)) if causal else length
    attended = []
    for first in range(0, length, step):
        queries = slice(first, min(first + step, length))
        keys = slice(queries.stop if causal else None)
        mask = attention_mask(
            q_segment_ids[:, queries],
            kv_segment_ids[:, keys],
            causal=causal,
            limits=None if limits is None else limits[:, queries],
            first=first,
        )
        weights = _weights(q[:, queries], k[:, keys], mask, scale).astype(v.dtype)
        attended.append(jnp.einsum("bkgst,btkh->bskgh", weights, v[:, keys]))
    return jnp.concatenate(attended, 1).reshape(q.shape)


def _weights(q: jax.Array, k: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """[B, K, N / K, S, T] float32."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("bskgh,btkh->bkgst", grouped, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(_masked(scores * scale, mask[:, None, None]), axis=-1)


def _masked(scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
