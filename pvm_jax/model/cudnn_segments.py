"""Attention on a GPU from Hopper on: cuDNN's kernel for packed rows, which is told where each
segment begins and how long it is. It computes each segment alone, some of a row at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pvm_jax.model.blocks import on_each_device, pad_to_multiple

AT_ONCE = 8
"""Segments in one call. For each of them the gradient has a workspace of one float32 array as large
as all queries of the row; of two, where heads share their keys."""


class Segments(NamedTuple):
    """AT_ONCE segments of one row, [AT_ONCE] int32 each; -1 throughout for one that has no queries
    or no keys.

    Attributes:
        q_starts, kv_starts: the first column.
        q_lengths, kv_lengths: how many columns follow.
    """

    q_starts: jax.Array
    q_lengths: jax.Array
    kv_starts: jax.Array
    kv_lengths: jax.Array


OfSegments = Callable[[jax.Array, jax.Array, jax.Array, Segments], jax.Array]
"""(q [S, N, H], k, v [T, K, H], segments of one row) -> [S, N, H]: attention within them; of other
columns it may return anything."""


def segments_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    *,
    causal: bool,
    scale: float,
    interpret: bool,
) -> jax.Array:
    """Each device's own rows and heads, by the mesh that is set; arguments as of `attention`.

    Args:
        causal: a query sees as many of its segment's keys as there are queries up to itself.
        interpret: has XLA compute what cuDNN would.
    """
    length = q.shape[1]
    q, k, v, q_ids, kv_ids = (
        pad_to_multiple(x, 1) for x in (q, k, v, q_segment_ids, kv_segment_ids)
    )
    attend = partial(_xla if interpret else _cudnn, causal=causal, scale=scale)

    def local(*arrays: jax.Array) -> jax.Array:
        return jax.lax.map(lambda row: _row(attend, *row), arrays)

    return on_each_device(local, q, k, v, q_ids, kv_ids)[:, :length]


def takes_segments() -> bool:
    """Whether the devices here are GPUs that do."""
    generation, *_ = getattr(jax.local_devices()[0], "compute_capability", "").split(".")
    return generation.isdigit() and int(generation) >= 9  # AMD's is none: gfx90a


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row(
    attend: OfSegments,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    kv_ids: jax.Array,
) -> jax.Array:
    """[S, N, H], zeros where `attend` says nothing."""

    def some(segments: Segments, attended: jax.Array) -> jax.Array:
        return _put(attend(q, k, v, segments), attended, segments.q_starts, segments.q_lengths)

    return _for_all(some, jnp.zeros_like(q), q_ids, kv_ids)


def _forward(attend: OfSegments, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _row(attend, *arrays), arrays


def _backward(
    attend: OfSegments, kept: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[Any, ...]:
    *qkv, q_ids, kv_ids = kept

    def some(segments: Segments, gradients: list[jax.Array]) -> list[jax.Array]:
        q_starts, q_lengths, *kv = segments
        pulled = jax.vjp(lambda q, k, v: attend(q, k, v, segments), *qkv)[1](gradient)
        columns = (q_starts, q_lengths), kv, kv
        return [
            _put(new, old, *at) for new, old, at in zip(pulled, gradients, columns, strict=True)
        ]

    gradients = _for_all(some, [jnp.zeros_like(x) for x in qkv], q_ids, kv_ids)
    return *gradients, None, None


_row.defvjp(_forward, _backward)


def _for_all(some: Any, start: Any, q_ids: jax.Array, kv_ids: jax.Array) -> Any:
    """`some` of a row's first segments and `start`, of the next and what that gave, and so on."""
    last = jnp.minimum(q_ids.max(), kv_ids.max())

    def more(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        first, result = carry
        numbers = first + jnp.arange(AT_ONCE)
        return first + AT_ONCE, some(_segments(numbers, q_ids, kv_ids), result)

    return jax.lax.while_loop(lambda carry: carry[0] <= last, more, (jnp.int32(1), start))[1]


def _segments(numbers: jax.Array, q_ids: jax.Array, kv_ids: jax.Array) -> Segments:
    members = [ids == numbers[:, None] for ids in (q_ids, kv_ids)]
    lengths = [each.sum(-1, dtype=jnp.int32) for each in members]
    starts = [jnp.argmax(each, -1).astype(jnp.int32) for each in members]
    used = (lengths[0] > 0) & (lengths[1] > 0)
    found = starts[0], lengths[0], starts[1], lengths[1]
    return Segments(*(jnp.where(used, x, -1) for x in found))


def _put(new: jax.Array, old: jax.Array, starts: jax.Array, lengths: jax.Array) -> jax.Array:
    """`new` in the segments' columns, `old` in the others: [S, N, H]."""
    within = _members(len(new), starts, lengths).any(0)
    return jnp.where(within[:, None, None], new, old)


def _members(columns: int, starts: jax.Array, lengths: jax.Array) -> jax.Array:
    """[AT_ONCE, columns], True where a segment has the column."""
    beyond = jnp.arange(columns) - starts[:, None]
    return (beyond >= 0) & (beyond < lengths[:, None])


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, *, causal: bool, scale: float
) -> jax.Array:
    # Behind jax.nn.dot_product_attention, which hands no segments on.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    q_starts, q_lengths, kv_starts, kv_lengths = (x[None] for x in segments)
    last = ((0, 0), (0, 1))
    attended: Any = dot_product_attention(
        *(x[None] for x in (q, k, v)),
        q_seqlen=q_lengths,
        kv_seqlen=kv_lengths,
        q_offsets=jnp.pad(q_starts, last, constant_values=-1),
        kv_offsets=jnp.pad(kv_starts, last, constant_values=-1),
        mask_type=MaskType.PADDING_CAUSAL if causal else MaskType.PADDING,
        scale=scale,
    )
    return attended[0]


def _xla(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, *, causal: bool, scale: float
) -> jax.Array:
    """NaN where cuDNN writes nothing."""
    queries = _members(len(q), segments.q_starts, segments.q_lengths)
    keys = _members(len(k), segments.kv_starts, segments.kv_lengths)

    def of(queries: jax.Array, keys: jax.Array, shift: jax.Array) -> jax.Array:
        alone = (jnp.where(x[:, None, None], y, 0) for x, y in ((queries, q), (keys, k), (keys, v)))
        seen = queries[:, None] & keys
        if causal:
            seen &= jnp.arange(len(q))[:, None] - jnp.arange(len(k)) >= shift
        attended = jax.nn.dot_product_attention(*alone, mask=seen[None, None], scale=scale)
        return jnp.where(queries[:, None, None], attended, 0)

    attended = jax.vmap(of)(queries, keys, segments.q_starts - segments.kv_starts).sum(0)
    return jnp.where(queries.any(0)[:, None, None], attended, jnp.nan)
