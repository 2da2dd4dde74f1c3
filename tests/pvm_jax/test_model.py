"""Properties that need no reference: neutrality of a fresh branch, packing, caching, static shapes,
meshes."""

import dataclasses
from contextlib import nullcontext
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from pvm_jax import (
    Batch,
    Example,
    Qwen3VL,
    abstract_model,
    generate,
    generation,
    without_pvm,
)
from pvm_jax.data.batch import hide_images
from pvm_jax.model import pieces
from pvm_jax.model.cache import SampleCache
from pvm_jax.model.pieces import prefill
from pvm_jax.sharding import MESH_AXES, batch_sharding, make_mesh, param_shardings
from tests import tiny
from tests.close import assert_close
from tests.tiny import CONFIG, EXAMPLES, example, randomized

BY_TOKEN = {"pvm_gate": "token"}


@pytest.fixture(scope="module")
def shallow() -> Qwen3VL:
    """One layer of every kind, its branch with a gate by token: there is more of it that could go
    wrong."""
    return randomized(tiny.cut(CONFIG, layers=2, text=BY_TOKEN))


@pytest.fixture(scope="module")
def preceding(shallow) -> Qwen3VL:
    """`shallow`, its text recalling the images before it alone."""
    text = dataclasses.replace(shallow.config.text, pvm_visibility="preceding")
    return randomized(dataclasses.replace(shallow.config, text=text))


@pytest.fixture(scope="module")
def smallest() -> Qwen3VL:
    """Every parameter and every operation in one layer: what sharding needs to be tested, and no
    more to compile."""
    return randomized(tiny.cut(CONFIG, text=BY_TOKEN))


def four_rows(rows: list[list[Example]]) -> Batch:
    """As often as four rows take, in the one shape that most tests compile for."""
    return Batch.from_rows((rows * 4)[:4], CONFIG, length=64, patches=64)


@partial(jax.jit, static_argnums=0)
def _trace(graphdef, params, batch):
    return nnx.merge(graphdef, params).trace(batch)


def trace(model: Qwen3VL, batch: Batch):
    """`Qwen3VL.trace`, compiled once for a kind of model."""
    graphdef, params = nnx.split(model)
    return _trace(graphdef, nnx.as_pure(params), batch)


def run(function, model: Qwen3VL, *args, **static):
    """`function` of the model under jit."""
    graphdef, params = nnx.split(model)
    call = jax.jit(lambda params, *args: function(nnx.merge(graphdef, params), *args, **static))
    return call(nnx.as_pure(params), *args)


def test_packed_rows_give_the_same_logits(shallow):
    """Segments confine decoder attention, the PVM branch and the tower to the example's own tokens
    and frames."""
    want = np.asarray(shallow(four_rows([[e] for e in EXAMPLES])))
    got = np.asarray(shallow(four_rows([EXAMPLES[:2], EXAMPLES[2:]])))
    for number, (row, start) in enumerate(
        [(0, 0), (0, len(EXAMPLES[0].input_ids)), (1, 0), (1, len(EXAMPLES[2].input_ids))]
    ):
        length = len(EXAMPLES[number].input_ids)
        assert_close(got[row, start : start + length], want[number, :length], 1e-5)


def test_a_row_without_images_gets_no_update(shallow):
    batch = four_rows([[EXAMPLES[0]], [EXAMPLES[1]], [EXAMPLES[1], EXAMPLES[0]]])
    for update in trace(shallow, batch).updates.values():
        text_only = len(EXAMPLES[1].input_ids)
        assert not np.asarray(update[1]).any()
        assert not np.asarray(update[2, :text_only]).any()
        assert np.asarray(update[2, text_only:]).any()
        assert not np.asarray(update[0][batch.visual_index[0] >= 0]).any()


@pytest.mark.parametrize("visibility", ["all", "preceding"])
def test_a_hidden_image_reaches_the_text_through_the_branch_alone(shallow, preceding, visibility):
    """Without the branch, other pixels change nothing in a row whose images are hidden; with it
    they do."""
    model = {"all": shallow, "preceding": preceding}[visibility]
    other = dataclasses.replace(EXAMPLES[0], pixel_values=EXAMPLES[0].pixel_values[::-1])
    batch = hide_images(four_rows([[EXAMPLES[0]], [other]]), [False, False, True, True])
    text_columns = (batch.segment_ids[0] > 0) & (batch.visual_index[0] == -1)
    off, on = (np.asarray(m(batch))[:, text_columns] for m in (without_pvm(model), model))
    assert np.abs(off[0] - off[1]).max() > 1e-2
    np.testing.assert_array_equal(off[2], off[3])
    assert np.abs(on[2] - on[3]).max() > 1e-2
    (update,) = trace(model, batch).updates.values()
    assert not np.asarray(update)[:, ~text_columns].any()


def test_a_batch_without_patches_skips_the_tower(smallest):
    with_columns = Batch.from_rows([[EXAMPLES[1]]], CONFIG, length=16, patches=16)
    without = Batch.from_rows([[EXAMPLES[1]]], CONFIG, length=16, patches=0)
    assert_close(smallest(without), smallest(with_columns), 1e-5)


def test_a_fresh_branch_is_the_base_model_and_can_learn():
    """Bit for bit; and at the first step the gate alone has a gradient."""
    config = tiny.cut(CONFIG)
    model = nnx.jit(lambda: Qwen3VL(config, rngs=nnx.Rngs(3)))()
    base = abstract_model(config.without_pvm())
    nnx.update(base, nnx.state(model, lambda path, _: path[0] != "pvm"))
    batch = Batch.from_rows([EXAMPLES], CONFIG, length=128, patches=128)
    np.testing.assert_array_equal(np.asarray(model(batch)), np.asarray(base(batch)))

    graphdef, branch, rest = nnx.split(model, lambda path, _: path[0] == "pvm", ...)

    def loss(branch):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, branch, rest)(batch)))

    for path, gradient in jax.tree_util.tree_leaves_with_path(
        jax.jit(jax.grad(loss))(nnx.as_pure(branch))
    ):
        assert np.asarray(gradient).any() == ("gate_alpha" in jax.tree_util.keystr(path)), path


def test_decoding_equals_the_full_forward(shallow):
    """Teacher-forced, two samples of every prompt: each step of the cache against one forward
    pass."""
    rows = [[EXAMPLES[0]], [EXAMPLES[3]], [EXAMPLES[1]]]
    prompt = Batch.from_rows(rows, CONFIG, length=32, patches=32)
    continuation = np.random.default_rng(5).integers(1, 80, (len(rows), 2, 12))
    graphdef, params = nnx.split(shallow)

    @jax.jit
    def decode(tokens, positions, cache, samples, slot):
        model = nnx.merge(graphdef, params)
        hidden, samples = pieces.decode(
            model, tokens, positions, jnp.ones(len(rows), int), cache, samples, slot
        )
        return model.logits(hidden), samples

    hidden, cache = run(prefill, shallow, prompt)
    last = run(Qwen3VL.logits, shallow, hidden)
    samples = SampleCache.empty(CONFIG, len(rows), 2, 12)
    position = prompt.positions.max((1, 2))[:, None] + 1
    stepwise = []
    for step in range(12):
        positions = np.broadcast_to(position + step, (len(rows), 2))
        logits, samples = decode(continuation[..., step], positions, cache, samples, step)
        stepwise.append(logits)
    for sample in range(2):
        longer = [
            [
                dataclasses.replace(
                    row[0], input_ids=np.append(row[0].input_ids, more), loss_mask=None
                )
            ]
            for row, more in zip(rows, continuation[:, sample], strict=True)
        ]
        full = np.asarray(shallow(four_rows(longer)))
        for row, (e,) in enumerate(rows):
            start = len(e.input_ids)
            want = full[row, start : start + 12]
            got = np.stack(stepwise, 2)[row, sample]
            assert_close(got, want, 1e-5)
            assert_close(np.asarray(last)[row, 0], full[row, start - 1], 1e-5)


def test_a_prompt_read_in_chunks_is_the_prompt_read_at_once(shallow):
    """Images on a chunk's edges, a last chunk that is part padding, rows that end in an earlier
    one. Larger chunks are read in test_generation.py."""
    prompt = Batch.from_rows([[e] for e in EXAMPLES], CONFIG, length=48, patches=64)
    want, cache = run(prefill, shallow, prompt)
    got, chunked = run(prefill, shallow, prompt, chunk=5)
    assert_close(got, want, 1e-5)
    chex.assert_trees_all_equal(chunked.memories, cache.memories)
    for a, b in (
        (chunked.prompts.keys, cache.prompts.keys),
        (chunked.prompts.values, cache.prompts.values),
    ):
        valid = (prompt.segment_ids > 0)[None, :, None, :, None]
        a = np.asarray(a)[..., :48, :]
        assert_close(np.where(valid, a, 0), np.where(valid, b, 0), 1e-5)


def test_with_visibility_preceding_nothing_depends_on_what_comes_later(shallow, preceding):
    """A conversation cut before its second image, packed behind another one; with "all", as
    published, it does depend on it."""
    whole = example(5, text=(2, 6, 8), grids=((4, 4), (2, 6)))
    length = 2 + 6 + 6  # <vision_start>, four visual tokens, <vision_end>
    assert whole.pixel_values is not None
    assert whole.image_grid_thw is not None
    cut = dataclasses.replace(
        whole,
        input_ids=whole.input_ids[:length],
        pixel_values=whole.pixel_values[:16],
        image_grid_thw=whole.image_grid_thw[:1],
        loss_mask=None,
    )
    stop = len(EXAMPLES[0].input_ids) + length
    for model, depends in ((shallow, True), (preceding, False)):
        rows = [[EXAMPLES[0], whole], [EXAMPLES[0], cut]]
        full, part = np.asarray(model(four_rows(rows)))[:2, :stop]
        scale = np.abs(full).max()
        assert (np.abs(full - part).max() > 1e-2 * scale) == depends
        if not depends:
            assert_close(full, part, 1e-5)


def test_visibility_is_the_same_where_the_images_come_first(shallow, preceding):
    """No token at all before the image: one there, a <vision_start>, would recall it with "all"
    alone."""
    first = example(6, text=(0, 9), grids=((4, 4),))
    first = dataclasses.replace(first, input_ids=first.input_ids[1:], loss_mask=first.loss_mask[1:])
    batch = four_rows([[first]])
    valid = batch.segment_ids > 0
    got, want = (np.asarray(model(batch))[valid] for model in (preceding, shallow))
    assert_close(got, want, 1e-5)


def test_compilations_are_bounded_by_the_buckets(smallest):
    """Fifty batches of varied images: as many traces as there are shapes."""
    chex.clear_trace_counter()
    graphdef, params = nnx.split(smallest)
    rng, shapes = np.random.default_rng(0), set()

    @jax.jit
    @chex.assert_max_traces(n=2 * 2)  # two buckets of tokens times two of patches
    def forward(params, batch):
        return nnx.merge(graphdef, params).hidden(batch)

    for seed in range(50):
        rows, columns = 2 * rng.integers(1, 5, 2)
        e = example(
            seed,
            text=(int(rng.integers(1, 30)), int(rng.integers(1, 28))),
            grids=((rows, columns),),
        )
        ids = e.input_ids[None]
        batch = Batch.from_hf(
            {"input_ids": ids, "pixel_values": e.pixel_values, "image_grid_thw": e.image_grid_thw},
            CONFIG,
        )
        shapes.add((batch.tokens.shape, batch.patches.shape))
        forward.trace(params, batch)
    assert len(shapes) > 1


@pytest.fixture(scope="module")
def unsharded(smallest):
    """A function, one for its gradients and values, a batch, and what a function gives on one
    device, asked for once."""
    batch = Batch.from_rows([[e] for e in EXAMPLES * 2], CONFIG, length=48, patches=64)
    graphdef, params = nnx.split(smallest)

    def loss(params, batch):
        hidden = nnx.merge(graphdef, params).hidden(batch)
        return jnp.sum(jnp.where((batch.segment_ids > 0)[..., None], jnp.sin(hidden), 0)), hidden

    @cache
    def on_one(function):
        return jax.device_get(jax.jit(function)(nnx.as_pure(params), batch))

    return loss, jax.grad(loss, has_aux=True), batch, on_one


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize(
    "gradients",
    [False, pytest.param(True, marks=pytest.mark.slow)],  # test_step.py's moments show them
)
def test_sharded_equals_unsharded(smallest, unsharded, shape, gradients):
    """Four heads do not divide over eight devices: there they stay whole, of which the values
    tell."""
    loss, gradient, batch, on_one = unsharded
    function, params = gradient if gradients else loss, nnx.state(smallest)
    mesh = make_mesh(*shape)
    shardings = param_shardings(params, mesh)
    with jax.set_mesh(mesh):
        # From NumPy: of an array that is on one device, a program for each shape cuts the parts.
        placed = jax.device_put(jax.device_get(nnx.as_pure(params)), shardings)
        batch = jax.device_put(batch, batch_sharding(mesh))
        kept = (shardings, None) if gradients else None
        got = jax.jit(function, out_shardings=kept)(placed, batch)
    largest = max(jax.tree.leaves(placed), key=lambda leaf: leaf.size)
    assert not largest.sharding.is_fully_replicated
    hidden, want = got[1], on_one(function)
    assert_close(hidden, want[1], 5e-5)
    if gradients:
        assert_close(got[0], want[0], 5e-5)


@pytest.fixture(scope="module")
def sampled(smallest):
    """Two samples of each prompt, read in chunks, in a cache that grows: a function of the model,
    and what it gives."""
    batch = Batch.from_rows([[e] for e in EXAMPLES], CONFIG, length=48, patches=64)
    settings = {"max_new_tokens": 16, "num_samples": 2, "prefill_chunk": 20, "seeds": (5, 6, 7, 8)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "FIRST_SLOTS", 8)
        sample = partial(generate, batch=batch, **settings)
        yield sample, sample(smallest)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_mesh(2, 2, 2),
        pytest.param(lambda: jax.make_mesh((2, 2, 2), MESH_AXES), marks=pytest.mark.slow),
    ],
)
def test_sharded_generation_gives_the_same_tokens(smallest, sampled, make):
    """With the mesh in context; and with `jax.make_mesh`, whose axes are Explicit, only placing the
    weights."""
    sample, want = sampled
    mesh = make()
    graphdef, params = nnx.split(smallest)
    sharded = nnx.merge(
        graphdef,
        jax.device_put(jax.device_get(nnx.as_pure(params)), param_shardings(params, mesh)),
    )
    with jax.set_mesh(mesh) if AxisType.Explicit not in mesh.axis_types else nullcontext():
        got = sample(sharded)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert_close(got.logprobs, want.logprobs, 1e-5)
