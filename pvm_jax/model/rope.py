"""Rotary positions: two-dimensional in the vision tower, interleaved over (time, row, column) in
the decoder."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pvm_jax.config import TextConfig


def rotate(x: jax.Array, angles: jax.Array, magnitude: float = 1.0) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head of x [B, S, N, H] by angles [B, S, H/2], and
    multiplies them by `magnitude`; float32 inside."""
    cos = magnitude * jnp.cos(angles)[:, :, None]
    sin = magnitude * jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(
        x.dtype
    )


def vision_angles(positions: jax.Array, head_dim: int, theta: float = 1e4) -> jax.Array:
    """Angles [B, P, H/2] of patches at `positions` [B, P, 2] (row, column): rows turn the first
    half of the frequencies, columns the second (`Qwen3VLVisionRotaryEmbedding`)."""
    frequencies = theta ** -(np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return angles.reshape(*positions.shape[:-1], head_dim // 2)


def mrope_angles(positions: jax.Array, c: TextConfig) -> jax.Array:
    """Angles [B, S, H/2] of tokens at `positions` [B, 3, S] (time, row, column).

    Interleaved MRoPE: frequencies 1, 4, 7, ... < 3 * section[1] follow the row, 2, 5, 8, ... < 3 *
    section[2] the column, all others time (`Qwen3VLTextRotaryEmbedding.apply_interleaved_mrope`).
    """
    axis = np.zeros(c.head_dim // 2, np.int32)
    axis[1 : 3 * c.mrope_section[1] : 3] = 1
    axis[2 : 3 * c.mrope_section[2] : 3] = 2
    return jnp.moveaxis(positions, 1, 2)[..., axis].astype(jnp.float32) * _frequencies(c)


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
