"""The chunked loss against the formula written out."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from pvm_jax.sharding import batch_sharding, make_mesh
from tests.close import assert_close
from train.step.flops import count_flops
from train.step.loss import chunked_cross_entropy, chunked_logprobs

B, S, D, V = 8, 37, 16, 211


def dense_cross_entropy(hidden, head, tokens, loss_weights):
    logits = jnp.einsum("bsd,vd->bsv", hidden[:, :-1], head)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[
        ..., 0
    ]
    return -(log_probs * loss_weights[:, 1:]).sum(), loss_weights[:, 1:].sum()


def mean(loss, *args):
    total, weight = loss(*args)
    return total / weight


dense_gradients = jax.jit(jax.value_and_grad(partial(mean, dense_cross_entropy), argnums=(0, 1)))


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
    chunked = partial(mean, partial(chunked_cross_entropy, chunk=chunk))
    expected = dense_gradients(*inputs)
    actual = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(*inputs)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("vocab", [V, 208])
def test_sharded_loss_and_gradients_equal_unsharded(inputs, vocab):
    """A vocabulary that divides over fsdp and tensor is split over them; another is not."""
    hidden, head, tokens, weights = inputs
    head, tokens = head[:vocab], tokens % vocab

    def loss(hidden, head, tokens, weights):
        total, weight = chunked_cross_entropy(hidden, head, tokens, weights, chunk=8)
        return total / weight

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    expected = program(hidden, head, tokens, weights)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        of_rows, head = jax.device_get(((hidden, tokens, weights), head))
        hidden, tokens, weights = jax.device_put(of_rows, batch_sharding(mesh))
        head = jax.device_put(
            head, jax.NamedSharding(mesh, jax.P("tensor" if vocab == 208 else None, "fsdp"))
        )
        compiled = program.lower(hidden, head, tokens, weights).compile()
        actual = compiled(hidden, head, tokens, weights)
    assert_close(actual, expected, 1e-5)
    text = compiled.as_text()
    rows = {
        int(rows) for rows in re.findall(rf"f32\[(\d+),{D}\]", text)
    }  # of arrays as wide as the head
    assert rows, (
        f"XLA writes shapes in another way: teach the pattern above to read them\n{text[:2000]}"
    )
    assert rows & {vocab, vocab // 2, vocab // 4} == {vocab if vocab == V else vocab // 4}


def test_no_weights_is_zero_loss(inputs):
    hidden, head, tokens, weights = inputs
    loss = jax.jit(partial(chunked_cross_entropy, chunk=8))
    total, weight = loss(hidden, head, tokens, jnp.zeros_like(weights))
    assert (float(total), float(weight)) == (0, 0)


def dense_logprobs(hidden, head, tokens, wanted, temperature):
    """In float64, where wanted."""
    logits = np.asarray(hidden[:, :-1], np.float64) @ np.asarray(head, np.float64).T / temperature
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    logprobs = np.take_along_axis(log_probs, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    entropy = -(np.exp(log_probs) * log_probs).sum(-1)
    return [np.pad(x * np.asarray(wanted)[:, 1:], [(0, 0), (1, 0)]) for x in (logprobs, entropy)]


@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (8, 0.7), (36, 1.0), (512, 2.5)])
def test_logprobs_and_entropy_equal_the_dense_formulas(inputs, chunk, temperature):
    hidden, head, tokens, weights = inputs
    wanted = weights != 0
    chunked = jax.jit(lambda *args: chunked_logprobs(*args, temperature=temperature, chunk=chunk))
    actual, expected = (
        chunked(hidden, head, tokens, wanted),
        dense_logprobs(hidden, head, tokens, wanted, temperature),
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5)
        assert not np.asarray(a)[~np.asarray(wanted)].any()


def test_entropy_passes_no_gradient_on(inputs):
    hidden, head, tokens, weights = inputs
    entropy = lambda h: chunked_logprobs(h, head, tokens, weights != 0, chunk=8)[1].sum()  # noqa: E731
    gradient = jax.jit(jax.grad(entropy))(hidden)
    assert not gradient.any()


def test_sharded_logprobs_equal_unsharded(inputs):
    hidden, head, tokens, weights = inputs
    wanted = weights != 0
    logprobs = jax.jit(partial(chunked_logprobs, chunk=8))
    expected = logprobs(hidden, head, tokens, wanted)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        rows = jax.device_put(jax.device_get((hidden, tokens, wanted)), batch_sharding(mesh))
        actual = logprobs(rows[0], head, *rows[1:])
    assert_close(actual, expected, 1e-5)


def test_logprobs_at_temperature_0_are_refused(inputs):
    hidden, head, tokens, weights = inputs
    with pytest.raises(ValueError, match="temperature must be positive"):
        chunked_logprobs(hidden, head, tokens, weights != 0, temperature=0.0)


@pytest.mark.parametrize("loss", [chunked_cross_entropy, chunked_logprobs])
def test_logits_of_the_whole_batch_never_exist(inputs, loss):
    hidden, head, tokens, weights = inputs

    def total(hidden, head):
        return loss(hidden, head, tokens, weights != 0, chunk=8)[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, head).jaxpr
    largest = max(np.prod(shape) for shape in _shapes(jaxpr) if V in shape)
    assert largest == B * 8 * V


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jex.jaxprs_in_params(equation.params):
            yield from _shapes(inner)


@pytest.mark.parametrize("loss", [chunked_cross_entropy, chunked_logprobs])
def test_a_head_that_is_not_trained_meets_each_chunk_twice(inputs, loss):
    """For its logits and for their gradient; a third product would be the logits once more. The
    gradient is the one that a trained head passes on."""
    hidden, head, tokens, weights = inputs
    readers = jnp.arange(float(B * S)).reshape(B, S)  # a gradient of its own for every token

    def total(hidden, head):
        if loss is chunked_cross_entropy:
            return loss(hidden, head, tokens, weights, chunk=8)[0]
        return (loss(hidden, head, tokens, weights != 0, chunk=8)[0] * readers).sum()

    frozen, trained = jax.grad(total), jax.grad(total, argnums=(0, 1))
    assert_close(jax.jit(frozen)(hidden, head), jax.jit(trained)(hidden, head)[0], 2e-6)
    once = count_flops(total, hidden, head)
    assert count_flops(frozen, hidden, head) == 2 * once
    assert count_flops(trained, hidden, head) == 4 * once
