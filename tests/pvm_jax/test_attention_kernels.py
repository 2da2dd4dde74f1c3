from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pvm_jax.model.attention_kernels import attention, shared_attention
from pvm_jax.sharding import make_mesh
from tests.close import assert_close
from tests.pvm_jax.attended import values_and_gradients


def _inputs(rng, *, length, kv_length, heads, kv_heads, head_dim=64, rows=2):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q = normal(rows, length, heads, head_dim)
    k, v = normal(rows, kv_length, kv_heads, head_dim), normal(rows, kv_length, kv_heads, head_dim)
    return q, k, v


def _segments(rows, length, *lengths):
    ids = np.zeros((rows, length), np.int32)
    for row in range(rows):
        edges = np.cumsum([0, *lengths]) + row  # rows differ
        for number, (start, stop) in enumerate(pairwise(edges), 1):
            ids[row, start:stop] = number
    return jax.device_put(ids)


def _dense(q, k, v, q_segment_ids, kv_segment_ids, causal):
    """The formula, in float64, a query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, s, n in np.ndindex(q.shape[:3]):
        seen = np.asarray(kv_segment_ids[b]) == int(q_segment_ids[b, s])
        if causal:
            seen &= np.arange(k.shape[1]) <= s
        if seen.any():
            head = n // (q.shape[2] // k.shape[2])
            scores = k[b, seen, head] @ q[b, s, n] / q.shape[-1] ** 0.5
            weights = np.exp(scores - scores.max())
            out[b, s, n] = weights / weights.sum() @ v[b, seen, head]
    return out


def test_xla_is_the_formula():
    q, k, v = _inputs(
        np.random.default_rng(0), length=24, kv_length=24, heads=4, kv_heads=2, head_dim=8
    )
    segments = _segments(2, 24, 9, 11)
    for causal in (True, False):
        how = {"q_segment_ids": segments, "kv_segment_ids": segments, "causal": causal}
        got = jax.jit(partial(attention, **how, kernel="xla"))(q, k, v)
        want = _dense(q, k, v, segments, segments, causal)
        valid = np.asarray(segments) > 0
        assert_close(np.asarray(got)[valid], want[valid], 1e-5)


def test_a_row_in_pieces_is_the_formula():
    """More queries than one piece has, an end that fills none; limits beside the diagonal."""
    length = 300
    q, k, v = _inputs(
        np.random.default_rng(2), length=length, kv_length=length, heads=2, kv_heads=1, head_dim=8
    )
    segments = _segments(2, length, 140, 150)
    limits = jnp.full((2, length), 250)
    how = {"q_segment_ids": segments, "kv_segment_ids": segments, "limits": limits}
    got = jax.jit(partial(attention, **how, causal=True, kernel="xla"))(q, k, v)
    cut = segments.at[:, 250:].set(-1)
    want = _dense(q, k, v, segments, cut, True)
    valid = (np.asarray(segments) > 0) & (np.arange(length) < 280)
    assert_close(np.asarray(got)[valid], want[valid], 1e-5)


MESHES = {"data": 2, "fsdp": 1, "tensor": 4}, {"data": 1, "fsdp": 2, "tensor": 4}
CAUSAL, CROSS = (True, 200, 4, 64), (False, 72, 1, 72)


@pytest.mark.parametrize(
    ("kernel", "mesh", "causal", "kv_length", "kv_heads", "head_dim"),
    [
        ("splash", MESHES[0], *CAUSAL),
        ("splash", MESHES[1], *CROSS),
        ("cudnn", MESHES[0], *CAUSAL),
        ("cudnn", MESHES[1], *CROSS),
        # Without a mesh test_segments.py shows it.
        pytest.param("splash", None, *CAUSAL, marks=pytest.mark.slow),
        pytest.param("splash", None, *CROSS, marks=pytest.mark.slow),
        pytest.param("splash", MESHES[0], *CROSS, marks=pytest.mark.slow),
        pytest.param("splash", MESHES[1], *CAUSAL, marks=pytest.mark.slow),
    ],
)
def test_a_kernel_equals_xla_on_a_mesh(kernel, mesh, causal, kv_length, kv_heads, head_dim):
    """Values and gradients, grouped queries, lengths and heads that are no multiple of 128; the
    TPU's kernel in its interpreter, the GPU's pieces with XLA for cuDNN."""
    q, k, v = _inputs(
        np.random.default_rng(1),
        length=200,
        kv_length=kv_length,
        heads=4,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    q_segments = _segments(2, 200, 90, 100)
    kv_segments = q_segments if causal else _segments(2, kv_length, 30, 40)
    masks = {"q_segment_ids": q_segments, "kv_segment_ids": kv_segments, "causal": causal}

    def run(kernel):
        return values_and_gradients((q, k, v), q_segments > 0, **masks, kernel=kernel)[:2]

    want = run("xla")
    if mesh is None:
        got = run(kernel)
    else:
        with jax.set_mesh(make_mesh(**mesh)):
            got = run(kernel)
    assert_close(got, want, 1e-5)


def test_unknown_kernel_is_named():
    q, k, v = _inputs(
        np.random.default_rng(0), length=4, kv_length=4, heads=2, kv_heads=2, head_dim=8
    )
    ids = jnp.ones((2, 4), jnp.int32)
    with pytest.raises(ValueError, match="flash9"):
        attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, causal=True, kernel="flash9")


def test_samples_attend_in_bfloat16_on_the_cpu_too():
    """Some of the products that einsum can make of several rows have no kernel there."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, 3, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    )
    own, new = (
        [rng.normal(size=shape).astype(np.float32) for _ in "kv"]
        for shape in ((2, 2, 3, 6, 8), (2, 2, 3, 8))
    )
    masks = {"shared_mask": np.ones((2, 3, 5), bool), "own_mask": np.ones((1, 1, 6), bool)}

    def attend(dtype):
        arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), (q, (k, v), tuple(own), tuple(new)))
        return np.asarray(jax.jit(partial(shared_attention, **masks))(*arrays), np.float32)

    assert_close(attend("bfloat16"), attend("float32"), 0.04)
