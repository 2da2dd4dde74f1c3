"""Where a Linear's weight lies while it multiplies, on eight simulated devices; how a stream lies
in a TPU's memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from pvm_jax.data.batch import Batch
from pvm_jax.model.layers import Linear, product
from pvm_jax.sharding import batch_sharding, by_row, gathered, make_mesh, param_shardings
from tests import tiny


def test_a_gathered_parameter_is_whole_along_the_model_dimension_and_its_gradient_is_not():
    mesh = make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        weight = jnp.ones((8, 16))
        whole = jax.jit(lambda w: gathered(w, "mlp", "embed"))(weight)
        gradient = jax.jit(jax.grad(lambda w: gathered(w, "mlp", "embed").sum()))(weight)
    assert whole.sharding.spec == PartitionSpec("tensor")
    assert gradient.sharding.spec == PartitionSpec("tensor", "fsdp")


@pytest.mark.parametrize(("columns", "asked"), [(64, True), (1, False)])
def test_a_weight_is_gathered_where_it_is_smaller_than_what_it_meets(columns, asked):
    """Of a weight [64, 32] and eight rows of columns: a decoding step leaves it to the compiler."""
    mesh = make_mesh(1, 8, 1)
    linear = Linear(32, 64, ("mlp", "embed"), dtype="float32", rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(linear)
    x = np.random.default_rng(0).normal(size=(8, columns, 32)).astype(np.float32)
    expected = linear(jnp.asarray(x))
    with jax.set_mesh(mesh):
        placed = jax.device_put(nnx.as_pure(params), param_shardings(params, mesh))
        rows = jax.device_put(x, batch_sharding(mesh))
        multiply = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
        assert ("sharding_constraint" in multiply.lower(placed, rows).as_text()) == asked
        np.testing.assert_allclose(multiply(placed, rows), expected, atol=1e-6)


def test_a_single_row_on_a_tpu_is_one_of_a_register_of_rows(monkeypatch):
    """The zeros beside it change nothing."""
    x, matrix = (
        jax.random.normal(jax.random.key(n), shape)
        for n, shape in enumerate([(1, 1, 64), (48, 64)])
    )
    plain = product(x, matrix)
    monkeypatch.setattr("pvm_jax.model.layers.platform", lambda: "tpu")
    padded = product(x.astype(jnp.bfloat16), matrix, preferred_element_type=jnp.float32)
    assert "8,48" in str(jax.make_jaxpr(product)(x, matrix))
    np.testing.assert_allclose(product(x, matrix), plain, rtol=1e-5, atol=1e-5)
    assert (padded.shape, padded.dtype) == (plain.shape, jnp.float32)


def test_a_residual_stream_on_a_tpu_lies_by_row_and_so_does_its_gradient(monkeypatch):
    """All but a decoding step's. Where JAX calls its constraint otherwise, so must this test."""
    monkeypatch.setattr("pvm_jax.sharding.platform", lambda: "tpu")
    graphdef, params = nnx.split(tiny.make_model(tiny.cut(tiny.CONFIG)))
    batch = Batch.from_rows([[one] for one in tiny.EXAMPLES], tiny.CONFIG, length=32, patches=32)

    def constraints(function, *args):
        return str(jax.make_jaxpr(function)(*args)).count("layout_constraint")

    def loss(params):
        return nnx.merge(graphdef, params).hidden(batch).sum()

    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert constraints(loss, nnx.as_pure(params)) == 2  # in the loop: behind each half
        assert constraints(jax.grad(loss), nnx.as_pure(params)) > 2 * 2
        for columns in (1, 2):
            stream = jnp.ones((4, columns, 8)), "batch", "length", "hidden"
            assert constraints(lambda: by_row(*stream)) == (columns > 1)  # noqa: B023
