"""What a large vocabulary says of a batch's tokens, without the logits of the whole batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pvm_jax.sharding import constrain, divides

OfLogits = Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]
"""(logits [B, chunk, vocab] float32, targets [B, chunk]) -> arrays [B, chunk]."""


def chunked_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    loss_weights: jax.Array,
    *,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Sum over positions of weight x -log p(token), and the sum of the weights: their quotient is
    the mean loss.

    Args:
        hidden: [B, S, D] after the final norm.
        head: [V, D]; products are computed in hidden's dtype and accumulated in float32.
        tokens: [B, S].
        loss_weights: [B, S], the weight of token s as a target; it is predicted from the hidden
            state at s - 1.
        chunk: positions of a row that are computed together.

    Returns:
        Two float32 scalars.
    """
    weights = loss_weights[:, 1:].astype(jnp.float32)
    (logprobs,) = _chunked(
        lambda *logits: (_logprob(*logits),), hidden, head, tokens, loss_weights != 0, chunk
    )
    return -(weights * logprobs[:, 1:]).sum(), weights.sum()


def chunked_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    wanted: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every wanted token under softmax(logits / temperature), and that
    distribution's entropy.

    As `pvm_jax.generate` reports them: over the whole vocabulary, before top-k and top-p.

    Args:
        hidden: [B, S, D] after the final norm.
        head: [V, D]; products are computed in hidden's dtype and accumulated in float32.
        tokens: [B, S].
        wanted: [B, S] bool; token s is predicted from the hidden state at s - 1, so that no row's
            first token can be.
        temperature: of the sampling.
        chunk: positions of a row that are computed together.

    Returns:
        Two [B, S] float32 arrays, in nats, 0 where not wanted. The entropy passes no gradient on.

    Raises:
        ValueError: if the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}: greedy decoding has no"
            " log-probabilities to train on"
        )

    def read(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
        logits = logits / temperature
        return _logprob(logits, targets), _entropy(jax.lax.stop_gradient(logits))

    logprobs, entropy = _chunked(read, hidden, head, tokens, wanted, chunk)
    return logprobs, entropy


def _chunked(
    read: OfLogits,
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    wanted: jax.Array,
    chunk: int,
) -> tuple[jax.Array, ...]:
    """What `read` makes of the logits of the wanted tokens: arrays [B, S], 0 elsewhere.

    Each row's wanted positions are brought to its front, so that a chunk in which no row has any is
    skipped: prompts and padding never meet the vocabulary, and at most [B, chunk, V] logits exist
    at a time (recomputed in the backward pass).
    """
    wanted = wanted[:, 1:]
    # Every row is reordered on its own: nothing moves between devices.
    order = jnp.argsort(~wanted, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden[:, :-1], order[..., None], axis=1)
    targets, wanted = (jnp.take_along_axis(x, order, axis=1) for x in (tokens[:, 1:], wanted))
    # Devices split the vocabulary, not the rows, over fsdp: a chunk of hidden states is gathered in
    # place of the head, whose gradient would else be whole on every device, in float32, and added
    # up over all of them for every chunk.
    rows, vocab = (
        ("loss_rows", "loss_vocab") if divides("loss_vocab", head.shape[0]) else ("batch", "vocab")
    )
    head = constrain(
        constrain(head, "vocab", "embed"), vocab, "hidden"
    )  # the former says where its gradient belongs

    def of_chunk(hidden: jax.Array, targets: jax.Array, wanted: jax.Array) -> tuple[jax.Array, ...]:
        hidden, targets = (
            constrain(hidden, rows, "length", "hidden"),
            constrain(targets, rows, "length"),
        )
        weight = constrain(head, vocab, "hidden").astype(
            hidden.dtype
        )  # cast here: chunks' gradients add up in head's dtype
        logits = jnp.einsum("bcd,vd->bcv", hidden, weight, preferred_element_type=jnp.float32)
        read_off = read(constrain(logits, rows, "length", vocab), targets)
        return tuple(jnp.where(wanted, constrain(x, "batch", "length"), 0) for x in read_off)

    def skipped(hidden: jax.Array, targets: jax.Array, wanted: jax.Array) -> tuple[jax.Array, ...]:
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_chunk, hidden, targets, wanted)
        )

    def add_chunk(_: None, parts: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        return None, jax.lax.cond(parts[2].any(), of_chunk, skipped, *parts)

    chunks = tuple(_chunks(x, min(chunk, x.shape[1])) for x in (hidden, targets, wanted))
    _, found = jax.lax.scan(jax.checkpoint(add_chunk, prevent_cse=False), None, chunks)
    back = jnp.argsort(order, axis=1)
    return tuple(
        jnp.pad(jnp.take_along_axis(_rows(x, order.shape[1]), back, axis=1), [(0, 0), (1, 0)])
        for x in found
    )


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [ceil(S / chunk), B, chunk, ...]; the last one is filled up with zeros (not
    wanted)."""
    missing = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _rows(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunks` for [chunks, B, chunk]: [B, length]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length]


def _logprob(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A comparison in place of a gather: it fuses, and it stays local where the vocabulary is split.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.where(is_target, logits, 0).sum(-1) - jax.nn.logsumexp(logits, axis=-1)


def _entropy(logits: jax.Array) -> jax.Array:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return -(jnp.exp(logprobs) * logprobs).sum(-1)
