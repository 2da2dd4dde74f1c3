"""When the prediction is made: every layer's stream through the final norm and the head (the logit
lens)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pvm_jax.data.batch import Batch
from pvm_jax.data.example import Example
from pvm_jax.measure.reading import (
    at_predicting,
    columns_of,
    find_answers,
    only_if,
    predicts_an_answer,
    read,
)
from pvm_jax.model.decoder import Inner
from pvm_jax.model.pieces import Piece, inspect
from pvm_jax.model.qwen3_vl import Qwen3VL


class Lens(NamedTuple):
    """By layer and answer token, of N conversations with A tokens at most (NaN beyond an answer's
    end).

    "The final token" is the one that the model itself finds likeliest in the end, right or not.

    Attributes:
        probability: [conversations, L, answer], of the final token by the layer's own distribution.
        rank: [conversations, L, answer], how many tokens the layer finds likelier.
        kl: [conversations, L, answer], KL(final distribution || the layer's), in nats.
        settled: [conversations, answer], the first layer from which the final token is the
            likeliest, and stays it.
    """

    probability: np.ndarray
    rank: np.ndarray
    kl: np.ndarray
    settled: np.ndarray


def lens(model: Qwen3VL, examples: Sequence[Example], *, rows: int = 4, chunk: int = 128) -> Lens:
    """Measures `examples`, encoded conversations, with their own answers read (teacher-forced); see
    `reading.read`.

    Args:
        chunk: at most this many columns of a batch meet the vocabulary at a time, in one layer at a
            time.

    Raises:
        ValueError: for a conversation without answer or image.
    """
    answers = find_answers(examples)
    probability, rank, kl = read(
        model, examples, program, columns=answers.columns, rows=rows, chunk=chunk
    )
    stays = np.logical_and.accumulate(rank[:, ::-1] == 0, axis=1)
    settled = rank.shape[1] - stays.sum(1)
    return Lens(*(answers.where_real(values) for values in (probability, rank, kl, settled)))


def program(model: Qwen3VL, batch: Batch, columns: jax.Array, chunk: int) -> list[jax.Array]:
    """A `reading.Program`: probability, rank and KL of Lens, [B, L, answer] each."""
    wanted = predicts_an_answer(batch)

    def look(piece: Piece, inner: Inner) -> jax.Array:
        return inner.stream

    def conclude(
        piece: Piece, hidden: jax.Array, streams: list[jax.Array]
    ) -> tuple[jax.Array, ...]:
        def compare() -> tuple[jax.Array, ...]:
            final = jax.nn.log_softmax(model.logits(hidden))
            token = jnp.argmax(final, -1)[..., None]

            def of_layer(stream: jax.Array) -> tuple[jax.Array, ...]:
                own = jax.nn.log_softmax(model.logits(model.language_model.norm(stream)))
                chosen = jnp.take_along_axis(own, token, -1)
                rank = (own > chosen).sum(-1)
                return jnp.exp(chosen[..., 0]), rank, (jnp.exp(final) * (final - own)).sum(-1)

            return jax.lax.map(of_layer, jnp.stack(streams))

        return only_if(columns_of(wanted, piece).any(), compare)

    return [at_predicting(x, columns) for x in inspect(model, batch, look, conclude, chunk=chunk)]
