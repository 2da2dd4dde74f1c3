"""Next-token cross-entropy over a large vocabulary without the logits of a whole batch."""

import jax
import jax.numpy as jnp

from pvm_jax.sharding import constrain


def chunked_cross_entropy(
    hidden: jax.Array, head: jax.Array, tokens: jax.Array, loss_weights: jax.Array, *, chunk: int = 512
) -> tuple[jax.Array, jax.Array]:
    """Sum over positions of weight x -log p(token), and the sum of the weights: their quotient is the mean loss.

    Each row's positions that carry loss are brought to its front, so that a chunk in which no row has any is skipped:
    prompts and padding never meet the vocabulary, and at most [B, chunk, V] logits exist at a time (recomputed in the
    backward pass).

    Args:
        hidden: [B, S, D] after the final norm.
        head: [V, D]; products are computed in hidden's dtype and accumulated in float32.
        tokens: [B, S].
        loss_weights: [B, S], the weight of token s as a target; it is predicted from the hidden state at s - 1.
        chunk: positions of a row that are computed together.

    Returns:
        Two float32 scalars.
    """
    hidden, targets, weights = _front(hidden[:, :-1], tokens[:, 1:], loss_weights[:, 1:].astype(jnp.float32))
    # Gathered once here: inside the scan a head that is split over fsdp would be gathered for every chunk.
    head = constrain(head, "vocab", "hidden")

    def add_chunk(total: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden, targets, weights = parts
        loss = jax.lax.cond(weights.any(), _weighted_loss, lambda *_: jnp.float32(0), hidden, head, targets, weights)
        return total + loss, None

    chunks = [_chunks(x, min(chunk, x.shape[1])) for x in (hidden, targets, weights)]
    total, _ = jax.lax.scan(jax.checkpoint(add_chunk, prevent_cse=False), jnp.float32(0), chunks)
    return total, weights.sum()


def _front(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """Reorders every row on its own (nothing moves between devices): first what carries loss."""
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    return (
        jnp.take_along_axis(hidden, order[..., None], axis=1),
        jnp.take_along_axis(targets, order, axis=1),
        jnp.take_along_axis(weights, order, axis=1),
    )


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [ceil(S / chunk), B, chunk, ...]; the last one is filled up with zeros (weight 0)."""
    missing = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _weighted_loss(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    logits = jnp.einsum("bcd,vd->bcv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = constrain(logits, "batch", "length", "vocab")
    # A comparison in place of a gather: it fuses, and it stays local where the vocabulary is split.
    is_target = jnp.arange(head.shape[0]) == targets[..., None]
    log_likelihood = jnp.where(is_target, logits, 0).sum(-1) - jax.nn.logsumexp(logits, axis=-1)
    return -(weights * log_likelihood).sum()
