"""Generation: one prefill a prompt, then one compiled loop over a cache that grows by buckets."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pvm_jax.data.batch import Batch, bucket_size
from pvm_jax.model import pieces
from pvm_jax.model.cache import Cache, PromptCache, SampleCache
from pvm_jax.model.qwen3_vl import Qwen3VL
from pvm_jax.model.sampling import Sampling, choose, make_sampling

FIRST_SLOTS = 256
"""Generated tokens that the first cache has slots for; a full one is doubled. One compilation of
the loop for each size."""

PREFILL_CHUNK = 1024
"""Columns of the prompts that are read at a time, at most, unless the caller says otherwise."""


class Generation(NamedTuple):
    """What was generated; row p * num_samples + n is sample n of prompt p.

    Attributes:
        tokens: [B * num_samples, max_new_tokens] int32; 0 after a row's end.
        logprobs: [B * num_samples, max_new_tokens] float32: log-probability of each token under
            softmax(logits / temperature) over the whole vocabulary (temperature 1 for greedy),
            before top-k and top-p; 0 after a row's end.
        lengths: [B * num_samples] int32: tokens of each row, its stop token included.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array


class _State(NamedTuple):
    """The loop's carry, for N samples of each of B prompts.

    `token` [B, samples] is emitted but not yet read by the decoder; `position` and `segment_ids`
    [B] are its; `output` is a Generation with [B, samples] in front; `keys` [B, samples] are the
    samples' own.
    """

    samples: SampleCache
    token: jax.Array
    position: jax.Array
    segment_ids: jax.Array
    emitted: jax.Array
    done: jax.Array
    output: Generation
    keys: jax.Array


class _Run(NamedTuple):
    """What a generation reads and does not change."""

    graphdef: nnx.GraphDef
    params: nnx.State
    cache: Cache
    sampling: Sampling


class Settings(TypedDict, total=False):
    """How `generate`, `stream` and `Chat` sample.

    temperature: 0 is greedy; the default is 1.
    top_k, top_p: sample among the k likeliest tokens / the smallest set of tokens with this
        probability.
    stop_tokens: ids that end a row; the default is the checkpoint's own, () lets no token end it.
    num_samples: of each prompt. They share its prefill, its keys and values and its memory; the
        default is 1.
    seeds: [B] integers in [0, 2^31), one a prompt; the default is its row. A row's sample depends
        on `rng`, this seed, the sample's number and the prompt alone: not on what else is in the
        batch, nor on padding.
    rng: a key; the default is `jax.random.key(0)`.
    prefill_chunk: columns of the prompts that are read at a time, at most. Longer prompts are read
        in pieces, which bounds prefill's memory.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    stop_tokens: Sequence[int]
    num_samples: int
    seeds: Sequence[int] | None
    rng: jax.Array | None
    prefill_chunk: int


def generate(
    model: Qwen3VL, batch: Batch, *, max_new_tokens: int, **settings: Unpack[Settings]
) -> Generation:
    """Continues every row of `batch` (one prompt a row, of any length, padded on any side).

    Args:
        max_new_tokens: tokens at most; every row ends there or at its stop token.
        settings: see Settings.

    Image and video placeholders are never generated.

    Raises:
        ValueError: for a setting out of its range.
    """
    run, state = _start(model, batch, max_new_tokens, **settings)
    if max_new_tokens > 1:
        state = _advance(run, state, max_new_tokens)
    return _flat(state.output)


def stream(
    model: Qwen3VL, batch: Batch, *, max_new_tokens: int, **settings: Unpack[Settings]
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, [B * num_samples] at a time, as they come. A row that has ended
    gives 0."""
    run, state = _start(model, batch, max_new_tokens, **settings)
    for step in _steps(run, state, max_new_tokens):
        yield np.asarray(step.token).reshape(-1)


class Chat:
    """One conversation whose cache lives on between turns: a new turn is read once, its images join
    those in memory.

    What was read before is not read again, so that earlier turns do not recall the later ones'
    images. For a model with pvm_visibility "preceding" the answers are those of a forward pass over
    the whole conversation.
    """

    def __init__(self, model: Qwen3VL):
        self.model = model
        self._last: tuple[Cache, _State] | None = None

    @property
    def unread(self) -> int | None:
        """The last token of the last answer: the model has written, but not read it. None before
        the first."""
        return None if self._last is None else int(self._last[1].token[0, 0])

    def stream(
        self, batch: Batch, *, max_new_tokens: int, **settings: Unpack[Settings]
    ) -> Iterator[int]:
        """The answer's tokens as they come, the stop token included. What is not taken to its end
        leaves the chat as it was.

        Args:
            batch: one row, the conversation's next tokens: all from `unread` on, unless that is a
                stop token which they bring themselves.

        Raises:
            ValueError: if the batch has more than one row, or `num_samples` is not 1; for a setting
                out of its range.
        """
        if batch.tokens.shape[0] != 1 or settings.get("num_samples", 1) != 1:
            raise ValueError(
                f"a chat is one conversation with one answer, got {batch.tokens.shape[0]} rows"
            )
        past = None
        if self._last is not None:
            cache, state = self._last
            length = int(state.output.lengths[0, 0])
            slots = bucket_size(int(jnp.sum(cache.prompts.segment_ids > 0)) + length)
            past = _fold(cache, state, slots)
            batch = replace(batch, positions=batch.positions + int(state.position[0]) + length)
        run, state = _start(self.model, batch, max_new_tokens, past, **settings)
        for step in _steps(run, state, max_new_tokens):
            state = step
            yield int(step.token[0, 0])
        self._last = run.cache, state


def _start(
    model: Qwen3VL,
    batch: Batch,
    max_new_tokens: int,
    past: Cache | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] | None = None,
    num_samples: int = 1,
    seeds: Sequence[int] | None = None,
    rng: jax.Array | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> tuple[_Run, _State]:
    """Checks the settings and prefills."""
    rows = batch.tokens.shape[0]
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("num_samples", num_samples),
        ("prefill_chunk", prefill_chunk),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seeds is not None and (len(seeds) != rows or not all(0 <= seed < 2**31 for seed in seeds)):
        raise ValueError(
            f"seeds must be one for each of the {rows} prompts, in [0, 2^31), got {list(seeds)}"
        )
    ends = model.config.stop_tokens if stop_tokens is None else stop_tokens
    sampling = make_sampling(temperature, top_k, top_p, ends, model.config.text.vocab_size)
    graphdef, params = nnx.split(model)
    params = nnx.as_pure(params)
    keys = _sample_keys(
        jax.random.key(0) if rng is None else rng,
        np.asarray(range(rows) if seeds is None else seeds, np.int32),
        num_samples,
    )
    slots = min(FIRST_SLOTS, max_new_tokens)
    cache, state = prefill(
        graphdef,
        params,
        batch,
        keys,
        past,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        slots=slots,
        chunk=prefill_chunk,
    )
    return _Run(graphdef, params, cache, sampling), state


@partial(jax.jit, static_argnames="num_samples")
def _sample_keys(rng: jax.Array, seeds: np.ndarray, num_samples: int) -> jax.Array:
    """[B, num_samples]."""

    def key(seed: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(rng, seed), number)

    return jax.vmap(
        lambda seed: jax.vmap(lambda number: key(seed, number))(jnp.arange(num_samples))
    )(seeds)


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "slots", "chunk"))
def prefill(
    graphdef,
    params,
    batch: Batch,
    keys: jax.Array,
    past: Cache | None,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    slots: int,
    chunk: int,
) -> tuple[Cache, _State]:
    """Reads the prompts and emits every sample's first token; `keys` [B, samples]."""
    model: Qwen3VL = nnx.merge(graphdef, params)
    hidden, cache = pieces.prefill(model, batch, chunk=chunk, past=past)
    state = _State(
        samples=SampleCache.empty(model.config, keys.shape[0], keys.shape[1], slots),
        token=jnp.zeros(keys.shape, jnp.int32),
        position=jnp.max(
            jnp.where(batch.segment_ids[:, None] > 0, batch.positions, 0), axis=(1, 2)
        ),
        segment_ids=jnp.max(batch.segment_ids, axis=1),
        emitted=jnp.asarray(0),
        done=jnp.zeros(keys.shape, bool),
        output=Generation(
            tokens=jnp.zeros((*keys.shape, max_new_tokens), jnp.int32),
            logprobs=jnp.zeros((*keys.shape, max_new_tokens), jnp.float32),
            lengths=jnp.zeros(keys.shape, jnp.int32),
        ),
        keys=keys,
    )
    return cache, _emit(model, state, jnp.repeat(hidden, keys.shape[1], 1), sampling)


def _steps(run: _Run, state: _State, max_new_tokens: int) -> Iterator[_State]:
    """The state after each token; asking for the next one invalidates it."""
    yield state
    for emitted in range(1, max_new_tokens):
        if np.asarray(state.done).all():
            return
        state = _advance(run, state, emitted + 1)
        yield state


def _advance(run: _Run, state: _State, until: int) -> _State:
    """Decodes until `until` tokens are emitted or every row is done, in a cache that is doubled
    when it is full."""
    while True:
        state = decode_loop(run.graphdef, run.params, run.cache, state, until, run.sampling)
        if state.samples.slots >= until - 1 or bool(jnp.all(state.done)):
            return state
        slots = min(2 * state.samples.slots, state.output.tokens.shape[-1])
        state = state._replace(samples=_grow(state.samples, slots))


@partial(jax.jit, static_argnames="slots")
def _grow(samples: SampleCache, slots: int) -> SampleCache:
    return samples.grown(slots)


@jax.jit
def _flat(output: Generation) -> Generation:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)


@partial(jax.jit, static_argnames="slots")
def _fold(cache: Cache, state: _State, slots: int) -> Cache:
    """The prompts' cache with what their one sample read in it, in `slots` slots, the empty ones
    last."""
    written = (
        jnp.arange(state.samples.slots) < state.output.lengths - 1
    )  # the last token was emitted, but never read
    segment_ids = jnp.where(written, state.segment_ids[:, None], 0)
    whole = cache.prompts.followed_by(
        PromptCache(state.samples.keys[:, :, :, 0], state.samples.values[:, :, :, 0], segment_ids)
    )
    return cache._replace(prompts=whole.compacted(slots))


@partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def decode_loop(
    graphdef, params, cache: Cache, state: _State, until: jax.Array | int, sampling: Sampling
) -> _State:
    """Decodes until `until` tokens are emitted, the samples' slots are full or every row is
    done."""
    model: Qwen3VL = nnx.merge(graphdef, params)

    def wanted(state: _State) -> jax.Array:
        return (
            (state.emitted < until) & (state.emitted <= state.samples.slots) & ~jnp.all(state.done)
        )

    def step(state: _State) -> _State:
        slot = state.emitted - 1
        positions = jnp.broadcast_to((state.position + state.emitted)[:, None], state.token.shape)
        hidden, samples = pieces.decode(
            model, state.token, positions, state.segment_ids, cache, state.samples, slot
        )
        return _emit(model, state._replace(samples=samples), hidden, sampling)

    return jax.lax.while_loop(wanted, step, state)


def _emit(model: Qwen3VL, state: _State, hidden: jax.Array, sampling: Sampling) -> _State:
    """Chooses each sample's next token from hidden [B, samples, D] and records it."""
    logits = model.logits(hidden)
    never = (model.config.image_token_id, model.config.video_token_id)
    flat, keys = logits.reshape(-1, logits.shape[-1]), state.keys.reshape(-1)
    token = choose(flat, keys, state.emitted, sampling, never).reshape(state.token.shape)
    scaled = logits if sampling.temperature is None else logits / sampling.temperature
    logprobs = jax.nn.log_softmax(scaled)
    logprob = jnp.take_along_axis(logprobs, token[..., None], -1)[..., 0]
    token, logprob = jnp.where(state.done, 0, token), jnp.where(state.done, 0, logprob)
    output = Generation(
        tokens=state.output.tokens.at[..., state.emitted].set(token),
        logprobs=state.output.logprobs.at[..., state.emitted].set(logprob),
        lengths=state.output.lengths + ~state.done,
    )
    done = state.done | jnp.isin(token, jnp.asarray(sampling.stop_tokens, jnp.int32))
    return state._replace(token=token, emitted=state.emitted + 1, done=done, output=output)
