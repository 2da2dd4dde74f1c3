"""The pictures of an encoded conversation, as the model gets them: out of its patches, and back
into them.

A frame is an image, or a pair of frames of a video: [frames, height, width, channels] in the
patches' own numbers: bytes, or as Hugging Face normalizes them. Of bytes an image has one frame.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import jax
import numpy as np

from pvm_jax.config import VisionConfig
from pvm_jax.data.example import Example
from pvm_jax.data.patches import PixelSettings
from pvm_jax.data.pixels import as_floats, no_scale


def frames(example: Example, config: VisionConfig) -> list[np.ndarray]:
    """The images' frames, then the videos': each [frames, height, width, channels]."""
    found = []
    for pixels, grids in (
        (example.pixel_values, example.image_grid_thw),
        (example.pixel_values_videos, example.video_grid_thw),
    ):
        if pixels is None or grids is None:
            continue
        sizes = [(rows, columns) for time, rows, columns in grids.tolist() for _ in range(time)]
        parts = np.split(pixels, np.cumsum([rows * columns for rows, columns in sizes])[:-1])
        found += [_unfold(part, *size, config) for part, size in zip(parts, sizes, strict=True)]
    return found


def picture(
    pixels: np.ndarray, rows: int, columns: int, settings: PixelSettings, config: VisionConfig
) -> np.ndarray:
    """[height, width, 3] in [0, 1], for a person: the first frame of `pixels`, patches [rows *
    columns, numbers]."""
    frame = _unfold(pixels, rows, columns, config)[0]
    if frame.dtype == np.uint8:
        return frame / np.float32(255)
    ends = np.repeat(np.array([[0], [255]], np.uint8), len(settings.mean), axis=1)
    lowest, highest = as_floats(ends, settings.scale, len(settings.mean))
    return np.clip((frame - lowest) / (highest - lowest), 0, 1)


def with_frames(example: Example, new: Sequence[np.ndarray], config: VisionConfig) -> Example:
    """`example` showing other frames, shaped as its own (`frames`)."""
    patches = [_fold(frame, config) for frame in new]
    images = 0 if example.image_grid_thw is None else int(example.image_grid_thw[:, 0].sum())
    shown, played = (
        np.concatenate(part) if part else None for part in (patches[:images], patches[images:])
    )
    return replace(example, pixel_values=shown, pixel_values_videos=played)


def exchanged(examples: Sequence[Example], config: VisionConfig) -> list[Example]:
    """The same conversations, each about its partner's pictures (`partners`), scaled to the size of
    its own: chance, as far as sight goes.

    Raises:
        ValueError: as `partners`, and where some have bytes and others do not.
    """
    if len({pixels.dtype == np.uint8 for example in examples for pixels in example.pixels}) > 1:
        raise ValueError("exchanging pictures takes bytes in all conversations, or in none")
    shown = [frames(example, config) for example in examples]
    return [
        with_frames(
            example,
            [_like(mine, other[i % len(other)]) for i, mine in enumerate(own)],
            config,
        )
        for example, own, other in zip(
            examples, shown, [shown[number] for number in partners(examples)], strict=True
        )
    ]


def partners(examples: Sequence[Example]) -> list[int]:
    """[conversations]: for each conversation the next one, the first following the last, that
    shares no image or video with it. In many data several questions about one image follow each
    other.

    Raises:
        ValueError: for a conversation without such another.
    """
    shown, found = [_fingerprints(example) for example in examples], []
    for number, own in enumerate(shown):
        others = ((number + step) % len(shown) for step in range(1, len(shown)))
        partner = next((other for other in others if own.isdisjoint(shown[other])), None)
        if partner is None:
            raise ValueError(
                "exchanging pictures takes at least two conversations that share none: "
                f"there is no such other for conversation {number}, counted from 0"
            )
        found.append(partner)
    return found


def blanked(examples: Sequence[Example]) -> list[Example]:
    """The same conversations, every picture of one colour: the one that normalization turns to 0 (a
    middle grey, which may lie between two bytes)."""

    def blank(pixels: np.ndarray | None) -> np.ndarray | None:
        return None if pixels is None else np.zeros_like(pixels)

    def of_nothing(scale: np.ndarray | None) -> np.ndarray | None:
        return None if scale is None else no_scale(scale.shape[1])

    return [
        replace(
            e,
            pixel_values=blank(e.pixel_values),
            pixel_values_videos=blank(e.pixel_values_videos),
            image_scale=of_nothing(e.image_scale),
            video_scale=of_nothing(e.video_scale),
        )
        for e in examples
    ]


def _fingerprints(example: Example) -> set[bytes]:
    """Of its images and videos: equal where all pixels are."""
    found = set()
    for pixels, grids in (
        (example.pixel_values, example.image_grid_thw),
        (example.pixel_values_videos, example.video_grid_thw),
    ):
        if pixels is not None and grids is not None:
            parts = np.split(pixels, np.cumsum(grids.prod(1))[:-1])
            found |= {sha256(part.tobytes()).digest() for part in parts}
    return found


def _like(mine: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The picture `other` with as many frames as `mine`, of its size and type."""
    other = other[np.arange(len(mine)) % len(other)]
    if other.shape == mine.shape:
        return other
    resized = np.asarray(jax.image.resize(other.astype(np.float32), mine.shape, "cubic"))
    return resized if mine.dtype != np.uint8 else np.clip(resized.round(), 0, 255).astype(np.uint8)


def _unfold(patches: np.ndarray, rows: int, columns: int, config: VisionConfig) -> np.ndarray:
    """[rows * columns, numbers], a visual token's patches together -> a frame."""
    merge, side = config.spatial_merge_size, config.patch_size
    times = patches.shape[1] // config.frame_dim
    shape = (
        rows // merge,
        columns // merge,
        merge,
        merge,
        config.in_channels,
        times,
        side,
        side,
    )
    frame = patches.reshape(shape).transpose(5, 0, 2, 6, 1, 3, 7, 4)
    return frame.reshape(times, rows * side, columns * side, config.in_channels)


def _fold(frame: np.ndarray, config: VisionConfig) -> np.ndarray:
    """The inverse of `_unfold`."""
    merge, side = config.spatial_merge_size, config.patch_size
    time, height, width, channels = frame.shape
    blocks = frame.reshape(
        time, height // (merge * side), merge, side, width // (merge * side), merge, side, channels
    )
    return blocks.transpose(1, 4, 2, 5, 7, 0, 3, 6).reshape(-1, time * config.frame_dim)
