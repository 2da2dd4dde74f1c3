"""Sampling: what may be drawn, when rows end, and that a row's sample is its own; caches, chunks
and chats."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from pvm_jax import (
    Batch,
    Chat,
    Example,
    Qwen3VL,
    abstract_model,
    generate,
    generation,
    stream,
    without_pvm,
)
from pvm_jax.generation import PREFILL_CHUNK, Sampling, decode_loop, prefill
from pvm_jax.model import memory, pieces
from pvm_jax.model.attention_kernels import attention
from pvm_jax.model.vision import VisionTower
from tests import tiny
from tests.close import assert_close
from tests.tiny import CONFIG, EXAMPLES, randomized

STEPS = 8


@pytest.fixture(scope="module")
def model() -> Qwen3VL:
    """A layer with a branch: it compiles fast."""
    return randomized(tiny.cut(CONFIG))


@pytest.fixture(scope="module")
def deep() -> Qwen3VL:
    """One layer of every kind."""
    return randomized(tiny.cut(CONFIG, layers=2))


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch.from_rows([[e] for e in EXAMPLES], CONFIG, length=48, patches=64)


@pytest.fixture(scope="module")
def greedy(model, batch):
    return generate(model, batch, max_new_tokens=STEPS, temperature=0.0)


def continued(e: Example, tokens) -> Example:
    return dataclasses.replace(e, input_ids=np.append(e.input_ids, tokens), loss_mask=None)


def forward(of: Qwen3VL, rows: list[list[Example]]) -> np.ndarray:
    """Logits, in the one shape that these tests compile for."""
    return np.array(of(Batch.from_rows(rows, of.config, length=128, patches=64)))


def uncached(of: Qwen3VL, examples: list[Example], steps: int) -> np.ndarray:
    """Greedy tokens [B, steps], each from a forward pass over everything before it."""
    written = np.zeros((len(examples), 0), int)
    while written.shape[1] < steps:
        rows = [[continued(e, more)] for e, more in zip(examples, written, strict=True)]
        logits = forward(of, rows)
        logits[..., [CONFIG.image_token_id, CONFIG.video_token_id]] = -np.inf
        last = [len(row[0].input_ids) - 1 for row in rows]
        written = np.append(written, logits[range(len(rows)), last].argmax(-1)[:, None], 1)
    return written


def test_log_probabilities_are_the_forward_pass(model, batch):
    """Teacher-forced on what was sampled, at a temperature, for each of a prompt's samples."""
    sampled = generate(
        model, batch, max_new_tokens=STEPS, temperature=0.7, num_samples=2, rng=jax.random.key(3)
    )
    for sample in range(2):
        tokens, logprobs = (
            np.asarray(sampled.tokens)[sample::2],
            np.asarray(sampled.logprobs)[sample::2],
        )
        rows = [[continued(e, more)] for e, more in zip(EXAMPLES, tokens, strict=True)]
        want = np.asarray(jax.nn.log_softmax(forward(model, rows) / 0.7, -1))
        for row, e in enumerate(EXAMPLES):
            columns = len(e.input_ids) - 1 + np.arange(STEPS)
            assert_close(logprobs[row], want[row, columns, tokens[row]], 1e-5)


def test_samples_share_their_prompts_prefill_and_memory(model, batch, greedy, monkeypatch):
    """The tower, the memories and the prompts' keys have a row a prompt; all samples of a greedy
    run are the greedy answer."""
    encoded = []
    encode = VisionTower.__call__

    def count(self, patches, *rest):
        encoded.append(patches.shape[0])
        return encode(self, patches, *rest)

    monkeypatch.setattr(VisionTower, "__call__", count)
    kept = []
    monkeypatch.setattr(
        generation, "prefill", lambda *args, **how: kept.append(prefill(*args, **how)) or kept[-1]
    )
    got = generate(model, batch, max_new_tokens=STEPS, temperature=0.0, num_samples=3)
    ((cache, state),) = kept
    assert encoded == [len(EXAMPLES)]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(cache.memories)} == {len(EXAMPLES)}
    assert cache.prompts.keys.shape[1] == len(EXAMPLES)
    assert state.samples.keys.shape[1:4:2] == (len(EXAMPLES), 3)
    np.testing.assert_array_equal(got.tokens, np.repeat(greedy.tokens, 3, 0))
    np.testing.assert_array_equal(got.lengths, np.repeat(greedy.lengths, 3))


def test_the_layers_of_a_step_do_not_carry_the_cache(deep, batch, monkeypatch):
    """They read it where it lies, and the token is written into all layers at once (DecodingStep
    says why)."""
    graphdef, params = nnx.split(deep)
    keys = jax.random.split(jax.random.key(0), (len(EXAMPLES), 1))
    how = {"sampling": Sampling(None, None, None, ()), "chunk": PREFILL_CHUNK, "past": None}
    read = functools.partial(prefill, graphdef, max_new_tokens=STEPS, slots=STEPS, **how)
    cache, state = jax.eval_shape(read, nnx.as_pure(params), batch, keys)
    carried, written = [], []
    scan, write = jax.lax.scan, jax.lax.dynamic_update_slice_in_dim

    def counted_scan(step, carry, xs):
        carried.extend(leaf.shape for leaf in jax.tree.leaves(carry))
        return scan(step, carry, xs)

    def counted_write(whole, part, start, axis):
        written.append(whole.shape)
        return write(whole, part, start, axis)

    monkeypatch.setattr(jax.lax, "scan", counted_scan)
    monkeypatch.setattr(jax.lax, "dynamic_update_slice_in_dim", counted_write)
    args = (state.token, state.token, state.segment_ids, cache, state.samples, state.emitted)
    jax.eval_shape(functools.partial(pieces.decode, deep), *args)
    assert tuple(np.delete(state.samples.keys.shape, 4)) in carried
    assert state.samples.keys.shape not in carried
    assert written == [state.samples.keys.shape] * 2


def test_a_sample_depends_on_nothing_but_its_prompt_seed_and_number(model, batch):
    """Alone with other padding, or with other prompts; one of two samples, or the only one. Others
    differ."""
    how = {"max_new_tokens": STEPS, "temperature": 0.7, "rng": jax.random.key(1)}
    together = generate(model, batch, num_samples=2, seeds=(7, 8, 9, 8), **how)
    tokens = np.asarray(together.tokens).reshape(len(EXAMPLES), 2, STEPS)
    length = len(EXAMPLES[2].input_ids)
    arrays = {
        "input_ids": np.concatenate([np.zeros(13, int), EXAMPLES[2].input_ids])[None],
        "attention_mask": np.repeat([0, 1], [13, length])[None],
        "pixel_values": EXAMPLES[2].pixel_values,
        "image_grid_thw": EXAMPLES[2].image_grid_thw,
    }
    alone = generate(model, Batch.from_hf(arrays, CONFIG), seeds=(9,), **how)
    np.testing.assert_array_equal(alone.tokens[0], tokens[2, 0])
    assert len(np.unique(tokens.reshape(-1, STEPS), axis=0)) == tokens.shape[0] * 2
    default = generate(model, batch, num_samples=2, **how)
    assert (np.asarray(default.tokens) != np.asarray(together.tokens)).any(1).all()


def test_a_cache_that_grows_by_buckets_gives_the_uncached_tokens(deep, batch, monkeypatch):
    """Over three sizes of the cache, with a prompt that is read in chunks; streamed alike."""
    monkeypatch.setattr(generation, "FIRST_SLOTS", 4)
    want = uncached(deep, EXAMPLES, 14)
    got = generate(deep, batch, max_new_tokens=14, temperature=0.0, prefill_chunk=20)
    np.testing.assert_array_equal(got.tokens, want)
    streamed = stream(deep, batch, max_new_tokens=14, temperature=0.0, prefill_chunk=20)
    np.testing.assert_array_equal(np.stack(list(streamed), 1), want)


def test_a_later_turns_images_join_those_in_memory(model, monkeypatch):
    """Three turns, the second with other images, against a forward pass over the whole
    conversation."""
    text = dataclasses.replace(model.config.text, pvm_visibility="preceding")
    config = dataclasses.replace(model.config, text=text)
    preceding = nnx.merge(nnx.graphdef(abstract_model(config)), nnx.state(model))
    chat, whole, caches = Chat(preceding), None, []

    def kept(*args, **static):
        cache, state = prefill(*args, **static)
        caches.append(cache)
        return cache, state

    monkeypatch.setattr(generation, "prefill", kept)
    for turn in (EXAMPLES[0], EXAMPLES[2], EXAMPLES[1]):
        ids = turn.input_ids if chat.unread is None else np.append(chat.unread, turn.input_ids)
        new = Batch.from_rows(
            [[dataclasses.replace(turn, input_ids=ids, loss_mask=None)]],
            CONFIG,
            length=48,
            patches=64,
        )
        answer = list(chat.stream(new, max_new_tokens=5, temperature=0.0, prefill_chunk=20))
        whole = turn if whole is None else joined(whole, turn)
        np.testing.assert_array_equal(answer, uncached(preceding, [whole], 5)[0])
        # What was read: no empty slot, nothing twice.
        assert (caches[-1].prompts.segment_ids > 0).sum() == len(whole.input_ids)
        whole = continued(whole, answer)
    with pytest.raises(ValueError, match="one conversation"):
        next(
            chat.stream(
                Batch.from_rows([[EXAMPLES[1]]] * 2, CONFIG, length=16, patches=0), max_new_tokens=1
            )
        )


def test_a_gpus_kernel_sees_all_images_of_a_later_turn(model, monkeypatch):
    """The memory has padding in its middle then, which cuDNN must not take for an image."""
    turns = [Batch.from_rows([[EXAMPLES[i]]], CONFIG, length=128, patches=64) for i in (0, 2)]

    def read():
        _, past = pieces.prefill(model, turns[0])
        return pieces.prefill(model, turns[1], past=past)[0]

    want, asked = read(), []

    def on_a_gpu(*arrays, **how):
        asked.append(how["limits"])
        return attention(*arrays, **how | {"kernel": "cudnn", "interpret": True})

    monkeypatch.setattr(memory, "attention", on_a_gpu)
    assert_close(read(), want, 1e-5)
    assert [limits is None for limits in asked] == [True, False]


def joined(a: Example, b: Example) -> Example:
    pixels = [x for x in (a.pixel_values, b.pixel_values) if x is not None]
    grids = [x for x in (a.image_grid_thw, b.image_grid_thw) if x is not None]
    return Example(
        np.append(a.input_ids, b.input_ids), np.concatenate(pixels), np.concatenate(grids)
    )


def test_a_decoding_step_copies_neither_weights_nor_cache():
    """The compiled loop holds two layers' worth beside them, and all of its state is updated in
    place."""
    text = dataclasses.replace(
        CONFIG.text, num_hidden_layers=24, pvm_layers=(8,), hidden_size=64, intermediate_size=256
    )
    vision = dataclasses.replace(CONFIG.vision, out_hidden_size=64)
    graphdef, params = nnx.split(
        abstract_model(dataclasses.replace(CONFIG, text=text, vision=vision))
    )
    params = nnx.as_pure(params)
    prompt = Batch.empty(CONFIG, rows=2, length=512, patches=64)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (2, 2)))
    sampling = Sampling(None, None, None, ())
    read = functools.partial(
        prefill, graphdef, past=None, sampling=sampling, max_new_tokens=256, slots=256, chunk=512
    )
    cache, state = jax.eval_shape(read, params, prompt, keys)
    used = (
        decode_loop.lower(graphdef, params, cache, state, 256, sampling).compile().memory_analysis()
    )
    weights, stored = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for tree in (params, (cache, state))
    )
    assert used.temp_size_in_bytes < 2 / 24 * (weights + stored) < min(weights, stored)
    assert used.alias_size_in_bytes >= sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(state.samples)
    )


def test_the_branch_can_be_left_out(model, batch, greedy):
    base = without_pvm(model)
    got = generate(base, batch, max_new_tokens=STEPS, temperature=0.0)
    np.testing.assert_array_equal(got.tokens, uncached(base, EXAMPLES, STEPS))
    assert (np.asarray(got.tokens) != np.asarray(greedy.tokens)).any()


MANY = {"max_new_tokens": STEPS, "num_samples": 30}


@pytest.mark.parametrize(
    "narrow", [{"top_p": 1e-6}, pytest.param({"top_k": 1}, marks=pytest.mark.slow)]
)
def test_narrow_sampling_is_greedy(model, batch, greedy, narrow):
    got = generate(model, batch, temperature=2.0, **MANY, **narrow)
    np.testing.assert_array_equal(got.tokens, np.repeat(greedy.tokens, 30, 0))


def test_top_k_and_top_p_keep_the_likeliest(model, batch):
    logits = forward(model, [[e] for e in EXAMPLES])[0, len(EXAMPLES[0].input_ids) - 1]
    logits[[CONFIG.image_token_id, CONFIG.video_token_id]] = -np.inf
    ranked = np.argsort(-logits)
    share = np.cumsum(np.sort(np.exp(logits - logits.max()))[::-1])
    share /= share[-1]
    allowed = {"top_k": set(ranked[:3]), "top_p": set(ranked[: int((share < 0.5).sum()) + 1])}
    for how in ({"top_k": 3, "max_new_tokens": 1}, {"top_p": 0.5}):
        got = generate(model, batch, **MANY | how)
        drawn, (name, *_) = set(np.asarray(got.tokens)[:30, 0].tolist()), how
        assert drawn <= allowed[name]
        assert len(drawn) > 1 or len(allowed[name]) == 1


def test_another_temperature_top_p_or_stop_token_compiles_nothing(model, batch, greedy):
    """And is heeded."""
    want, programs = np.repeat(greedy.tokens, 30, 0), []
    for temperature, top_p, stop, same in (
        (1e-5, 1.0, (), True),
        (50.0, 1e-6, (), True),
        (50.0, 1.0, (), False),
        (50.0, 1e-6, (int(want[0, 0]),), False),
    ):
        how = {"temperature": temperature, "top_p": top_p, "stop_tokens": stop}
        assert np.array_equal(generate(model, batch, **MANY, **how).tokens, want) == same
        programs.append((prefill._cache_size(), decode_loop._cache_size()))
    assert len(set(programs)) == 1


def test_placeholders_are_never_drawn(model, batch):
    how = {"max_new_tokens": STEPS, "temperature": 50.0, "num_samples": 2}
    keys = jax.random.split(jax.random.key(0), 12)
    drawn = {
        *np.unique([generate(model, batch, rng=key, **how).tokens for key in keys]).tolist(),
    }
    assert not drawn & {CONFIG.image_token_id, CONFIG.video_token_id}
    assert len(drawn) > 60  # at this temperature nearly everything else is


def test_a_row_ends_at_the_checkpoints_own_stop_token(model, batch, greedy):
    own = int(greedy.tokens[0, 3])
    graphdef, params = nnx.split(model)
    told = nnx.merge(graphdef, params)
    told.config = dataclasses.replace(model.config, stop_tokens=(own,))
    got = generate(told, batch, max_new_tokens=STEPS, temperature=0.0)
    assert got.lengths[0] == np.flatnonzero(np.asarray(greedy.tokens[0]) == own)[0] + 1 < STEPS


def test_rows_end_at_their_stop_token(model, batch, greedy):
    stop = int(greedy.tokens[0, 3])
    got = generate(model, batch, max_new_tokens=STEPS, temperature=0.0, stop_tokens=(stop,))
    for row in range(len(EXAMPLES)):
        where = np.flatnonzero(np.asarray(greedy.tokens[row]) == stop)
        length = int(where[0]) + 1 if len(where) else STEPS
        assert got.lengths[row] == length
        np.testing.assert_array_equal(got.tokens[row, :length], greedy.tokens[row, :length])
        assert not np.asarray(got.tokens[row, length:]).any()
        assert not np.asarray(got.logprobs[row, length:]).any()
    first = np.asarray(greedy.tokens[:, 0]).tolist()
    how = {"max_new_tokens": STEPS, "temperature": 0.0, "stop_tokens": first}
    assert len(list(stream(model, batch, **how))) == 1  # all ended


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new"),
        ({"num_samples": 0}, "num_samples"),
        ({"seeds": (1, 2)}, "seeds must be one for each of the 4 prompts"),
        ({"seeds": (1, 2, 3, 2**31)}, r"in \[0, 2\^31\), got"),
    ],
)
def test_settings_out_of_range_are_refused(model, batch, bad, named):
    with pytest.raises(ValueError, match=named):
        generate(model, batch, **{"max_new_tokens": 4} | bad)
