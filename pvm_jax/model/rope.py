"""Rotary positions: two-dimensional in the vision tower, interleaved over (time, row, column) in
the decoder."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pvm_jax.config import TextConfig
from pvm_jax.sharding import platform


class Rotary(NamedTuple):
    """By what every head turns, all layers alike: `cos` and `sin` [B, S, 1, H] float32, `sin`
    negative in the first half."""

    cos: jax.Array
    sin: jax.Array


def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Turns the pairs (i, i + H/2) of every head of x [B, S, N, H]; float32 inside."""
    turned = exchange_halves(x, as_product=platform() == "tpu").astype(jnp.float32)
    return (x.astype(jnp.float32) * rotary.cos + turned * rotary.sin).astype(x.dtype)


def exchange_halves(x: jax.Array, *, as_product: bool) -> jax.Array:
    """[..., H] -> [..., H], the second half first. `as_product` with a permutation, exact as well:
    a TPU fuses that, and makes copies in other layouts of an axis that is cut and joined."""
    if not as_product:
        first, second = jnp.split(x, 2, -1)
        return jnp.concatenate([second, first], -1)
    permutation = jnp.roll(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape[-1] // 2, 0)
    return jnp.einsum("...h,hk->...k", x, permutation, precision=jax.lax.Precision.HIGHEST)


def vision_rotary(positions: jax.Array, head_dim: int, width: int, theta: float = 1e4) -> Rotary:
    """Of patches at `positions` [B, P, 2] (row, column): rows turn the first half of the
    frequencies, columns the second (`Qwen3VLVisionRotaryEmbedding`). For heads of `head_dim` with
    zeros behind each half, `width` in all."""
    frequencies = theta ** -(np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = angles.reshape(*positions.shape[:-1], head_dim // 2)
    return _rotary(jnp.pad(angles, ((0, 0), (0, 0), (0, (width - head_dim) // 2))))


def mrope(positions: jax.Array, c: TextConfig) -> Rotary:
    """Of tokens at `positions` [B, 3, S] (time, row, column); YaRN's magnitude included.

    Interleaved MRoPE: frequencies 1, 4, 7, ... < 3 * section[1] follow the row, 2, 5, 8, ... < 3 *
    section[2] the column, all others time (`Qwen3VLTextRotaryEmbedding.apply_interleaved_mrope`).
    """
    axis = np.zeros(c.head_dim // 2, np.int32)
    axis[1 : 3 * c.mrope_section[1] : 3] = 1
    axis[2 : 3 * c.mrope_section[2] : 3] = 2
    angles = jnp.moveaxis(positions, 1, 2)[..., axis].astype(jnp.float32) * _frequencies(c)
    return _rotary(angles, c.yarn.attention_factor if c.yarn else 1.0)


def _rotary(angles: jax.Array, magnitude: float = 1.0) -> Rotary:
    """Of angles [B, S, H/2]."""
    cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
    return Rotary(
        jnp.concatenate([cos, cos], -1)[:, :, None], jnp.concatenate([-sin, sin], -1)[:, :, None]
    )


def _frequencies(c: TextConfig) -> np.ndarray:
    """[H/2] float32, in radians a position; slowed down where there is YaRN
    (`modeling_rope_utils._compute_yarn_parameters`)."""
    trained = c.rope_theta ** -(np.arange(0, c.head_dim, 2, dtype=np.float32) / c.head_dim)
    if c.yarn is None:
        return trained
    low, high = (_frequency_that_turns(turns, c) for turns in (c.yarn.beta_fast, c.yarn.beta_slow))
    if c.yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    if low == high:
        high += 0.001  # as the original, which so avoids dividing by 0
    slowed = np.clip((np.arange(c.head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return trained / np.float32(c.yarn.factor) * slowed + trained * (1 - slowed)


def _frequency_that_turns(turns: float, c: TextConfig) -> float:
    """Which frequency, as a fraction of an index, turns that often within the trained length."""
    assert c.yarn is not None
    length = c.yarn.original_max_position_embeddings
    return c.head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(c.rope_theta))
