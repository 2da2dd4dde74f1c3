"""How much of the decoder's attention is on the image, and on what is marked in it, once the tokens
that every query attends to are left out.

Such sinks take attention without being looked at: the first token, and some of the image's own
(Kang et al., arXiv 2503.03321, find those by their activations; here attention itself shows them).
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pvm_jax.data.batch import Batch
from pvm_jax.data.example import Example
from pvm_jax.measure.reading import Program, at_predicting, find_answers, read
from pvm_jax.model.attention_kernels import attention_weights
from pvm_jax.model.decoder import Inner
from pvm_jax.model.pieces import Piece, inspect
from pvm_jax.model.qwen3_vl import Qwen3VL

TIMES = 10.0
"""What makes a sink, by default: a choice, not a measurement."""


class Evidence(NamedTuple):
    """By answer token, where it is predicted; NaN beyond an answer's end. Attention is the mean
    over a layer's heads.

    Attributes:
        mass: [conversations, L, answer], the share of the image's tokens that are no sinks, of all
            attention that is not on sinks.
        marked: [conversations, L, answer], of that, the share of the tokens that the data's boxes
            touch; NaN for a conversation without boxes, and where no image has been shown yet.
        chance: [conversations], what `marked` is where the image's tokens get equal attention.
        sinks: [conversations, L], how many tokens are sinks.
    """

    mass: np.ndarray
    marked: np.ndarray
    chance: np.ndarray
    sinks: np.ndarray


def evidence(
    model: Qwen3VL,
    examples: Sequence[Example],
    *,
    times: float = TIMES,
    rows: int = 4,
    chunk: int = 256,
) -> Evidence:
    """Measures `examples`, encoded conversations, with their own answers read (teacher-forced); see
    `reading.read`.

    Args:
        times: a token of a prompt is a sink of a layer if each of the answer's queries gives it at
            least `times` the attention that it would get if all tokens so far had the same share.

    Raises:
        ValueError: for a conversation without answer or image.
    """
    answers = find_answers(examples)
    boxed = [np.array([], int) if e.evidence is None else e.evidence for e in examples]
    width = max(answers.columns.shape[1], *map(len, boxed))
    # Both as one array [conversations, 2, width], as `read` takes columns.
    columns = np.stack(
        [
            np.stack(
                [
                    np.pad(own, (0, width - len(own)), mode="edge"),
                    np.pad(marks, (0, width - len(marks)), constant_values=-1),
                ]
            )
            for own, marks in zip(answers.columns, boxed, strict=True)
        ]
    ).astype(np.int32)
    mass, marked, sinks = read(
        model, examples, _program(times), columns=columns, rows=rows, chunk=chunk
    )
    length = answers.columns.shape[1]
    mass, marked = (answers.where_real(values[..., :length]) for values in (mass, marked))
    has = np.array([len(marks) > 0 for marks in boxed])
    tokens = np.array([e.num_patches // model.config.vision.merge_factor for e in examples])
    chance = np.where(has, [len(marks) for marks in boxed] / tokens, np.nan)
    marked = np.where(has[:, None, None], marked, np.float32(np.nan))
    return Evidence(mass, marked, chance, sinks)


@cache
def _program(times: float) -> Program:
    """The program for one number: always the same function, since it is compiled by it."""

    def program(
        model: Qwen3VL, batch: Batch, columns: jax.Array, chunk: int
    ) -> tuple[jax.Array, ...]:
        """Mass and marked share [B, L, width], sinks [B, L]."""
        asked, boxed = columns[:, 0], columns[:, 1]
        row = jnp.arange(len(asked))[:, None]
        shape = batch.tokens.shape
        is_query = jnp.zeros(shape, bool).at[row, asked - 1].set(True)
        is_marked = (
            jnp.zeros(shape, bool)
            .at[row, jnp.where(boxed < 0, shape[1], boxed)]
            .set(True, mode="drop")
        )
        is_visual = jnp.asarray(batch.visual_index) >= 0
        in_prompt = jnp.arange(shape[1]) < asked[:, :1]

        def weights(piece: Piece, inner: Inner) -> jax.Array:
            """[B, piece, T], the mean over heads."""
            keys = jnp.moveaxis(inner.cache.keys[inner.index], 1, 2)
            return attention_weights(inner.q, keys, piece.mask).mean(1)

        def widened(x: jax.Array, piece: Piece) -> jax.Array:
            return jnp.pad(x, ((0, 0), (0, piece.mask.shape[-1] - x.shape[1])))

        def least(piece: Piece, inner: Inner) -> jax.Array:
            """[B, T]: of the piece's queries, the least attention on each token, in equal
            shares."""
            so_far = piece.mask.sum(-1, keepdims=True)
            mine = jax.lax.dynamic_slice_in_dim(
                widened(is_query, piece), piece.start, so_far.shape[1], axis=1
            )
            return jnp.where(mine[..., None], weights(piece, inner) * so_far, jnp.inf).min(1)

        found = inspect(model, batch, least, lambda p, h, layers: jnp.stack(layers), chunk=chunk)
        least_of_all = found.min(0)[..., : shape[1]]  # [L, B, S]
        sinks = (least_of_all >= times) & in_prompt

        def shares(piece: Piece, inner: Inner) -> tuple[jax.Array, jax.Array]:
            sink = widened(sinks[inner.index], piece)
            kept = jnp.where(sink[:, None], 0, weights(piece, inner))
            image, marked = (
                jnp.where(widened(x, piece)[:, None], kept, 0).sum(-1)
                for x in (is_visual, is_marked)
            )
            return _share(image, kept.sum(-1)), _share(marked, image)

        def conclude(piece: Piece, hidden: jax.Array, layers: list) -> list[jax.Array]:
            return [jnp.stack(values) for values in zip(*layers, strict=True)]

        mass, marked = (
            at_predicting(x, asked) for x in inspect(model, batch, shares, conclude, chunk=chunk)
        )
        return mass, marked, sinks.sum(-1).T

    return program


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole, NaN where there is nothing to share."""
    return jnp.where(whole > 0, part / whole, jnp.nan)
