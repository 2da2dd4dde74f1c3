"""Reading in pieces: prompts before generation, whole conversations for a measurement, one token
after the other."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pvm_jax.data.batch import Batch
from pvm_jax.model.attend import DecodingStep, PromptPiece, WholeRows
from pvm_jax.model.attention_kernels import attention_mask
from pvm_jax.model.cache import Cache, PromptCache, SampleCache
from pvm_jax.model.decoder import Inner
from pvm_jax.model.memory import Memory
from pvm_jax.model.qwen3_vl import Columns, Qwen3VL


class Piece(NamedTuple):
    """The columns of a batch that are read together, [B, piece], and what they may look at.

    Attributes:
        start: [] int32, the first of them in the batch.
        segment_ids: [B, piece], 0 is padding.
        limits: [B, piece], where each column's memory ends; None: nowhere.
        mask: [B, piece, T], the columns of the batch (filled up to whole pieces) that each of them
            attends to.
        memories: each branch's memory of the batch's images, by layer.
    """

    start: jax.Array
    segment_ids: jax.Array
    limits: jax.Array | None
    mask: jax.Array
    memories: dict[str, Memory]


LayerProbe = Callable[[Piece, Inner], Any]
"""Takes of each layer, of each piece, what a measurement wants: a pytree of arrays."""

Conclude = Callable[[Piece, jax.Array, list[Any]], Any]
"""(piece, hidden [B, piece, D] after the final norm, what `LayerProbe` took of each layer) -> what
is kept of the piece."""


def inspect(
    model: Qwen3VL, batch: Batch, look: LayerProbe, conclude: Conclude, *, chunk: int
) -> Any:
    """Reads whole conversations in pieces of at most `chunk` columns, and keeps of their inner
    values what is asked for.

    No [heads, S, S], no [L, B, S, D] and no [B, S, vocab] ever exists unless the callbacks keep
    one.

    Returns:
        What `conclude` gave, stacked over the pieces: [pieces, ...].
    """
    return _read(model, batch, chunk, None, look, conclude)[2]


def prefill(
    model: Qwen3VL, batch: Batch, *, chunk: int | None = None, past: Cache | None = None
) -> tuple[jax.Array, Cache]:
    """Reads prompts, one a row, or what comes after `past` in them.

    Args:
        chunk: columns to read at a time, at most; None reads all at once.
        past: what was read before, whose positions the batch's continue. Its images stay in the
            memory.

    Returns:
        [B, 1, D] after the final norm at each row's last token, and the cache: the batch's columns
        are its last slots.
    """
    hidden, cache, _ = _read(model, batch, chunk, past)
    return hidden, cache


def _read(
    model: Qwen3VL,
    batch: Batch,
    chunk: int | None,
    past: Cache | None,
    look: LayerProbe | None = None,
    conclude: Conclude | None = None,
) -> tuple[jax.Array, Cache, Any]:
    """What `prefill` returns, and what `inspect` does."""
    config, (rows, length) = model.config, batch.tokens.shape
    count = 1 if chunk is None else -(-length // chunk)
    columns = Columns.of(
        batch, config.text.pvm_visibility, 0 if past is None else past.visual_tokens
    )
    columns = _cut(columns, count)
    width = columns.tokens.shape[-1]
    visual = model.encode(batch)
    prompts = PromptCache.empty(config, rows, count * width)
    memories = model.memorize(visual, batch)
    before = 0
    if past is not None:
        before = past.prompts.slots
        prompts, memories = past.prompts.followed_by(prompts), past.remembering(memories)
    last = length - 1 - jnp.argmax(batch.segment_ids[:, ::-1] > 0, axis=1)

    def read(carry: tuple[PromptCache, jax.Array], xs: tuple[jax.Array, Columns]):
        prompts, hidden = carry
        start, columns = xs
        slot, segment_ids = before + start, columns.segment_ids
        prompts = prompts.claim(slot, segment_ids)
        until = jnp.broadcast_to(slot + 1 + jnp.arange(width), segment_ids.shape)
        if count == 1 and past is None:
            attend = WholeRows(segment_ids, config.attention, slot)
        else:
            attend = PromptPiece(segment_ids, config.attention, slot, until)
        mask = attention_mask(segment_ids, prompts.segment_ids, limits=until)
        piece = Piece(start, segment_ids, columns.limits, mask, memories)
        probe = None if look is None else partial(look, piece)
        decoded = model.forward(columns, visual, memories, attend, cache=prompts, probe=probe)
        kept = None if conclude is None else conclude(piece, decoded.hidden, decoded.probed)
        place = jnp.clip(last - start, 0, width - 1)
        here = (last - start == place)[:, None, None]
        found = jnp.take_along_axis(decoded.hidden, place[:, None, None], 1)
        return (decoded.cache, jnp.where(here, found, hidden)), kept

    hidden = jnp.zeros((rows, 1, config.text.hidden_size), config.compute_dtype)
    (prompts, hidden), kept = jax.lax.scan(
        read, (prompts, hidden), (width * jnp.arange(count), columns)
    )
    return hidden, Cache(prompts, memories), kept


def _cut(columns: Columns, count: int) -> Columns:
    """[count, B, ...]: the columns in `count` pieces of equal width, padded at the end."""

    def cut(x: jax.Array, padding: int) -> jax.Array:
        more = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % count)]
        x = jnp.pad(x, more, constant_values=padding)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], count, -1), -2, 0)

    return Columns(
        cut(columns.tokens, 0),
        cut(columns.positions, 0),
        cut(columns.segment_ids, 0),
        cut(columns.visual_index, -1),
        None if columns.limits is None else cut(columns.limits, 0),
    )


def decode(
    model: Qwen3VL,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    cache: Cache,
    samples: SampleCache,
    slot: jax.Array,
) -> tuple[jax.Array, SampleCache]:
    """One more text token for each of a prompt's N samples: nothing of the prompt or its images is
    computed again.

    Args:
        tokens, positions: [B, samples]; a text token's position is the same in time, row and
            column.
        segment_ids: [B], the prompt's.
        samples: what these samples wrote before, in the slots below `slot`.

    Returns:
        [B, samples, D] after the final norm, and the samples with this token in `slot`.
    """
    segment_ids = jnp.broadcast_to(segment_ids[:, None], tokens.shape)
    of_all_axes = jnp.repeat(positions[:, None], 3, 1)
    columns = Columns(tokens, of_all_axes, segment_ids, jnp.full_like(tokens, -1), None)
    attend = DecodingStep(
        cache.prompts,
        samples,
        shared_mask=attention_mask(segment_ids, cache.prompts.segment_ids),
        own_mask=(jnp.arange(samples.slots) < slot)[None, None],
    )
    decoded = model.forward(columns, None, cache.memories, attend, cache=samples.unwritten())
    return decoded.hidden, samples.write(slot, decoded.cache)
