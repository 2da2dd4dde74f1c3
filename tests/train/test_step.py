"""Training steps: the reference's gradients and losses, accumulation, sharding, and what a step
costs."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file

from pvm_jax.data.batch import Batch
from pvm_jax.data.example import Example
from pvm_jax.model.parameters import by_path
from pvm_jax.model.qwen3_vl import abstract_model
from pvm_jax.sharding import MESH_AXES, batch_sharding, make_mesh, param_shardings
from tests.close import assert_close
from train.config import OptimizerConfig
from train.step.flops import count_flops
from train.step.optimizer import make_optimizer, make_schedule
from train.step.state import (
    cast,
    init_state,
    loss_and_gradient,
    make_loss,
    make_step,
    split_model,
    state_shardings,
)

ONE_SHAPE = pytest.mark.parametrize(
    "golden", ["shape_8b", pytest.param("shape_4b", marks=pytest.mark.slow)], indirect=True
)


def one_device():
    return jax.make_mesh(
        (1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def set_up(model, trainable, *, mesh, accumulation=1, steps=20, schedule=None):
    """(jitted step, state, frozen) of a run at a constant rate, unless `schedule` says another."""
    config = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0)
    schedule = schedule or make_schedule(config, steps)
    optimizer = make_optimizer(config)
    graphdef, *parts = split_model(model, trainable)
    trained, frozen = jax.device_get(parts)  # of arrays on a device a program each cuts the parts
    shardings = state_shardings(trained, optimizer, mesh)
    frozen = jax.device_put(nnx.as_pure(frozen), param_shardings(frozen, mesh))
    step = make_step(make_loss(graphdef, chunk=16), optimizer, schedule, accumulation=accumulation)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return step, init_state(trained, optimizer, shardings), frozen


def stepping(model, batch, trainable, *, steps, mesh=None, accumulation=1):
    """Does `steps` steps on one batch; gives the metrics of each and the state after it, which the
    next one donates."""
    mesh = mesh or one_device()
    with jax.set_mesh(mesh):
        step, state, frozen = set_up(model, trainable, mesh=mesh, accumulation=accumulation)
        batch = jax.device_put(batch, batch_sharding(mesh))
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
            yield metrics, state


def train(model, batch, trainable, **options):
    """The losses of such steps and the final state."""
    losses, state = [], None
    for metrics, state in stepping(model, batch, trainable, **options):  # noqa: B007
        losses.append(float(metrics["loss"]))
    return losses, state


@ONE_SHAPE
def test_gradients_and_twenty_steps_equal_the_reference(golden, golden_model, golden_batch):
    """By one program: after a step Adam's first moments are a tenth of its gradients, which were
    clipped to a norm of 1."""
    steps = stepping(golden_model, golden_batch, "pvm", steps=20)
    first, state = next(steps)
    expected = load_file(golden / "grad_outputs.safetensors")
    assert_close(first["loss"], expected["loss"][0], 1e-5)
    moments = by_path(optax.tree.get(state.opt_state, "mu"))
    assert len(moments) == sum(key.startswith("grad.") for key in expected)
    for name, moment in moments.items():
        _, layer, rest = name.split("/", 2)
        key = f"grad.model.language_model.layers.{layer}.pvm_block.{rest.replace('/', '.')}"
        gradient = 10 * max(1, float(first["grad_norm"])) * np.asarray(moment)
        assert_close(gradient, expected[key], 1e-4, what=name)

    losses = [first["loss"]]
    for metrics, state in steps:  # noqa: B007
        losses.append(metrics["loss"])
    expected = load_file(golden / "train_outputs.safetensors")
    assert_close(np.array(losses), expected["losses"], 5e-5)
    gates = [
        float(gate[0])
        for name, gate in by_path(state.params).items()
        if name.endswith("gate_alpha")
    ]
    assert_close(np.array(gates), expected["gates"], 1e-5)


def gradient(model, batch, accumulation):
    graphdef, trained, frozen = split_model(model, "decoder")
    loss = make_loss(graphdef, chunk=16)
    step = jax.jit(lambda *args: loss_and_gradient(loss, *args, accumulation=accumulation))
    return step(nnx.as_pure(trained), nnx.as_pure(frozen), batch)


@pytest.mark.slow  # test_packing.py shows it, with rows that weigh more or less
def test_accumulated_gradients_equal_those_of_one_big_batch(model, eight_rows):
    (whole, expected), (mean, actual) = (
        gradient(model, eight_rows, 1),
        gradient(model, eight_rows, 4),
    )
    assert_close(mean, whole, 1e-6)
    assert_close(actual, expected, 1e-5)


@pytest.fixture(scope="module")
def unsharded(model, eight_rows):
    return train(model, eight_rows, "all", steps=5)


def test_sharded_steps_equal_unsharded(model, eight_rows, unsharded):
    """In two parts besides."""
    expected, expected_state = unsharded
    losses, state = train(
        model, eight_rows, "all", steps=5, mesh=make_mesh(2, 2, 2), accumulation=2
    )
    assert_close(losses, expected, 1e-5)
    moments = optax.tree.get(expected_state.opt_state, "mu"), optax.tree.get(state.opt_state, "mu")
    assert_close(*moments, 5e-4)
    for tree in (state.params, optax.tree.get(state.opt_state, "mu")):  # split alike, not copied
        assert not by_path(tree)[
            "language_model/layers/mlp/up_proj/weight"
        ].sharding.is_fully_replicated


def test_bfloat16_run_keeps_trained_weights_and_moments_in_float32(model, eight_rows, unsharded):
    graphdef = nnx.graphdef(abstract_model(dataclasses.replace(model.config, dtype="bfloat16")))
    model, mesh = nnx.merge(graphdef, nnx.state(model)), one_device()
    with jax.set_mesh(mesh):
        step, state, frozen = set_up(model, "pvm", mesh=mesh)
        frozen = cast(frozen, "bfloat16")
        after, _ = jax.eval_shape(step, state, frozen, eight_rows)
        total, weight = jax.jit(make_loss(graphdef, chunk=16))(state.params, frozen, eight_rows)
    assert {
        leaf.dtype
        for leaf in jax.tree.leaves((after.params, optax.tree.get(after.opt_state, "mu")))
    } == {jnp.float32.dtype}
    assert_close(total / weight, unsharded[0][0], 1e-3)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(model, eight_rows):
    """The schedule goes on by that count: the step after it has the rate that its number says, and
    counts what it reads."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        step, state, frozen = set_up(model, "pvm", mesh=mesh, schedule=lambda step: 1e-3 * step)
        before = jax.device_get((state.params, state.opt_state))
        broken = dataclasses.replace(eight_rows, loss_weights=eight_rows.loss_weights * np.inf)
        state, metrics = step(state, frozen, broken)
        assert not np.isfinite(metrics["loss"])
        assert int(state.step) == 1
        chex.assert_trees_all_equal(jax.device_get((state.params, state.opt_state)), before)
        state, metrics = step(state, frozen, eight_rows)
        assert np.isfinite(metrics["loss"])
        moved = jax.tree.map(
            lambda a, b: np.abs(a - b).max(), jax.device_get(state.params), before[0]
        )
        assert float(metrics["learning_rate"]) == pytest.approx(1e-3)
        assert max(jax.tree.leaves(moved)) == pytest.approx(
            1e-3, rel=1e-2
        )  # as far as Adam's first step goes
    for name, segment_ids in (
        ("tokens", eight_rows.segment_ids),
        ("patches", eight_rows.patch_segment_ids),
    ):
        assert int(metrics[name]) == np.count_nonzero(segment_ids)
        assert float(metrics[f"padding/{name}"]) == pytest.approx(np.mean(segment_ids == 0))


def test_no_more_compilations_than_buckets(model):
    """Fifty batches of images of any size: as many traces as buckets, one compilation each."""
    rng, shapes = np.random.default_rng(0), [(64, 16), (96, 16), (96, 64)]
    config, mesh = model.config, one_device()

    def example(length, patches):
        grid = np.array([[1, 2, 2 * rng.integers(1, patches // 4 + 1)]])
        image = [
            config.vision_start_token_id,
            *[config.image_token_id] * (grid.prod() // 4),
            config.vision_end_token_id,
        ]
        text = rng.integers(0, 400, rng.integers(10, length - len(image)))
        ids = np.concatenate([image, text])
        pixels = rng.normal(size=(grid.prod(), config.vision.patch_dim)).astype(np.float32)
        return Example(ids, pixels, grid, loss_mask=np.arange(len(ids)) >= len(image))

    with jax.set_mesh(mesh):
        graphdef, trained, frozen = split_model(model, "pvm")
        loss = make_loss(graphdef, chunk=16)
        chex.clear_trace_counter()
        traced_once_a_bucket = chex.assert_max_traces(loss, n=len(shapes))
        step = jax.jit(lambda *args: traced_once_a_bucket(*args)[0])
        for index in range(50):
            length, patches = shapes[index % 3]
            rows = [[example(length, patches)] for _ in range(2)]
            batch = Batch.from_rows(rows, config, length=length, patches=patches)
            step.trace(nnx.as_pure(trained), nnx.as_pure(frozen), batch)


class TestCost:
    """What a step costs, counted from the traced program."""

    @staticmethod
    def counted(function, config, trainable):
        graphdef, trained, frozen = split_model(abstract_model(config), trainable)
        batch = Batch.empty(config, rows=2, length=32, patches=16)
        loss = make_loss(graphdef, chunk=16)
        return count_flops(function(loss), nnx.as_pure(trained), nnx.as_pure(frozen), batch)

    def forward(self, config, trainable="pvm"):
        return self.counted(lambda loss: loss, config, trainable)

    def step(self, config, trainable):
        return self.counted(
            lambda loss: partial(loss_and_gradient, loss, accumulation=1), config, trainable
        )

    @pytest.fixture
    def config(self, model):
        return dataclasses.replace(model.config, remat="none")

    def test_branch_step_is_cheaper_than_decoder_than_all(self, config):
        parts = ("pvm", "decoder", "all")
        (forward,) = {self.forward(config, trainable) for trainable in parts}
        backward = {trainable: self.step(config, trainable) - forward for trainable in parts}
        assert backward["pvm"] < backward["decoder"] < backward["all"]
        assert backward["all"] == pytest.approx(2 * forward, rel=0.05)
        assert backward["pvm"] < forward  # a product's input has a gradient, its weight has none

    def test_backward_stops_below_the_first_branch(self, config):
        """Layers under the branch make the forward pass dearer and the backward pass not at all."""
        text = dataclasses.replace(config.text, num_hidden_layers=5, pvm_layers=(4,))
        deep = dataclasses.replace(config, text=text)
        more = self.forward(deep) - self.forward(config)
        assert more > 0
        assert self.step(deep, "pvm") - self.step(config, "pvm") == more
