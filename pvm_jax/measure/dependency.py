"""How much of each token of an answer hangs on the image: the distance between what the model says
next with it and without it, token by token.

The measure of perception-aware RL: PAPO (arXiv 2507.06448) and VPPO (arXiv 2510.09285) take the
same divergence between a policy that sees the image and one that sees it masked. Here it is taken
away altogether, or from one of the two who see it.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pvm_jax.data.batch import Batch
from pvm_jax.data.example import Example
from pvm_jax.measure.ablations import silence
from pvm_jax.measure.reading import at_predicting, find_answers, read
from pvm_jax.model.pieces import inspect
from pvm_jax.model.qwen3_vl import Qwen3VL

NO_IMAGE = "image hidden"
FROM_BRANCH = "image hidden from the branch alone"
FROM_DECODER = "image hidden from the decoder alone"

_SEEN = {NO_IMAGE: (False, False), FROM_BRANCH: (True, False), FROM_DECODER: (False, True)}
"""By name, whether the decoder and whether the branch sees the image."""


def dependency(
    model: Qwen3VL, examples: Sequence[Example], *, rows: int = 4, chunk: int = 128
) -> dict[str, np.ndarray]:
    """KL(next token with the image || without it), in nats, where each token of an answer is
    predicted: [conversations, answer] by what is hidden, NaN beyond an answer's end.

    All text before the token is given (teacher-forced): give the model's own answers
    (`accuracy.answered`) for what its own writing hangs on. Where the decoder does not see the
    image it reads bare placeholders (`hide_images`): no position changes. Where the branch does not
    see it, it adds nothing. A model without a branch has NO_IMAGE alone.

    Args:
        rows: see `reading.read`.
        chunk: at most this many columns of a batch meet the vocabulary at a time.

    Raises:
        ValueError: for a conversation without answer or image.
    """
    answers = find_answers(examples)
    found = read(model, examples, program, columns=answers.columns, rows=rows, chunk=chunk)
    return {name: answers.where_real(values) for name, values in found.items()}


def program(model: Qwen3VL, batch: Batch, columns: jax.Array, chunk: int) -> dict[str, jax.Array]:
    """A `reading.Program`: the divergences of `dependency`, [B, answer] each."""
    names = [*_SEEN] if model.pvm else [NO_IMAGE]
    graphdef, params = nnx.split(model)
    _, silent = nnx.split(silence(model, [*map(int, model.pvm)]))
    index = jnp.asarray(batch.visual_index)
    bare = jnp.where(index >= 0, -2 - index, index)

    def hidden(seen: jax.Array) -> jax.Array:
        """[B, answer, D], where the answer's tokens are predicted."""
        of_decoder, of_branch = seen
        chosen = jax.tree.map(lambda x, none: jnp.where(of_branch, x, none), params, silent)
        shown = replace(batch, visual_index=jnp.where(of_decoder, index, bare))
        kept = inspect(
            nnx.merge(graphdef, chosen),
            shown,
            lambda piece, inner: None,
            lambda piece, hidden, layers: jnp.moveaxis(hidden, -1, 0),
            chunk=chunk,
        )
        return jnp.moveaxis(at_predicting(kept, columns), 1, -1)

    # One after the other through one compiled reading, in place of four.
    seen = jnp.array([(True, True), *(_SEEN[name] for name in names)])
    by_variant = jax.lax.map(hidden, seen)
    found = _divergences(model, by_variant, chunk)
    return dict(zip(names, found, strict=True))


def _divergences(model: Qwen3VL, hidden: jax.Array, chunk: int) -> jax.Array:
    """Streams [variants, B, answer, D] -> KL(the first's distribution || each other's), [variants -
    1, B, answer], `chunk` tokens at a time."""
    length = hidden.shape[2]
    pieces = -(-length // chunk)
    padded = jnp.pad(hidden, ((0, 0), (0, 0), (0, -length % pieces), (0, 0)))
    cut = jnp.moveaxis(padded.reshape(*hidden.shape[:2], pieces, -1, hidden.shape[3]), 2, 0)

    def of_piece(piece: jax.Array) -> jax.Array:
        whole = jax.nn.log_softmax(model.logits(piece[0]))

        def of_variant(one: jax.Array) -> jax.Array:
            return (jnp.exp(whole) * (whole - jax.nn.log_softmax(model.logits(one)))).sum(-1)

        return jax.lax.map(of_variant, piece[1:])

    found = jnp.moveaxis(jax.lax.map(of_piece, cut), 0, 2)
    return found.reshape(*found.shape[:2], -1)[..., :length]
