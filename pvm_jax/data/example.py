"""One conversation as arrays in Hugging Face's layout, and where its images stand in it."""

import dataclasses
from typing import NamedTuple

import numpy as np

from pvm_jax.config import ModelConfig, VisionConfig
from pvm_jax.data.pixels import SCALE_TERMS


@dataclasses.dataclass(frozen=True)
class Example:
    """One unpadded conversation in Hugging Face's layout.

    Attributes:
        input_ids: [S] with one placeholder per visual token.
        pixel_values: the images' patches in prompt order, each image in 2x2-block order; None
            without images. Bytes (uint8) hold the one frame of an image, [P, frame_dim]; other
            numbers are read as they stand, [P, patch_dim], as Hugging Face gives them.
        image_grid_thw: [images, 3], patches of each image (1, rows, columns).
        pixel_values_videos, video_grid_thw: the same for videos (frame pairs, rows, columns); a
            patch holds all its frames, [P, patch_dim].
        loss_mask: [S] bool, True on the tokens that are learned; None: none are.
        evidence: [marked] the columns of the visual tokens that the boxes of an image touch; None
            where no image has boxes. Nothing but `pvm_jax.measure.evidence` reads it.
        image_scale, video_scale: [4, channels] float32, what bytes mean (`pvm_jax.data.pixels`).
    """

    input_ids: np.ndarray
    pixel_values: np.ndarray | None = None
    image_grid_thw: np.ndarray | None = None
    pixel_values_videos: np.ndarray | None = None
    video_grid_thw: np.ndarray | None = None
    loss_mask: np.ndarray | None = None
    image_scale: np.ndarray | None = None
    video_scale: np.ndarray | None = None
    evidence: np.ndarray | None = None

    @property
    def num_patches(self) -> int:
        return sum(map(len, self.pixels))

    @property
    def pixels(self) -> list[np.ndarray]:
        """The patches of its images, and those of its videos, where there are any."""
        return [x for x in (self.pixel_values, self.pixel_values_videos) if x is not None]


class Frame(NamedTuple):
    """One image, or one frame pair of a video, and the token that its placeholders start at; its
    patches, and the scale of their bytes, as an `Example` has them."""

    start: int
    rows: int
    columns: int
    pixels: np.ndarray
    scale: np.ndarray | None


def visual_runs(example: Example, config: ModelConfig) -> list[Frame]:
    """The example's frames in prompt order, each checked against its run of placeholders."""
    ids, vision = example.input_ids, config.vision
    if ids.ndim != 1:
        raise ValueError(f"input_ids must be one-dimensional, got shape {ids.shape}")
    outside = ids[(ids < 0) | (ids >= config.text.vocab_size)]
    if outside.size:
        raise ValueError(
            f"token id {outside[0]} is outside the vocabulary of {config.text.vocab_size}"
        )
    frames = []
    for kind, token, pixels, grids, scale in (
        (
            "image",
            config.image_token_id,
            example.pixel_values,
            example.image_grid_thw,
            example.image_scale,
        ),
        (
            "video",
            config.video_token_id,
            example.pixel_values_videos,
            example.video_grid_thw,
            example.video_scale,
        ),
    ):
        sizes = _frame_sizes(kind, pixels, grids, vision)
        _check_scale(kind, pixels, scale, vision)
        starts, lengths = runs_of(ids, token)
        if len(starts) != len(sizes):
            raise ValueError(
                f"the prompt has {len(starts)} runs of {kind} placeholders, but there are"
                f" {len(sizes)} {kind} frames"
            )
        offset = 0
        for start, length, (rows, columns) in zip(starts, lengths, sizes, strict=True):
            assert pixels is not None
            expected = rows * columns // vision.merge_factor
            if length != expected:
                raise ValueError(
                    f"the {kind} placeholders at token {start} are {length}, but its {rows} x"
                    f" {columns} patches make {expected} visual tokens (was the prompt truncated"
                    " inside the image?)"
                )
            frames.append(
                Frame(int(start), rows, columns, pixels[offset : offset + rows * columns], scale)
            )
            offset += rows * columns
    return sorted(frames, key=lambda frame: frame.start)


def _frame_sizes(
    kind: str, pixels: np.ndarray | None, grids: np.ndarray | None, vision: VisionConfig
) -> list[tuple[int, int]]:
    """(rows, columns) of every frame of all grids."""
    if (pixels is None) != (grids is None):
        raise ValueError(f"{kind} pixels and {kind}_grid_thw must come together")
    if pixels is None or grids is None:
        return []
    merge = vision.spatial_merge_size
    if grids.ndim != 2 or grids.shape[1] != 3:
        raise ValueError(f"{kind}_grid_thw must be [n, 3], got {grids.shape}")
    if (grids <= 0).any() or (grids[:, 1:] % merge).any():
        raise ValueError(
            f"{kind}_grid_thw needs positive sizes, rows and columns multiples of {merge}; got"
            f" {grids.tolist()}"
        )
    one_frame = kind == "image" and pixels.dtype == np.uint8
    width = vision.frame_dim if one_frame else vision.patch_dim
    expected = (int(grids.prod(1).sum()), width)
    if pixels.shape != expected:
        raise ValueError(
            f"{kind} pixels must be {expected} for grids {grids.tolist()}, got {pixels.shape}"
        )
    return [(int(rows), int(columns)) for time, rows, columns in grids for _ in range(time)]


def _check_scale(
    kind: str, pixels: np.ndarray | None, scale: np.ndarray | None, vision: VisionConfig
) -> None:
    """Raises ValueError for bytes that nothing says the meaning of."""
    if pixels is None or pixels.dtype != np.uint8:
        return
    expected, got = (SCALE_TERMS, vision.in_channels), None if scale is None else scale.shape
    if got != expected:
        raise ValueError(
            f"{kind} pixels are bytes: {kind}_scale must be {expected}, got {got}; Processor.encode"
            " gives both"
        )


def runs_of(ids: np.ndarray, token: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the maximal runs of `token`."""
    edges = np.diff(np.concatenate([[0], (ids == token).astype(np.int8), [0]]))
    starts = np.flatnonzero(edges == 1)
    return starts, np.flatnonzero(edges == -1) - starts
