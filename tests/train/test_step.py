"""Training steps: the reference's gradients and losses, accumulation, sharding, and what a step costs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_golden_model
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file

from pvm_jax.sharding import MESH_AXES, batch_sharding, make_mesh, param_shardings
from train.config import OptimizerConfig
from train.flops import count_flops
from train.optimizer import leaf_names, make_optimizer, make_schedule
from train.step import (
    cast,
    init_state,
    loss_and_gradient,
    make_loss,
    make_step,
    split_model,
    state_shardings,
)


def relative_difference(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def named(tree):
    return dict(zip(jax.tree.leaves(leaf_names(tree)), jax.tree.leaves(tree), strict=True))


def test_branch_gradients_equal_the_reference(golden, golden_model, golden_batch):
    expected = load_file(golden / "grad_outputs.safetensors")
    graphdef, trained, frozen = split_model(golden_model, "pvm")
    loss = make_loss(graphdef, chunk=8)
    step = jax.jit(lambda *args: loss_and_gradient(loss, *args, accumulation=1))
    mean, gradients = step(nnx.as_pure(trained), nnx.as_pure(frozen), golden_batch)
    assert mean == pytest.approx(expected["loss"][0], rel=1e-5)
    gradients = named(gradients)
    assert len(gradients) == sum(key.startswith("grad.") for key in expected)
    for name, gradient in gradients.items():
        _, layer, rest = name.split("/", 2)
        key = f"grad.model.language_model.layers.{layer}.pvm_block.{rest.replace('/', '.')}"
        assert relative_difference(gradient, expected[key]) < 1e-3, name


def one_device():
    return jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


def train(model, batch, trainable, *, steps, mesh=None, accumulation=1, optimizer_config=None):
    """Runs `steps` steps on one batch; returns the losses and the final parameters."""
    mesh = mesh or one_device()
    with jax.set_mesh(mesh):
        config = optimizer_config or OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0)
        schedule = make_schedule(config, steps)
        optimizer = make_optimizer(config, schedule)
        graphdef, trained, frozen = split_model(model, trainable)
        shardings = state_shardings(trained, optimizer, mesh)
        state = init_state(trained, optimizer, shardings)
        frozen = jax.device_put(nnx.as_pure(frozen), param_shardings(frozen, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
        step = make_step(make_loss(graphdef, chunk=16), optimizer, schedule, accumulation=accumulation)
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        losses = []
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        return losses, metrics, state


def test_twenty_steps_equal_the_reference(golden, golden_model, golden_batch):
    expected = load_file(golden / "train_outputs.safetensors")
    losses, _, state = train(golden_model, golden_batch, "pvm", steps=20)
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-3)
    gates = [float(gate[0]) for name, gate in named(state.params).items() if name.endswith("gate_alpha")]
    np.testing.assert_allclose(gates, expected["gates"], rtol=1e-3)
