"""The chunked loss against the formula written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from pvm_jax.sharding import batch_sharding, make_mesh
from train.loss import chunked_cross_entropy

B, S, D, V = 8, 37, 16, 211


def dense_cross_entropy(hidden, head, tokens, loss_weights):
    logits = jnp.einsum("bsd,vd->bsv", hidden[:, :-1], head)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    return -(log_probs * loss_weights[:, 1:]).sum(), loss_weights[:, 1:].sum()


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    weights = rng.choice([0, 0, 1, 0.5], (B, S)).astype(np.float32)
    weights[1] = 0  # a row without loss
    weights[2] = 1
    return (
        jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32),
        jnp.asarray(rng.normal(size=(V, D)), jnp.float32),
        jnp.asarray(rng.integers(0, V, (B, S))),
        jnp.asarray(weights),
    )


@pytest.mark.parametrize("chunk", [1, 8, 12, 36, 512])
def test_loss_and_gradients_equal_the_dense_formula(inputs, chunk):
    hidden, head, tokens, weights = inputs

    def mean(loss, hidden, head):
        total, weight = loss(hidden, head, tokens, weights)
        return total / weight

    chunked = lambda *args: chunked_cross_entropy(*args, chunk=chunk)  # noqa: E731
    expected = jax.value_and_grad(lambda *a: mean(dense_cross_entropy, *a), argnums=(0, 1))(hidden, head)
    actual = jax.jit(jax.value_and_grad(lambda *a: mean(chunked, *a), argnums=(0, 1)))(hidden, head)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), actual, expected)


def test_sharded_loss_equals_unsharded(inputs):
    expected = chunked_cross_entropy(*inputs, chunk=8)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    hidden, head, tokens, weights = inputs
    with jax.set_mesh(mesh):
        rows = jax.device_put((hidden, tokens, weights), batch_sharding(mesh))
        actual = jax.jit(lambda h, w, t, lw: chunked_cross_entropy(h, w, t, lw, chunk=8))(rows[0], head, *rows[1:])
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_no_weights_is_zero_loss(inputs):
    hidden, head, tokens, weights = inputs
    total, weight = chunked_cross_entropy(hidden, head, tokens, jnp.zeros_like(weights), chunk=8)
    assert (float(total), float(weight)) == (0, 0)


def test_logits_of_the_whole_batch_never_exist(inputs):
    def mean(hidden, head, tokens, weights):
        return chunked_cross_entropy(hidden, head, tokens, weights, chunk=8)[0]

    jaxpr = jax.make_jaxpr(jax.grad(mean, argnums=(0, 1)))(*inputs).jaxpr
    largest = max(np.prod(shape) for shape in _shapes(jaxpr) if V in shape)
    assert largest == B * 8 * V


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jex.jaxprs_in_params(equation.params):
            yield from _shapes(inner)
