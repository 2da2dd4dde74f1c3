"""Training LoRA adapters: the gradients, what else a step touches (nothing), the mesh, the result,
the configs."""

import math
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from pvm_jax.config import LoRAConfig, ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.model.parameters import by_path, part_of
from pvm_jax.model.qwen3_vl import abstract_model, add_lora
from pvm_jax.options import parse
from pvm_jax.sharding import MESH_AXES, batch_sharding, make_mesh
from tests.close import assert_close
from train.config import Bucket, DataConfig, OptimizerConfig
from train.sft.config import SFTConfig
from train.sft.program import SFTProgram
from train.step.flops import count_flops
from train.step.state import loss_and_gradient, make_loss, split_model

CONFIGS = Path(__file__).parents[2] / "configs"
EVERYWHERE = LoRAConfig(rank=2, alpha=6, targets=".*")
IN_THE_DECODER = LoRAConfig(rank=2, alpha=4)


@pytest.fixture(scope="module")
def adapted(model):
    """With updates that are not zero, so that A has gradients too."""
    graphdef, params = nnx.split(add_lora(model, EVERYWHERE))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        return (
            leaf.replace(jax.device_put(rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)))
            if path[-1] == "b"
            else leaf
        )

    return nnx.merge(graphdef, nnx.map_state(fill, params))


def gradients(loss, *args):
    return jax.jit(lambda *args: loss_and_gradient(loss, *args, accumulation=1))(*args)


def test_gradients_are_those_of_the_dense_weights(adapted, eight_rows):
    """W + alpha / rank B A, written out: its chain rule against what the adapters compute."""
    plain_def, plain = nnx.split(abstract_model(replace(adapted.config, lora=None)))
    graphdef, trained, frozen = split_model(adapted, "lora")
    trained, frozen = nnx.as_pure(trained), nnx.as_pure(frozen)

    def dense(trained, frozen):
        params = by_path(frozen) | by_path(trained)

        def weight(path, _):
            name = "/".join(map(str, path))
            a, b = (params.get(f"{name.removesuffix('/weight')}/lora/{part}") for part in "ab")
            return (
                params[name]
                if a is None
                else params[name] + EVERYWHERE.scale * jnp.einsum("...or,...ri->...oi", b, a)
            )

        return nnx.as_pure(nnx.map_state(weight, plain))

    plain_loss = make_loss(plain_def, chunk=16)

    def expected_loss(trained, frozen, batch):
        return plain_loss(dense(trained, frozen), {}, batch)

    mean, actual = gradients(make_loss(graphdef, chunk=16), trained, frozen, eight_rows)
    expected_mean, expected = gradients(expected_loss, trained, frozen, eight_rows)
    assert_close(mean, expected_mean, 1e-5)
    actual, expected = by_path(actual), by_path(expected)
    assert actual.keys() == expected.keys()
    assert len(actual) == 2 * sum(path.endswith("/lora/a") for path in actual) > 20
    assert_close(actual, expected, 1e-4)


def sft_config(**values) -> SFTConfig:
    data = DataConfig("unused.jsonl", [Bucket(48, 16)])
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0)
    settings = {
        "checkpoint": "unused",
        "lora": IN_THE_DECODER,
        "dtype": "float32",
        "remat": "none",
        "loss_chunk": 16,
    }
    return SFTConfig(
        run_dir="unused",
        data=data,
        trainable="lora",
        batch_size=8,
        optimizer=optimizer,
        **settings | values,
    )


def one_device():
    return jax.make_mesh(
        (1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def train(model, batch, mesh, *, steps, **values):
    """(losses, state, frozen) of a run's own program."""
    config = sft_config(**values)
    with jax.set_mesh(mesh):
        program = SFTProgram.of(config, model.config, max(steps, 1), mesh)
        state, frozen = program.begin(add_lora(model, config.lora, mesh=mesh))
        chex.assert_trees_all_equal_shapes_and_dtypes(
            (state, frozen), (program.state, program.frozen)
        )
        batch, losses = jax.device_put(batch, batch_sharding(mesh)), []
        for _ in range(steps):
            state, metrics = program.step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    return losses, state, frozen


def test_only_the_adapters_train(model, eight_rows):
    """And they lie on any mesh as the run's program has them."""
    before = jax.device_get(by_path(nnx.as_pure(nnx.state(model))))
    losses, state, frozen = train(model, eight_rows, one_device(), steps=3)
    assert losses[-1] < losses[0]
    assert {part_of(path) for path in by_path(state.params)} == {"lora"}
    chex.assert_trees_all_equal(jax.device_get(by_path(frozen)), before)
    train(model, eight_rows, make_mesh(2, 2, 2), steps=0)


@pytest.mark.slow  # of other parameters it is shown in test_step.py
def test_sharded_steps_equal_unsharded(model, eight_rows):
    """The second run recomputes activations, and is split along every mesh axis."""
    expected, expected_state, _ = train(model, eight_rows, one_device(), steps=3)
    losses, state, _ = train(model, eight_rows, make_mesh(2, 2, 2), steps=3, remat="full")
    assert_close(losses, expected, 1e-5)
    assert_close(state.params, expected_state.params, 3e-4)


def test_the_base_has_no_gradient_even_in_passing(model):
    """The backward pass costs what the activations' gradients cost: no product yields the gradient
    of a weight."""
    config = replace(model.config, remat="none", lora=LoRAConfig(rank=1))

    def costs(config, trainable):
        graphdef, trained, frozen = split_model(abstract_model(config), trainable)

        batch = Batch.empty(config, rows=32, length=8, patches=0)
        loss, args = (
            make_loss(graphdef, chunk=8),
            (nnx.as_pure(trained), nnx.as_pure(frozen), batch),
        )
        forward = count_flops(loss, *args)
        return forward, count_flops(
            lambda *args: loss_and_gradient(loss, *args, accumulation=1), *args
        ) - forward

    forward, backward = costs(config, "lora")
    whole, whole_backward = costs(replace(config, lora=None), "decoder")
    assert forward == pytest.approx(whole, rel=0.1)
    assert (
        backward < 1.4 * forward
    )  # attention and the head, recomputed in chunks, cost more than once
    assert whole_backward > 1.9 * whole


def read(file: Path) -> SFTConfig:
    return parse(SFTConfig, ["--config", str(file)], prog="", description="", examples="")[0]


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_published_lora_has_as_many_parameters_as_the_branch(size):
    config, branch = (
        read(CONFIGS / f"{name}_qwen3_vl_{size}.yaml") for name in ("sft_lora", "sft")
    )
    model_config = ModelConfig.preset(size)
    counts = {}
    for trainable in ("pvm", "lora"):
        _, trained, _ = split_model(
            abstract_model(replace(model_config, lora=config.lora)), trainable
        )
        counts[trainable] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))
    assert config.trainable == "lora"
    assert counts["lora"] == pytest.approx(counts["pvm"], rel=0.03)
    assert (config.data, config.batch_size, config.accumulation) == (
        branch.data,
        branch.batch_size,
        branch.accumulation,
    )
