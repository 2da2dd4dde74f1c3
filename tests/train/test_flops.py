"""The FLOP counter on programs whose cost is known."""

import jax
import jax.numpy as jnp
import pytest

from train.flops import count_flops, peak_flops

X, W = jax.ShapeDtypeStruct((5, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3), jnp.float32)
PRODUCT = 2 * 5 * 3 * 3


def test_product_and_its_gradients():
    assert count_flops(jnp.dot, X, W) == PRODUCT
    loss = lambda x, w: jnp.sum((x @ w) ** 2)  # noqa: E731
    assert count_flops(jax.grad(loss, argnums=1), X, W) == 2 * PRODUCT
    assert count_flops(jax.grad(loss, argnums=(0, 1)), X, W) == 3 * PRODUCT


def test_batched_product():
    a, b = jax.ShapeDtypeStruct((7, 5, 3), jnp.float32), jax.ShapeDtypeStruct((7, 3, 2), jnp.float32)
    assert count_flops(jnp.matmul, a, b) == 2 * 7 * 5 * 3 * 2


def test_scan_counts_its_length():
    def repeat(x, w):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, length=11)[0]

    assert count_flops(repeat, X, W) == 11 * PRODUCT


def test_cond_counts_the_dearest_branch():
    def choose(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert count_flops(choose, X, W) == 2 * PRODUCT


def test_jit_remat_and_custom_rules_are_entered():
    product = jax.custom_vjp(jnp.dot)
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))
    assert count_flops(jax.jit(product), X, W) == PRODUCT
    assert count_flops(jax.grad(lambda x, w: product(x, w).sum(), argnums=(0, 1)), X, W) == 3 * PRODUCT
    recomputed = jax.checkpoint(lambda x, w: jnp.sin(x @ w) @ w)
    loss = lambda x, w: recomputed(x, w).sum()  # noqa: E731
    assert count_flops(loss, X, W) == 2 * PRODUCT
    assert count_flops(jax.grad(loss), X, W) == 2 * PRODUCT + PRODUCT + 2 * PRODUCT


def test_convolution():
    x, kernel = jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32), jax.ShapeDtypeStruct((4, 3, 2, 2), jnp.float32)
    convolve = lambda x, kernel: jax.lax.conv(x, kernel, (2, 2), "VALID")  # noqa: E731
    assert count_flops(convolve, x, kernel) == 2 * (2 * 4 * 4 * 4) * (3 * 2 * 2)


def test_while_around_a_product_is_refused():
    loop = lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c @ w, x)  # noqa: E731
    with pytest.raises(ValueError, match="trip count"):
        count_flops(loop, X, W)


def test_peak_flops_by_device_kind():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None
