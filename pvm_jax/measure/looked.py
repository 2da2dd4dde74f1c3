"""Where the model looks for a token: the branch's attention over the image, and the decoder's
own."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pvm_jax.data.batch import Batch
from pvm_jax.data.example import Example
from pvm_jax.measure.reading import read
from pvm_jax.model.attention_kernels import attention_weights
from pvm_jax.model.decoder import Inner
from pvm_jax.model.pieces import Piece, inspect
from pvm_jax.model.qwen3_vl import Qwen3VL


class Looked(NamedTuple):
    """Attention on V visual tokens, where T tokens of each of N conversations are predicted.

    The visual tokens stand in the order of the patches (`visual_runs`), frame by frame, rows before
    columns; what a conversation has fewer than V is 0.

    Attributes:
        branch: [conversations, branches, heads, chosen, V], of every layer with a branch, in
            ascending order; a head's sum is 1.
        decoder: [conversations, L, chosen, V], of every layer, the mean over its heads; the sum is
            `Dilution.mass`.
    """

    branch: np.ndarray
    decoder: np.ndarray


def looked(
    model: Qwen3VL,
    examples: Sequence[Example],
    columns: np.ndarray,
    *,
    rows: int = 4,
    chunk: int = 256,
) -> Looked:
    """Args: columns: [conversations, chosen], the tokens in question, each predicted from the
    column before it. See `reading.read`."""
    return Looked(*read(model, examples, program, columns=columns, rows=rows, chunk=chunk))


def program(model: Qwen3VL, batch: Batch, columns: jax.Array, chunk: int) -> list[jax.Array]:
    """A `reading.Program`: the arrays of Looked, of B conversations."""
    visual_index = jnp.asarray(batch.visual_index)
    # Where each visual token stands: [B, V]; those that are padding come last.
    order = jnp.argsort(jnp.where(visual_index < 0, visual_index.shape[1], visual_index), axis=1)
    places = order[:, : batch.visual_segment_ids.shape[1]]
    real = jnp.asarray(batch.visual_segment_ids) > 0

    def look(piece: Piece, inner: Inner) -> tuple[jax.Array, jax.Array | None]:
        here, take = _chosen(columns - 1, piece)
        weights = attention_weights(
            take(inner.q), jnp.moveaxis(inner.cache.keys[inner.index], 1, 2), take(piece.mask)
        ).mean(1)
        on_visual = jnp.take_along_axis(weights, places[:, None], axis=2)
        decoder = jnp.where(here[..., None] & real[:, None], on_visual, 0)
        if inner.branch is None:
            return decoder, None
        limits = None if piece.limits is None else take(piece.limits)
        key = str(inner.branch)
        shares = model.pvm[key].looks(
            take(inner.middle), piece.memories[key], take(piece.segment_ids), limits
        )
        return decoder, jnp.where(here[:, None, :, None], shares, 0)

    def conclude(piece: Piece, hidden: jax.Array, layers: list) -> tuple[jax.Array, jax.Array]:
        decoder, branch = ([x for x in by if x is not None] for by in zip(*layers, strict=True))
        nothing = jnp.zeros((hidden.shape[0], 0, 0, columns.shape[1], real.shape[1]))
        return jnp.stack(branch, 1) if branch else nothing, jnp.stack(decoder, 1)

    return [
        x.sum(0) for x in inspect(model, batch, look, conclude, chunk=chunk)
    ]  # each token is in one piece


def _chosen(columns: jax.Array, piece: Piece):
    """Which of `columns` [B, chosen] are in the piece, and a function that takes them out of what
    its columns have: [B, piece, ...]."""
    width = piece.segment_ids.shape[1]
    here = (columns >= piece.start) & (columns < piece.start + width)
    places = jnp.clip(columns - piece.start, 0, width - 1)

    def take(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)

    return here, take
