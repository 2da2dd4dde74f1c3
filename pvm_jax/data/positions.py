"""Positions that depend on the images' sizes, on the host: MRoPE's of the text, and those of a
frame's patches."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pvm_jax.config import VisionConfig
from pvm_jax.data.example import Frame


def mrope_positions(length: int, frames: Sequence[Frame], vision: VisionConfig) -> np.ndarray:
    """[3, length] (`Qwen3VLModel.get_rope_index`): text counts on in all three, a frame spans its
    grid, and the text after it goes on from the largest position so far plus one. A video's frame
    counts as one step of time."""
    positions = np.empty((3, length), np.int32)
    column = value = 0
    for frame in frames:
        text = frame.start - column
        positions[:, column : frame.start] = value + np.arange(text)
        value += text
        grid = (
            1,
            frame.rows // vision.spatial_merge_size,
            frame.columns // vision.spatial_merge_size,
        )
        column = frame.start + grid[1] * grid[2]
        positions[:, frame.start : column] = value + np.indices(grid).reshape(3, -1)
        value += max(grid)
    positions[:, column:] = value + np.arange(length - column)
    return positions


class Geometry(NamedTuple):
    """Of the P patches of a frame, in 2x2-block order: positions [P, 2], indices and weights of
    learned positions [P, 4]."""

    positions: np.ndarray
    interp_indices: np.ndarray
    interp_weights: np.ndarray


@lru_cache(maxsize=4096)
def frame_geometry(rows: int, columns: int, vision: VisionConfig) -> Geometry:
    """Where the patches of a frame lie, and the four learned positions that each of them is
    interpolated from (`Qwen3VLVisionModel.fast_pos_embed_interpolate`)."""
    side, merge = vision.position_grid_size, vision.spatial_merge_size
    low, high, share = [], [], []
    for size in (rows, columns):
        place = np.linspace(0, side - 1, size, dtype=np.float32)
        low.append(place.astype(np.int32))
        high.append(np.minimum(low[-1] + 1, side - 1))
        share.append(place - low[-1])
    indices, weights = [], []
    for row, row_share in ((low[0], 1 - share[0]), (high[0], share[0])):
        for column, column_share in ((low[1], 1 - share[1]), (high[1], share[1])):
            indices.append(row[:, None] * side + column)
            weights.append(row_share[:, None] * column_share)
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)

    def block_order(x: np.ndarray) -> np.ndarray:
        blocks = x.reshape(rows // merge, merge, columns // merge, merge, -1)
        return blocks.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)

    return Geometry(*(block_order(x) for x in (grid, np.stack(indices, -1), np.stack(weights, -1))))
