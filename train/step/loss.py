"""What a large vocabulary says of a batch's tokens, without the logits of the whole batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pvm_jax.sharding import constrain, divides

Found = tuple[jax.Array, ...]
OfLogits = Callable[[jax.Array, jax.Array], Found]
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

    def read(*logits: jax.Array) -> Found:
        return (_logprob(*logits),)

    found: Any = _chunked(read, chunk, hidden, _placed(head), tokens, loss_weights != 0)
    (logprobs,) = found
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

    found: Any = _chunked(read, chunk, hidden, _placed(head), tokens, wanted)
    logprobs, entropy = found
    return logprobs, entropy


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    read: OfLogits,
    chunk: int,
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    wanted: jax.Array,
) -> Found:
    """What `read` makes of the logits of the wanted tokens: arrays [B, S], 0 elsewhere. Only the
    first of them may pass a gradient on.

    Of a head that is not trained, a logit's gradient is needed for the hidden state alone, and that
    state has one: the forward pass takes it while the logits are there (`_forward`), where jax.grad
    would compute them a second time.
    """
    return _as_targets(_over_chunks(partial(_of_chunk, read, head), chunk, hidden, tokens, wanted))


def _forward(
    read: OfLogits, chunk: int, hidden: Any, head: Any, tokens: Any, wanted: Any
) -> tuple[Found, Any]:
    """What `_chunked` returns, and what `_backward` needs: the first array's slopes by hidden
    state, [B, S, D], or how to pull a gradient back to a head that is trained too."""
    rest = tokens.value, wanted.value
    if head.perturbed:

        def whole(hidden: jax.Array, head: jax.Array) -> Found:
            of_chunk = partial(_of_chunk, read, head)
            return _as_targets(_over_chunks(of_chunk, chunk, hidden, *rest))

        return jax.vjp(whole, hidden.value, head.value)

    def with_slopes(hidden: jax.Array, *rest: jax.Array) -> tuple[Found, jax.Array]:
        def first(hidden: jax.Array) -> tuple[jax.Array, Found]:
            found = _of_chunk(read, head.value, hidden, *rest)
            return found[0], found

        ones, pull, found = jax.vjp(first, hidden, has_aux=True)
        return found, constrain(*pull(jnp.ones_like(ones)), "batch", "length", "hidden")

    found, slopes = _over_chunks(with_slopes, chunk, hidden.value, *rest)
    return _as_targets(found), slopes


def _backward(read: OfLogits, chunk: int, kept: Any, gradients: Found) -> tuple[Any, ...]:
    of_first, *of_others = (_instantiated(gradient) for gradient in gradients)
    if isinstance(kept, jax.Array):
        return (_following(of_first)[..., None] * kept).astype(kept.dtype), None, None, None
    return *kept((of_first, *of_others)), None, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def _instantiated(gradient: Any) -> jax.Array:
    """`gradient`, which may be a jax.custom_derivatives.SymbolicZero, as an array."""
    if isinstance(gradient, jax.Array):
        return gradient
    return jnp.zeros(gradient.shape, gradient.dtype)


def _placed(head: jax.Array) -> jax.Array:
    """As `_axes` says; and its gradient comes back to where the head was."""
    return constrain(constrain(head, "vocab", "embed"), _axes(head)[1], "hidden")


def _axes(head: jax.Array) -> tuple[str, str]:
    """What devices split of logits: the vocabulary, not the rows, over fsdp. A chunk of hidden
    states is gathered in place of the head, whose gradient would else be whole on every device, in
    float32, and added up over all of them for every chunk."""
    if divides("loss_vocab", head.shape[0]):
        return "loss_rows", "loss_vocab"
    return "batch", "vocab"


def _of_chunk(
    read: OfLogits, head: jax.Array, hidden: jax.Array, targets: jax.Array, wanted: jax.Array
) -> Found:
    """Of `chunk` positions, hidden [B, chunk, D]."""
    rows, vocab = _axes(head)
    hidden, targets = (
        constrain(hidden, rows, "length", "hidden"),
        constrain(targets, rows, "length"),
    )
    weight = constrain(head, vocab, "hidden").astype(
        hidden.dtype
    )  # cast here: chunks' gradients add up in head's dtype
    logits = jnp.einsum("bcd,vd->bcv", hidden, weight, preferred_element_type=jnp.float32)
    found = read(constrain(logits, rows, "length", vocab), targets)
    return tuple(jnp.where(wanted, constrain(x, "batch", "length"), 0) for x in found)


def _over_chunks(
    of_chunk: Callable, chunk: int, hidden: jax.Array, tokens: jax.Array, wanted: jax.Array
) -> Any:
    """`of_chunk` of hidden states, the tokens that follow them and whether those are wanted, chunk
    after chunk: a tree of arrays [B, S, ...], 0 where not wanted.

    Each row's wanted positions are brought to its front, so that a chunk in which no row has any is
    skipped: prompts and padding never meet the vocabulary, and at most [B, chunk, V] logits exist
    at a time (jax.grad computes them again).
    """
    targets, wanted = _following(tokens), _following(wanted)
    # Every row is reordered on its own: nothing moves between devices.
    order = jnp.argsort(~wanted, axis=1, stable=True)
    ordered = [_reordered(x, order) for x in (hidden, targets, wanted)]

    def skipped(*parts: jax.Array) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_chunk, *parts))

    def next_chunk(_: None, parts: tuple[jax.Array, ...]) -> tuple[None, Any]:
        return None, jax.lax.cond(parts[2].any(), of_chunk, skipped, *parts)

    chunks = tuple(_chunks(x, min(chunk, x.shape[1])) for x in ordered)
    _, found = jax.lax.scan(jax.checkpoint(next_chunk, prevent_cse=False), None, chunks)
    back = jnp.argsort(order, axis=1)
    return jax.tree.map(lambda x: _reordered(_rows(x, order.shape[1]), back), found)


def _following(x: jax.Array) -> jax.Array:
    """[B, S]: of each token, what `x` says of the next; 0 of the last one."""
    return jnp.pad(x[:, 1:], [(0, 0), (0, 1)])


def _as_targets(found: Found) -> Found:
    """The inverse of `_following`: 0 of a row's first token, which none precedes."""
    return tuple(jnp.pad(x[:, :-1], [(0, 0), (1, 0)]) for x in found)


def _reordered(x: jax.Array, order: jax.Array) -> jax.Array:
    """[B, S, ...], each row in the order of [B, S]."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [ceil(S / chunk), B, chunk, ...]; the last one is filled up with zeros (not
    wanted)."""
    missing = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _rows(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunks`: [B, length, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def _logprob(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A comparison in place of a gather: it fuses, and it stays local where the vocabulary is split.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.where(is_target, logits, 0).sum(-1) - jax.nn.logsumexp(logits, axis=-1)


def _entropy(logits: jax.Array) -> jax.Array:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return -(jnp.exp(logprobs) * logprobs).sum(-1)
