"""Rotary positions: two-dimensional in the vision tower, interleaved over (time, row, column) in
the decoder."""

import jax
import jax.numpy as jnp
import numpy as np


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head of x [B, S, N, H] by angles [B, S, H/2]; float32
    inside."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
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


def mrope_angles(
    positions: jax.Array, head_dim: int, theta: float, section: tuple[int, int, int]
) -> jax.Array:
    """Angles [B, S, H/2] of tokens at `positions` [B, 3, S] (time, row, column).

    Interleaved MRoPE: frequencies 1, 4, 7, ... < 3 * section[1] follow the row, 2, 5, 8, ... < 3 *
    section[2] the column, all others time (`Qwen3VLTextRotaryEmbedding.apply_interleaved_mrope`).
    """
    axis = np.zeros(head_dim // 2, np.int32)
    axis[1 : 3 * section[1] : 3] = 1
    axis[2 : 3 * section[2] : 3] = 2
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    return jnp.moveaxis(positions, 1, 2)[..., axis].astype(jnp.float32) * frequencies
