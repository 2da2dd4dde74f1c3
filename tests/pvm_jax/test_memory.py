"""The branch's own arithmetic, against the same written out."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pvm_jax.model.layers import rms_normalize
from pvm_jax.model.memory import CrossAttention
from tests.close import assert_close
from tests.tiny import CONFIG


def test_biases_of_the_cross_attention():
    """Of all four projections, each added once and before the norms."""
    config = replace(CONFIG, text=replace(CONFIG.text, attention_bias=True))
    c, rng = config.text, np.random.default_rng(0)
    module = CrossAttention(config, rngs=nnx.Rngs(0))
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    linears = {}
    for name in "qkvo":
        linear = getattr(module, f"{name}_proj")
        linear.weight[...], linear.bias[...] = draw(*linear.weight.shape), draw(*linear.bias.shape)
        linears[name] = linear.weight[...], linear.bias[...]
    query, compact = draw(1, 3, c.pvm_hidden_size), draw(1, 5, c.pvm_hidden_size)
    ones = np.ones((1, 5), np.int32)

    def project(name: str, x: jax.Array) -> jax.Array:
        weight, bias = linears[name]
        return x @ weight.T + bias

    def written_out(query: jax.Array, compact: jax.Array) -> jax.Array:
        q, k, v = (
            project(name, x).reshape(*x.shape[:2], -1, c.head_dim)
            for name, x in (("q", query), ("k", compact), ("v", compact))
        )
        q, k = rms_normalize(q, c.rms_norm_eps), rms_normalize(k, c.rms_norm_eps)
        k, v = (jnp.repeat(x, c.pvm_num_heads // c.pvm_num_key_value_heads, 2) for x in (k, v))
        scores = jnp.einsum("bsnh,btnh->bnst", q, k) * c.head_dim**-0.5
        recalled = jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(scores, -1), v)
        return project("o", recalled.reshape(*recalled.shape[:2], -1))

    @jax.jit
    def computed(query: jax.Array, compact: jax.Array) -> jax.Array:
        return module(query, module.memorize(compact, ones), ones[:, :3], None)

    assert_close(computed(query, compact), jax.jit(written_out)(query, compact), 1e-5)
