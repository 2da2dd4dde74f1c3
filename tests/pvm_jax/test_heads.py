"""Heads as a TPU's kernel wants them, on any device: the same numbers, wherever the zeros are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pvm_jax.config import LoRAConfig, VisionConfig
from pvm_jax.model.layers import Heads
from pvm_jax.model.lora import adapt
from pvm_jax.model.rope import exchange_halves, vision_rotary
from pvm_jax.model.vision import VisionAttention
from tests.close import assert_close

PATCHES, HEAD_DIM = 12, 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_halves_are_exchanged_by_a_product_bit_for_bit(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 64)), dtype)
    for as_product in (True, False):
        got = jax.jit(exchange_halves, static_argnames="as_product")(x, as_product=as_product)
        np.testing.assert_array_equal(got, jnp.roll(x, 32, -1))


def test_zeros_stand_behind_each_half_of_a_head():
    x = jnp.arange(1.0, 9)[:, None] * jnp.ones((1, 3))
    split = Heads(4, 8).split(x, 0)
    want = [[1, 2, 0, 0, 3, 4, 0, 0], [5, 6, 0, 0, 7, 8, 0, 0]]
    np.testing.assert_array_equal(split, np.repeat(np.array(want)[..., None], 3, 2))
    np.testing.assert_array_equal(Heads(4, 8).split(x.T, 1), np.moveaxis(split, 2, 0))


@pytest.fixture(scope="module")
def attend():
    """A tower's attention with an adapter on both its Linears, its parameters and its input."""
    c = VisionConfig(hidden_size=3 * HEAD_DIM, num_heads=3)
    holder = nnx.Module()
    holder.attn = VisionAttention(c, dtype="float32", rngs=nnx.Rngs(0))
    adapt(holder, LoRAConfig(rank=2, alpha=4, targets="attn/.*"), rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    graphdef, params = nnx.split(holder.attn)
    params = jax.tree.map(
        lambda p: jnp.asarray(0.2 * rng.normal(size=p.shape), jnp.float32), nnx.as_pure(params)
    )
    x = jnp.asarray(rng.normal(size=(1, PATCHES, c.hidden_size)), jnp.float32)
    positions = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(4), indexing="ij"), -1)
    positions = positions.reshape(1, PATCHES, 2)
    segment_ids = jnp.asarray([[1] * 8 + [2] * 4])

    def loss(params, x, width):
        rotary = vision_rotary(positions, HEAD_DIM, width)
        seen = nnx.merge(graphdef, params)(x, rotary, segment_ids, "xla")
        return jnp.sin(seen).sum(), seen

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    return lambda width: grad(params, x, width)


def test_the_width_of_the_towers_heads_changes_nothing(attend):
    """Values, and gradients of weights, biases, adapters and input."""
    want, got = attend(HEAD_DIM), attend(32)
    assert len(jax.tree.leaves(want)) == 10
    assert_close(got, want, 1e-5)
