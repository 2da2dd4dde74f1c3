"""What the model reads: `Batch`, and the host-side layout that makes it from Hugging Face's arrays
or from examples.

Everything whose shape or value depends on the images' sizes (positions.py, gather indices,
segments) is computed on the host, in NumPy, so that nothing on the device depends on values for its
shape.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import jax
import numpy as np

from pvm_jax.config import ModelConfig
from pvm_jax.data.example import Example, Frame, runs_of, visual_runs
from pvm_jax.data.pixels import as_floats, no_scale, repeat_frame
from pvm_jax.data.positions import frame_geometry, mrope_positions

Array = Any  # NumPy's where the batch is made, JAX's where the model reads it


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "positions",
        "segment_ids",
        "loss_weights",
        "visual_index",
        "visual_segment_ids",
        "patches",
        "patch_scale",
        "patch_positions",
        "patch_interp_indices",
        "patch_interp_weights",
        "patch_segment_ids",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of S token columns, P patch columns and V = P / 4 visual tokens; every leaf is
    batch-major.

    Attributes:
        tokens: [B, S] int32.
        positions: [B, 3, S] int32, MRoPE (time, row, column).
        segment_ids: [B, S] int32: the packed example of each token, from 1; 0 is padding.
        loss_weights: [B, S] float32: weight of the token as a target, predicted from the column
            before it.
        visual_index: [B, S] int32: the visual token of the row that stands at this column, -1 for
            text; -2 - i for visual token i where the decoder does not see it (`hide_images`).
        visual_segment_ids: [B, V] int32: the packed example of each visual token; 0 is padding.
        patches: what the tower reads, by their type: bytes (uint8), of images the one frame, [B, P,
            frame_dim], and of every patch both where a row shows a video, [B, P, patch_dim]; or
            float32 [B, P, patch_dim], as Hugging Face's processors give them.
        patch_scale: [B, P, 4, channels] float32: what the bytes of each patch mean
            (`pvm_jax.data.pixels`).
        patch_positions: [B, P, 2] int32 (row, column) in its frame.
        patch_interp_indices, patch_interp_weights: [B, P, 4]: the four learned positions around a
            patch and their shares.
        patch_segment_ids: [B, P] int32: the frame of each patch, from 1 in each row; 0 is padding.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    loss_weights: Array
    visual_index: Array
    visual_segment_ids: Array
    patches: Array
    patch_scale: Array
    patch_positions: Array
    patch_interp_indices: Array
    patch_interp_weights: Array
    patch_segment_ids: Array

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        *,
        rows: int,
        length: int,
        patches: int,
        videos: bool = False,
        floats: bool = False,
    ) -> Self:
        """All padding, in NumPy. `patches` must be a multiple of the merge factor (4).

        Args:
            videos: whether a patch has room for all frames of a video's.
            floats: whether patches are numbers, and no bytes.
        """
        vision = config.vision
        merge = vision.merge_factor
        if patches % merge:
            raise ValueError(f"a row's patches must be a multiple of {merge}, got {patches}")
        token, patch = (rows, length), (rows, patches)
        width = vision.patch_dim if videos or floats else vision.frame_dim
        return cls(
            tokens=np.zeros(token, np.int32),
            positions=np.zeros((rows, 3, length), np.int32),
            segment_ids=np.zeros(token, np.int32),
            loss_weights=np.zeros(token, np.float32),
            visual_index=np.full(token, -1, np.int32),
            visual_segment_ids=np.zeros((rows, patches // merge), np.int32),
            patches=np.zeros((*patch, width), np.float32 if floats else np.uint8),
            patch_scale=np.tile(no_scale(vision.in_channels), (*patch, 1, 1)),
            patch_positions=np.zeros((*patch, 2), np.int32),
            patch_interp_indices=np.zeros((*patch, 4), np.int32),
            patch_interp_weights=np.zeros((*patch, 4), np.float32),
            patch_segment_ids=np.zeros(patch, np.int32),
        )

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Sequence[Example]],
        config: ModelConfig,
        *,
        length: int,
        patches: int,
        videos: bool | None = None,
        among: Sequence[Example] = (),
    ) -> Self:
        """Packs each row's examples, in order, into `length` token and `patches` patch columns.

        Args:
            videos: as of `empty`; None: where an example shows one.
            among: further examples, for whose patches there would be room too.

        Raises:
            ValueError: if a row does not fit (nothing is ever cut), or an example is malformed; it
                names the row.
        """
        form = _form([*among, *(example for row in rows for example in row)], videos)
        batch = cls.empty(config, rows=len(rows), length=length, patches=patches, **form)
        for number, row in enumerate(rows):
            used = (
                sum(len(example.input_ids) for example in row),
                sum(example.num_patches for example in row),
            )
            if used[0] > length or used[1] > patches:
                raise ValueError(
                    f"row {number} has {used[0]} tokens and {used[1]} patches, the batch's columns"
                    f" are {length} and {patches}"
                )
            writer = _RowWriter(batch, number, config)
            for example in row:
                start = writer.column
                writer.add(example, np.arange(start, start + len(example.input_ids)))
        return batch

    @classmethod
    def from_examples(
        cls,
        examples: Sequence[Example],
        config: ModelConfig,
        *,
        among: Sequence[Example] | None = None,
    ) -> Self:
        """One example a row, in columns of the next `bucket_size` that holds the longest of `among`
        (default: `examples`).

        Raises:
            ValueError: as `from_rows`.
        """
        among = examples if among is None else among
        length = bucket_size(max(len(example.input_ids) for example in among))
        patches = bucket_size(max(example.num_patches for example in among))
        rows = [[example] for example in examples]
        return cls.from_rows(rows, config, length=length, patches=patches, among=among)

    @classmethod
    def from_hf(cls, arrays: Mapping[str, Any], config: ModelConfig) -> Self:
        """The batch of what a Hugging Face Qwen3-VL processor gives, left- or right-padded.

        Rows and columns stay where they are; columns are added on the right up to the bucket.

        Args:
            arrays: `input_ids` [B, S]; optionally `attention_mask` [B, S], `labels` [B, S] (-100:
                not learned), `pixel_values` [P, patch_dim] and `image_grid_thw` [images, 3] of all
                rows in order, and the same for videos (`pixel_values_videos`, `video_grid_thw`).

        Raises:
            ValueError: if placeholders and images do not match, a placeholder run is cut, or a
                token id is outside the vocabulary; it names the row.
        """
        examples, columns = split_rows(
            {key: np.asarray(value) for key, value in arrays.items()}, config
        )
        batch = cls.empty(
            config,
            rows=len(examples),
            length=bucket_size(np.shape(arrays["input_ids"])[1]),
            patches=bucket_size(max(example.num_patches for example in examples)),
            **_form(examples),
        )
        for number, (example, where) in enumerate(zip(examples, columns, strict=True)):
            _RowWriter(batch, number, config).add(example, where)
        return batch


def hide_images(batch: Batch, rows: Sequence[bool]) -> Batch:
    """`batch` with the images of some of its `rows` [B] hidden from the decoder, which reads bare
    placeholders in their place: only the branch's memory holds what they show."""
    index = np.asarray(batch.visual_index)
    hidden = np.asarray(rows)[:, None] & (index >= 0)
    return dataclasses.replace(batch, visual_index=np.where(hidden, -2 - index, index))


def bucket_size(count: int) -> int:
    """The padded size for `count` columns: 0, or the next of 64, 80, 96, 112, 128, 160, 192, 224,
    256, 320, ...

    Four sizes an octave: at most a quarter is padding, and few shapes are ever compiled. All are
    multiples of 16.
    """
    if count == 0:
        return 0
    octave = 64
    while octave * 2 <= count:
        octave *= 2
    return max(64, -(-count // (octave // 4)) * (octave // 4))


def _form(examples: Sequence[Example], videos: bool | None = None) -> dict[str, bool]:
    """How `Batch.empty` holds the patches of these examples: bytes, unless one of them has other
    numbers."""
    if videos is None:
        videos = any(example.pixel_values_videos is not None for example in examples)
    floats = any(pixels.dtype != np.uint8 for example in examples for pixels in example.pixels)
    return {"videos": videos, "floats": floats}


class _RowWriter:
    """Fills one row of an empty batch, example after example."""

    def __init__(self, batch: Batch, row: int, config: ModelConfig):
        self.batch, self.row, self.config = batch, row, config
        self.column = self.patch = self.frame = self.segment = 0

    def add(self, example: Example, columns: np.ndarray) -> None:
        """Writes `example` at the token `columns` [S] and at the next free patches."""
        batch, row, merge = self.batch, self.row, self.config.vision.merge_factor
        try:
            images = visual_runs(example, self.config)
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from None
        self.segment += 1
        batch.tokens[row, columns] = example.input_ids
        batch.segment_ids[row, columns] = self.segment
        batch.positions[row][:, columns] = mrope_positions(
            len(example.input_ids), images, self.config.vision
        )
        if example.loss_mask is not None:
            batch.loss_weights[row, columns[1:]] = example.loss_mask[
                1:
            ]  # the first token has nothing to be predicted from
        for image in images:
            geometry = frame_geometry(image.rows, image.columns, self.config.vision)
            where = slice(self.patch, self.patch + len(image.pixels))
            tokens = np.arange(self.patch // merge, where.stop // merge)
            self.frame += 1
            batch.patches[row, where] = self._as_held(image)
            if image.scale is not None:
                batch.patch_scale[row, where] = image.scale
            batch.patch_positions[row, where] = geometry.positions
            batch.patch_interp_indices[row, where] = geometry.interp_indices
            batch.patch_interp_weights[row, where] = geometry.interp_weights
            batch.patch_segment_ids[row, where] = self.frame
            batch.visual_index[row, columns[image.start : image.start + len(tokens)]] = tokens
            batch.visual_segment_ids[row, tokens] = self.segment
            self.patch = where.stop
        self.column += len(columns)

    def _as_held(self, image: Frame) -> np.ndarray:
        """The image's patches as the batch holds its own, [P, frame_dim or patch_dim]."""
        patches, vision = self.batch.patches, self.config.vision
        if patches.dtype != np.uint8:
            return as_floats(image.pixels, image.scale, vision.patch_dim)
        if image.pixels.shape[1] > patches.shape[2]:
            raise ValueError(
                f"row {self.row} shows a video, and the batch has room for one frame a patch:"
                " it was made with videos=False"
            )
        return repeat_frame(image.pixels, vision.in_channels, patches.shape[2])


def split_rows(
    arrays: dict[str, np.ndarray], config: ModelConfig
) -> tuple[list[Example], list[np.ndarray]]:
    """One Example per row, and the columns that its tokens stand at."""
    ids = arrays["input_ids"]
    if ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, S], got shape {ids.shape}")
    mask = arrays.get("attention_mask", np.ones_like(ids)).astype(bool)
    labels = arrays.get("labels")
    for name, array in (("attention_mask", mask), ("labels", labels)):
        if array is not None and array.shape != ids.shape:
            raise ValueError(f"{name} must be {ids.shape} like input_ids, got {array.shape}")
    images = _Supply("image", arrays.get("pixel_values"), arrays.get("image_grid_thw"))
    videos = _Supply("video", arrays.get("pixel_values_videos"), arrays.get("video_grid_thw"))
    examples, columns = [], []
    for row in range(len(ids)):
        where = np.flatnonzero(mask[row])
        tokens = ids[row, where]
        if not len(tokens):
            raise ValueError(f"row {row}: every token is masked")
        if len(where) <= where[-1] - where[0]:
            raise ValueError(
                f"row {row}: attention_mask is 0 between tokens; padding stands before or behind"
            )
        loss_mask = None
        if labels is not None:
            loss_mask = labels[row, where] != -100
            if (labels[row, where] != tokens)[loss_mask].any():
                raise ValueError(f"row {row}: labels must be -100 or equal input_ids")
        try:
            image = images.take(len(runs_of(tokens, config.image_token_id)[0]))
            video = videos.take(len(runs_of(tokens, config.video_token_id)[0]))
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from None
        examples.append(Example(tokens, *image, *video, loss_mask))
        columns.append(where)
    images.check_used()
    videos.check_used()
    return examples, columns


class _Supply:
    """Hands the images (or videos) of all rows out, row by row, as many frames as the row has runs
    of placeholders."""

    def __init__(self, kind: str, pixels: np.ndarray | None, grids: np.ndarray | None):
        if (pixels is None) != (grids is None):
            raise ValueError(f"{kind} pixels and {kind}_grid_thw must come together")
        self.kind, self.pixels, self.grids = kind, pixels, grids
        self.grid = self.patch = 0

    def take(self, frames: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Pixels and grids of the next grids that make up `frames` frames; (None, None) for 0."""
        if not frames:
            return None, None
        if self.pixels is None or self.grids is None:
            raise ValueError(
                f"the prompt has {self.kind} placeholders, but there are no {self.kind} pixels"
            )
        stop, left = self.grid, frames
        while left > 0 and stop < len(self.grids):
            left -= int(self.grids[stop, 0])
            stop += 1
        if left:
            raise ValueError(
                f"the prompt has {frames} runs of {self.kind} placeholders, which the grids left"
                " for it do not match"
            )
        grids = self.grids[self.grid : stop]
        pixels = self.pixels[self.patch : self.patch + int(grids.prod(1).sum())]
        self.grid, self.patch = stop, self.patch + len(pixels)
        return pixels, grids

    def check_used(self) -> None:
        if self.grids is not None and self.grid != len(self.grids):
            raise ValueError(
                f"{len(self.grids)} {self.kind}s were given, but the prompts have placeholders for"
                f" {self.grid}"
            )
        if self.pixels is not None and self.patch != len(self.pixels):
            raise ValueError(
                f"{len(self.pixels)} {self.kind} patches were given, but the grids cover"
                f" {self.patch}"
            )
