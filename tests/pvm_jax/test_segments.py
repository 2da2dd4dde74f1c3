"""The TPU's kernel, in its interpreter, and the GPU's two, with XLA for cuDNN: equal to the
reference on any segments, without the blocks in which no one sees anything. If splash fails with a
new JAX, read the head of model/splash.py."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from pvm_jax.model import attention_kernels, cudnn_pieces, cudnn_segments, splash
from pvm_jax.model.attention_kernels import attention, attention_mask
from pvm_jax.model.blocks import meeting_blocks
from pvm_jax.model.splash import fetched_blocks
from tests.close import assert_close
from tests.pvm_jax.attended import values_and_gradients

BLOCK, HEADS, KV_HEADS, HEAD_DIM = 128, 2, 1, 16
KERNELS = ["splash", "cudnn", "pieces"]


def _segments(rng, rows, length):
    """Some segments a row, with padding before and behind them; in the first row nothing else."""
    ids = np.zeros((rows, length), np.int32)
    for row in range(1, rows):
        edges = np.sort(rng.choice(np.arange(1, length), 6, replace=False))
        for number in range(5):
            ids[row, edges[number] : edges[number + 1]] = number + 1
    return ids


def _inputs(rng, rows, length, kv_length):
    shapes = [(length, HEADS), (kv_length, KV_HEADS), (kv_length, KV_HEADS)]
    return [jnp.asarray(rng.normal(size=(rows, *shape, HEAD_DIM)), jnp.float32) for shape in shapes]


def _run(kernel, arrays, q_ids, kv_ids, causal, limits, counts):
    """`kernel` "pieces" is cuDNN's where it does not take segments."""
    if kernel == "pieces":
        kernel = "cudnn"
        limits = np.full(q_ids.shape, kv_ids.shape[1]) if limits is None else limits
    masks = {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids, "causal": causal, "limits": limits}
    return values_and_gradients(arrays, counts, **masks, kernel=kernel)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", BLOCK)
    monkeypatch.setattr(splash, "LEAST", BLOCK)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("causal", "limited", "length", "kv_length", "piece"),
    [
        (True, False, 384, 384, BLOCK),
        (False, False, 384, 384, BLOCK),
        (False, False, 384, 640, BLOCK),
        (False, True, 384, 640, BLOCK),
        (True, False, 640, 640, 4 * BLOCK),  # the last piece is not full
    ],
)
def test_a_kernel_equals_xla_on_random_segments(
    causal, limited, length, kv_length, piece, kernel, monkeypatch
):
    """Of packed text, of the tower, of the branch, and of a piece of a prompt or "preceding"."""
    monkeypatch.setattr(cudnn_pieces, "PIECE", piece)
    monkeypatch.setattr(cudnn_segments, "AT_ONCE", 2)  # not all of a row
    rng = np.random.default_rng(length + causal)
    q_ids = _segments(rng, 3, length)
    kv_ids = q_ids if kv_length == length else _segments(rng, 3, kv_length)
    limits = rng.integers(0, kv_length + 1, q_ids.shape) if limited else None
    seen = attention_mask(q_ids, kv_ids, causal=causal, limits=limits)
    counts = (q_ids > 0) & np.asarray(seen.any(-1))
    assert 0.3 < counts[1:].mean() < 1
    arrays = _inputs(rng, 3, length, kv_length)
    want = _run("xla", arrays, q_ids, kv_ids, causal, limits, counts)
    got = _run(kernel, arrays, q_ids, kv_ids, causal, limits, counts)
    assert bool(got[2])  # of padding and of those who see nothing, too
    assert_close(got[:2], want[:2], 1e-5)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize(("length", "kv_length"), [(300, 300), (200, 600)])
def test_splash_by_parts_of_padded_blocks(length, kv_length, kind, monkeypatch):
    """One block of queries and one of keys, two parts at a time, in either layout."""
    monkeypatch.setattr(splash, "BLOCK", 8 * BLOCK)
    monkeypatch.setattr(splash, "LEAST", 8 * BLOCK)
    monkeypatch.setattr(splash, "KEYS_AT_ONCE", BLOCK)
    monkeypatch.setattr(splash, "device_kind", lambda: kind)
    rng = np.random.default_rng(length)
    q_ids = _segments(rng, 2, length)
    kv_ids = q_ids if kv_length == length else _segments(rng, 2, kv_length)
    arrays = _inputs(rng, 2, length, kv_length)
    causal = length == kv_length
    counts = (q_ids > 0) & np.asarray(attention_mask(q_ids, kv_ids, causal=causal).any(-1))
    want, got = (
        _run(kernel, arrays, q_ids, kv_ids, causal, None, counts) for kernel in ("xla", "splash")
    )
    assert_close(got[:2], want[:2], 1e-5)


@pytest.mark.parametrize(
    ("kind", "kv_length", "layout"),
    [("TPU v5 lite", 300, 1), ("TPU v6 lite", 300, 2), ("TPU v6 lite", 600, 1)],
)
def test_heads_lie_by_column_where_a_chip_writes_them_so(kind, kv_length, layout, monkeypatch):
    """But not a cache's, which is longer than the queries."""
    monkeypatch.setattr(splash, "device_kind", lambda: kind)
    q_ids, kv_ids = (np.ones((1, length), np.int32) for length in (300, kv_length))
    masks = {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids, "causal": False}
    attend = partial(attention, **masks, kernel="splash", interpret=True)
    traced = str(jax.make_jaxpr(attend)(*_inputs(np.random.default_rng(0), 1, 300, kv_length)))
    assert re.findall(r"[qkv]_layout\W+(\d)", traced) == 3 * [str(layout)]


@pytest.mark.parametrize(
    ("length", "padded"), [(1, 128), (130, 256), (300, 512), (512, 512), (4100, 4608)]
)
def test_splash_pads_to_blocks(length, padded, monkeypatch):
    monkeypatch.setattr(splash, "LEAST", 512)
    chex.assert_shape(splash.pad_to_blocks(jnp.zeros((2, length, 3))), (2, padded, 3))


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_no_one_sees_is_not_computed(kernel, monkeypatch):
    """NaN in the other segment's block would reach whatever is multiplied with it, if by 0."""
    monkeypatch.setattr(cudnn_pieces, "PIECE", BLOCK)
    ids = np.repeat([[1, 2, 0]], BLOCK, axis=1).astype(np.int32)
    q, k, v = _inputs(np.random.default_rng(0), 1, 3 * BLOCK, 3 * BLOCK)
    for unseen in (slice(BLOCK, 2 * BLOCK), slice(2 * BLOCK, None)):
        spoilt = [x.at[:, unseen].set(jnp.nan) for x in (q, k, v)]
        counts = (ids > 0) & ~np.isnan(spoilt[0][:, :, 0, 0])
        kept, gradients, _ = _run(kernel, spoilt, ids, ids, False, None, counts)
        for array in (kept, *gradients):
            assert np.isfinite(np.asarray(array)[counts]).all()


def test_cudnn_is_handed_segments(monkeypatch):
    """By a function that JAX does not call public: a JAX that moves or renames it fails here, on a
    machine without a GPU."""
    monkeypatch.setattr(attention_kernels, "takes_segments", lambda: True)
    for name in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_: 100_000)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", bool)
    ids = np.repeat([[1, 2, 0]], BLOCK, axis=1).astype(np.int32)
    q, k, v = _inputs(np.random.default_rng(0), 1, 3 * BLOCK, 3 * BLOCK)
    arrays = [x.astype(jnp.bfloat16) for x in (q, k, v)]

    def loss(*arrays):
        masks = {"q_segment_ids": ids, "kv_segment_ids": ids, "causal": True}
        return attention(*arrays, **masks, kernel="cudnn").sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__cudnn\$fmhaSoftmax(\w*)", text)
    assert sorted(calls) == ["", "Backward"], text
    assert text.count("PADDING_CAUSAL") == 2
    assert f"tensor<1x{cudnn_segments.AT_ONCE + 1}xi32>" in text


@pytest.mark.parametrize("causal", [True, False])
def test_all_blocks_meet_in_which_one_is_seen_and_no_others(causal):
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = _segments(rng, 3, 5 * BLOCK)
        last = np.broadcast_to(np.arange(ids.shape[1]), ids.shape) if causal else None
        meet = np.asarray(meeting_blocks(ids, ids, last, BLOCK))
        seen = np.asarray(attention_mask(ids, ids, causal=causal)) & (ids > 0)[:, :, None]
        np.testing.assert_array_equal(meet, seen.reshape(3, 5, BLOCK, 5, BLOCK).any((2, 4)))


def test_nothing_but_what_is_computed_is_fetched():
    meet = np.random.default_rng(0).random((4, 6, 5)) < 0.4
    for axis in (1, 2):
        lines = np.moveaxis(meet, axis, -1).reshape(-1, meet.shape[axis])
        fetched = np.moveaxis(np.asarray(fetched_blocks(meet, axis)), axis, -1)
        for line, named in zip(lines, fetched.reshape(lines.shape), strict=True):
            np.testing.assert_array_equal(named[line], np.flatnonzero(line))
            if line.any():
                assert line[named].all()
                assert (np.diff(named) >= 0).all()
