"""How much of the decoder's attention is left for the image as the answer grows, and whether the
branch keeps its voice."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pvm_jax.data.batch import Batch
from pvm_jax.data.example import Example
from pvm_jax.measure.reading import at_predicting, find_answers, read
from pvm_jax.model.attention_kernels import attention_weights
from pvm_jax.model.decoder import Inner
from pvm_jax.model.layers import l2_norm
from pvm_jax.model.pieces import Piece, inspect
from pvm_jax.model.qwen3_vl import Qwen3VL


class Dilution(NamedTuple):
    """By answer token, of N conversations with A tokens at most (NaN beyond an answer's end), where
    the token is predicted.

    Attributes:
        mass: [conversations, L, answer], each layer's attention on visual tokens, the mean over its
            heads, in [0, 1].
        uniform: [conversations, answer], what it would be if all tokens so far had the same share:
            visual tokens so far over tokens so far.
        ffn: [conversations, branches, answer], the norm of the FFN's output in each layer with a
            branch, in ascending order.
        update: [conversations, branches, answer], the norm of the branch's update beside it.
    """

    mass: np.ndarray
    uniform: np.ndarray
    ffn: np.ndarray
    update: np.ndarray


def dilution(
    model: Qwen3VL, examples: Sequence[Example], *, rows: int = 4, chunk: int = 256
) -> Dilution:
    """Measures `examples`, encoded conversations, with their own answers read (teacher-forced); see
    `reading.read`.

    Raises:
        ValueError: for a conversation without answer or image.
    """
    answers = find_answers(examples)
    found = read(model, examples, program, columns=answers.columns, rows=rows, chunk=chunk)
    return Dilution(*(answers.where_real(values) for values in found))


def program(model: Qwen3VL, batch: Batch, columns: jax.Array, chunk: int) -> tuple[jax.Array, ...]:
    """A `reading.Program`: the arrays of Dilution, of B conversations."""
    is_visual = jnp.asarray(batch.visual_index) >= 0

    def look(piece: Piece, inner: Inner) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        slots = jnp.pad(is_visual, ((0, 0), (0, piece.mask.shape[-1] - is_visual.shape[1])))
        weights = attention_weights(
            inner.q, jnp.moveaxis(inner.cache.keys[inner.index], 1, 2), piece.mask
        )
        mass = jnp.where(slots[:, None, None], weights, 0).sum(-1).mean(1)
        return (
            (mass, None, None)
            if inner.update is None
            else (mass, l2_norm(inner.ffn), l2_norm(inner.update))
        )

    def conclude(piece: Piece, hidden: jax.Array, layers: list) -> list[jax.Array]:
        nothing = jnp.zeros((0, *hidden.shape[:2]))
        return [
            jnp.stack(kept) if (kept := [x for x in by if x is not None]) else nothing
            for by in zip(*layers, strict=True)
        ]

    mass, ffn, update = (
        at_predicting(x, columns) for x in inspect(model, batch, look, conclude, chunk=chunk)
    )
    before = jnp.take_along_axis(jnp.cumsum(is_visual, 1), columns - 1, axis=1)
    return mass, before / columns, ffn, update
