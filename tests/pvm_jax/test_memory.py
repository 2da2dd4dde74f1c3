"""The branch's own arithmetic, against the same written out."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pvm_jax.model.layers import rms_normalize
from pvm_jax.model.memory import CrossAttention, PersistentVisualMemory
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


def test_a_gate_by_token():
    """A fresh one is the scalar gate, bit for bit; any other is that times 2 sigmoid(w . stream /
    rms(stream))."""
    rng, eps = np.random.default_rng(0), CONFIG.text.rms_norm_eps
    by_token = replace(CONFIG, text=replace(CONFIG.text, pvm_gate="token"))
    scalar, token = (PersistentVisualMemory(c, rngs=nnx.Rngs(0)) for c in (CONFIG, by_token))
    stream, embeds = (
        jnp.asarray(rng.standard_normal((2, length, CONFIG.text.hidden_size)), jnp.float32)
        for length in (6, 4)
    )
    shown, is_visual = jnp.ones((2, 4), jnp.int32), jnp.zeros((2, 6), bool)

    def update(branch: PersistentVisualMemory) -> np.ndarray:
        branch.gate_alpha[...] = jnp.full(1, 0.5)
        memory = branch.memorize(embeds, shown)
        return np.asarray(branch(stream, memory, jnp.ones((2, 6), jnp.int32), is_visual))

    published = update(scalar)
    assert np.abs(published).min(-1).all()
    np.testing.assert_array_equal(update(token), published)
    weight = rng.standard_normal(CONFIG.text.hidden_size).astype(np.float32)
    token.gate_token[...] = jnp.asarray(weight)
    x = np.asarray(stream, np.float64)
    gate = (x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)) @ weight
    want = published * (2 / (1 + np.exp(-gate)))[..., None]
    assert np.abs(want - published).max() > 0.1
    assert_close(update(token), want, 1e-5)
