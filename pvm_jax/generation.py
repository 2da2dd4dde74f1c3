"""Generation: one prefill, then one jitted loop over a cache that holds the decoder's keys and values and the PVM memory."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pvm_jax.batch import Batch
from pvm_jax.model import Cache, Qwen3VL


class Generation(NamedTuple):
    """What was generated.

    Attributes:
        tokens: [B, max_new_tokens] int32; 0 after a row's end.
        logprobs: [B, max_new_tokens] float32: log-probability of each token under softmax(logits / temperature) over the
            whole vocabulary (temperature 1 for greedy), before top-k and top-p; 0 after a row's end.
        lengths: [B] int32: tokens of each row, its stop token included.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array


class _Sampling(NamedTuple):
    """What the compiled loop depends on."""

    temperature: float
    top_k: int | None
    top_p: float | None
    stop_tokens: tuple[int, ...]
    max_new_tokens: int


class _State(NamedTuple):
    """The loop's carry. `token` [B] is emitted but not yet read by the decoder."""

    cache: Cache
    token: jax.Array
    position: jax.Array
    segment_ids: jax.Array
    slot: jax.Array
    emitted: jax.Array
    done: jax.Array
    output: Generation
    keys: jax.Array


def generate(
    model: Qwen3VL,
    batch: Batch,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    rng: jax.Array | None = None,
) -> Generation:
    """Continues every row of `batch` (one prompt a row, of any length, padded on any side).

    Args:
        max_new_tokens: tokens at most; every row ends there or at its stop token.
        temperature: 0 is greedy.
        top_k, top_p: sample among the k likeliest tokens / the smallest set of tokens with this probability.
        stop_tokens: ids that end a row.
        rng: a key; None is `jax.random.key(0)`. A row's sample depends on the key, its index and its prompt alone.

    Image and video placeholders are never generated.

    Raises:
        ValueError: for a setting out of its range.
    """
    sampling = _Sampling(temperature, top_k, top_p, tuple(stop_tokens), max_new_tokens)
    graphdef, params, state = _start(model, batch, sampling, rng)
    return _loop(graphdef, params, state, max_new_tokens, sampling).output


def stream(
    model: Qwen3VL,
    batch: Batch,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    rng: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, [B] at a time, as they come. A row that has ended gives 0."""
    sampling = _Sampling(temperature, top_k, top_p, tuple(stop_tokens), max_new_tokens)
    graphdef, params, state = _start(model, batch, sampling, rng)
    for step in range(max_new_tokens):
        state = _loop(graphdef, params, state, step + 1, sampling)
        if step >= int(state.emitted):
            return
        yield np.asarray(state.output.tokens[:, step])


def _start(model: Qwen3VL, batch: Batch, sampling: _Sampling, rng: jax.Array | None) -> tuple[nnx.GraphDef, nnx.State, _State]:
    """Checks the settings and prefills: the model's structure, its parameters and the loop's first state."""
    _check(sampling, model)
    graphdef, params = nnx.split(model)
    params = nnx.as_pure(params)
    return graphdef, params, _prefill(graphdef, params, batch, jax.random.key(0) if rng is None else rng, sampling)


def _check(sampling: _Sampling, model: Qwen3VL) -> None:
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {sampling.max_new_tokens}")
    if sampling.temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {sampling.temperature}")
    if sampling.top_k is not None and not 1 <= sampling.top_k <= model.config.text.vocab_size:
        raise ValueError(f"top_k must be in [1, {model.config.text.vocab_size}], got {sampling.top_k}")
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {sampling.top_p}")


@partial(jax.jit, static_argnames=("graphdef", "sampling"))
def _prefill(graphdef, params, batch: Batch, rng: jax.Array, sampling: _Sampling) -> _State:
    """Reads the prompts and emits the first token."""
    model: Qwen3VL = nnx.merge(graphdef, params)
    rows, length = batch.tokens.shape
    hidden, cache = model.prefill(batch, slots=length + sampling.max_new_tokens)
    valid = batch.segment_ids > 0
    last = length - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    state = _State(
        cache=cache,
        token=jnp.zeros(rows, jnp.int32),
        position=jnp.max(jnp.where(valid[:, None], batch.positions, 0), axis=(1, 2)) + 1,
        segment_ids=jnp.take_along_axis(batch.segment_ids, last[:, None], 1)[:, 0],
        slot=jnp.asarray(length),
        emitted=jnp.asarray(0),
        done=jnp.zeros(rows, bool),
        output=Generation(
            tokens=jnp.zeros((rows, sampling.max_new_tokens), jnp.int32),
            logprobs=jnp.zeros((rows, sampling.max_new_tokens), jnp.float32),
            lengths=jnp.zeros(rows, jnp.int32),
        ),
        keys=jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows)),
    )
    return _emit(model, state, jnp.take_along_axis(hidden, last[:, None, None], 1), sampling)


@partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames="state")
def _loop(graphdef, params, state: _State, until: jax.Array | int, sampling: _Sampling) -> _State:
    """Decodes until `until` tokens are emitted or every row is done."""
    model: Qwen3VL = nnx.merge(graphdef, params)

    def step(state: _State) -> _State:
        hidden, cache = model.decode(state.token, state.position, state.segment_ids, state.cache, state.slot)
        state = state._replace(cache=cache, position=state.position + 1, slot=state.slot + 1)
        return _emit(model, state, hidden, sampling)

    return jax.lax.while_loop(lambda s: (s.emitted < until) & ~jnp.all(s.done), step, state)


def _emit(model: Qwen3VL, state: _State, hidden: jax.Array, sampling: _Sampling) -> _State:
    """Chooses each row's next token from hidden [B, 1, D] and records it."""
    logits = model.logits(hidden[:, 0])
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.emitted)
    token = _choose(logits, keys, sampling, (model.config.image_token_id, model.config.video_token_id))
    logprobs = jax.nn.log_softmax(logits / (sampling.temperature or 1.0))
    logprob = jnp.take_along_axis(logprobs, token[:, None], 1)[:, 0]
    token, logprob = jnp.where(state.done, 0, token), jnp.where(state.done, 0, logprob)
    output = Generation(
        tokens=state.output.tokens.at[:, state.emitted].set(token),
        logprobs=state.output.logprobs.at[:, state.emitted].set(logprob),
        lengths=state.output.lengths + ~state.done,
    )
    done = state.done | jnp.isin(token, jnp.asarray(sampling.stop_tokens, jnp.int32))
    return state._replace(token=token, emitted=state.emitted + 1, done=done, output=output)


def _choose(logits: jax.Array, keys: jax.Array, sampling: _Sampling, never: tuple[int, ...]) -> jax.Array:
    """[B, vocab] -> [B]."""
    logits = logits.at[:, jnp.asarray(never)].set(-jnp.inf)
    if sampling.temperature == 0:
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
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
