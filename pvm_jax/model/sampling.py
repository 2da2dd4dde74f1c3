"""Which token comes next, by the logits and what the caller asks for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_STOP_TOKENS = 8
"""Their number is rounded up to a multiple of this, so that most programs are the same."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "stop_tokens"],
    meta_fields=["top_k"],
)
@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    The compiled programs depend on `top_k`, on what is None and on how many `stop_tokens` there
    are. Another temperature, `top_p` or stop token compiles nothing.

    Attributes:
        temperature: above 0; None is greedy.
        stop_tokens: ids that end a row; a negative one is none.
    """

    temperature: float | jax.Array | None
    top_k: int | None
    top_p: float | jax.Array | None
    stop_tokens: Sequence[int] | np.ndarray


def make_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop_tokens: Sequence[int],
    vocab_size: int,
) -> Sampling:
    """A Sampling of what a caller gives; temperature 0 is greedy.

    Raises:
        ValueError: for what is out of its range.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must be in [1, {vocab_size}], got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    ends = [-1, *stop_tokens]
    return Sampling(
        temperature=float(temperature) if temperature else None,
        top_k=top_k,
        top_p=None if top_p is None else float(top_p),
        stop_tokens=np.pad(ends, (0, -len(ends) % _STOP_TOKENS), constant_values=-1).astype(
            np.int32
        ),
    )


def choose(
    logits: jax.Array,
    keys: jax.Array,
    emitted: jax.Array,
    sampling: Sampling,
    never: tuple[int, ...],
) -> jax.Array:
    """The samples' token number `emitted`, int32 [rows].

    Args:
        logits: [rows, vocab].
        keys: [rows], the samples' own.
        never: ids that are not chosen.
    """
    logits = logits.at[:, jnp.asarray(never)].set(-jnp.inf)
    if sampling.temperature is None:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ranked), -1) - jax.nn.softmax(ranked)
        least = jnp.min(jnp.where(before < sampling.top_p, ranked, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, emitted)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
