"""Conversations -> what a measurement takes of their answers' tokens, batch after batch through one
compiled program."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pvm_jax.data.batch import Batch, hide_images
from pvm_jax.data.example import Example
from pvm_jax.model.pieces import Piece
from pvm_jax.model.qwen3_vl import Qwen3VL

Program = Callable[[Qwen3VL, Batch, jax.Array, int], Any]
"""(model, batch, columns [B, answer], chunk) -> a pytree of arrays [B, ...]; a function of a
module, since it is compiled once."""


class Answers(NamedTuple):
    """Where the tokens of N conversations' answers stand, A of them in the longest.

    Attributes:
        columns: [conversations, answer] int32, the column of each token; beyond an answer's end its
            last one's.
        real: [conversations, answer] bool, False beyond the end.
    """

    columns: np.ndarray
    real: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[conversations], tokens of each answer."""
        return self.real.sum(1)

    def where_real(self, values: np.ndarray) -> np.ndarray:
        """`values` [conversations, ..., answer] as floats, NaN beyond the answers' ends."""
        real = self.real.reshape(len(self.real), *(1,) * (values.ndim - 2), -1)
        return np.where(real, values.astype(np.float32), np.float32(np.nan))


def find_answers(examples: Sequence[Example]) -> Answers:
    """The learned tokens of every conversation: all that its assistant turns say, in order, the
    turns' ends included.

    Raises:
        ValueError: for a conversation without an answer or without an image, by its number.
    """
    learned = []
    for number, example in enumerate(examples):
        columns = (
            np.flatnonzero(example.loss_mask)
            if example.loss_mask is not None
            else np.array([], int)
        )
        columns = columns[columns > 0]  # the first token has nothing to be predicted from
        if not len(columns):
            raise ValueError(
                f"conversation {number} has no assistant turn: there is no answer to measure"
            )
        if not example.num_patches:
            raise ValueError(f"conversation {number} shows no image: there is nothing to look at")
        learned.append(columns)
    longest = max(map(len, learned))
    columns = np.stack([np.pad(one, (0, longest - len(one)), mode="edge") for one in learned])
    real = np.arange(longest) < np.array([len(one) for one in learned])[:, None]
    return Answers(columns.astype(np.int32), real)


def read(
    model: Qwen3VL,
    examples: Sequence[Example],
    program: Program,
    *,
    columns: np.ndarray,
    rows: int = 4,
    chunk: int = 256,
    hide: bool = False,
) -> Any:
    """Runs `program` over all conversations.

    Args:
        examples: N encoded conversations.
        columns: [conversations, answer], tokens of each that `program` is about.
        rows: conversations that are computed together, at most. All batches have one shape.
        chunk: columns of a batch that are computed together, at most (`pieces.inspect`).
        hide: the decoder does not see the images, the branch alone does (`hide_images`).

    Returns:
        The program's pytree in NumPy, [conversations, ...].
    """
    rows = min(rows, len(examples))
    graphdef, params = nnx.split(model)
    params = nnx.as_pure(params)
    parts = []
    for start in range(0, len(examples), rows):
        # A last batch is filled from the front: the row before a conversation is never the same one
        # (`ablations.mislead`).
        members = [i % len(examples) for i in range(start, start + rows)]
        batch = Batch.from_examples([examples[i] for i in members], model.config, among=examples)
        batch = hide_images(batch, [hide] * rows)
        parts.append(
            jax.device_get(run_program(graphdef, params, batch, columns[members], program, chunk))
        )
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(examples)], *parts)


@partial(jax.jit, static_argnames=("graphdef", "program", "chunk"))
def run_program(
    graphdef: nnx.GraphDef,
    params: Any,
    batch: Batch,
    columns: jax.Array,
    program: Program,
    chunk: int,
) -> Any:
    """What `program` gives of a batch, compiled: `columns` [B, answer] -> [B, ...]."""
    return program(nnx.merge(graphdef, params), batch, columns, chunk)


def at_predicting(pieces: jax.Array, columns: jax.Array) -> jax.Array:
    """[pieces, ..., B, piece] -> [B, ..., answer]: of what was kept of all columns, that of the
    column before each of `columns` [B, answer], from which the token there is predicted."""
    whole = jnp.moveaxis(pieces, 0, -2)
    # Not -1: of a model without a branch there is nothing to reshape.
    whole = jnp.moveaxis(whole.reshape(*whole.shape[:-2], math.prod(whole.shape[-2:])), -2, 0)
    before = (columns - 1).reshape(columns.shape[0], *(1,) * (whole.ndim - 2), -1)
    return jnp.take_along_axis(whole, before, axis=-1)


def columns_of(x: jax.Array, piece: Piece) -> jax.Array:
    """The columns of a piece, [B, piece], of what all columns of the batch have, [B, S]; zeros
    where it was filled up."""
    width = piece.segment_ids.shape[1]
    padded = jnp.pad(x, ((0, 0), (0, piece.mask.shape[-1] - x.shape[1])))
    return jax.lax.dynamic_slice_in_dim(padded, piece.start, width, axis=1)


def predicts_an_answer(batch: Batch) -> jax.Array:
    """[B, S] bool: the columns whose next token is an answer's."""
    return jnp.pad(jnp.asarray(batch.loss_weights)[:, 1:] > 0, ((0, 0), (0, 1)))


def only_if(needed: jax.Array, compute: Callable[[], Any]) -> Any:
    """What `compute` gives if `needed` [] is true, or zeros without computing it."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return jax.lax.cond(needed, compute, lambda: zeros)
