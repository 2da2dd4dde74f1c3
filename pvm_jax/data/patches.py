"""Pictures and frames -> flattened patches of bytes, in NumPy and PIL; what size they get first.

With their scale (`pvm_jax.data.pixels`) they are bit-equal to those of transformers'
`Qwen2VLImageProcessorPil` (which needs neither torch nor torchvision); videos follow its
`Qwen3VLVideoProcessor`, with PIL's bicubic filter in place of torchvision's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from pvm_jax.data.pixels import scale_of
from pvm_jax.data.video_files import FrameSampling
from pvm_jax.files.json_file import is_number

MAX_ASPECT_RATIO = 200
CHANNELS = 3

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class PixelSettings:
    """What a checkpoint's preprocessor config says; `ImageSettings` and `VideoSettings` say what
    follows from it.

    Attributes:
        min_pixels, max_pixels: bounds of rows * columns after resizing (for a video: of all its
            frames together).
        patch_size: side of a patch in pixels.
        merge_size: side, in patches, of the square that becomes one visual token.
        temporal_patch_size: frames in one patch.
        mean, std: per channel, of values already multiplied by `rescale_factor`.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    merge_size: int = 2
    temporal_patch_size: int = 2
    rescale_factor: float = 1 / 255

    computes: ClassVar[dict[str, tuple[Any, ...]]] = {
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_convert_rgb": (True,),
        "resample": (int(Image.Resampling.BICUBIC),),
    }
    refuses: ClassVar[tuple[str, ...]] = ()
    sizes: ClassVar[tuple[str, ...]] = (
        "min_pixels",
        "max_pixels",
        "patch_size",
        "merge_size",
        "temporal_patch_size",
    )
    default_size: ClassVar[dict[str, int]]

    def __post_init__(self):
        for name in self.sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not (is_number(self.rescale_factor) and self.rescale_factor > 0):
            raise ValueError(
                f"rescale_factor must be a finite number above 0, got {self.rescale_factor!r}"
            )
        if not all(map(is_number, self.mean)):
            raise ValueError(f"image_mean must be finite numbers, got {self.mean}")
        if not all(is_number(value) and value > 0 for value in self.std):
            raise ValueError(f"image_std must be finite numbers above 0, got {self.std}")
        if Image.MAX_IMAGE_PIXELS is not None and self.min_pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"min_pixels {self.min_pixels} would make every picture larger than PIL reads one"
                f" ({Image.MAX_IMAGE_PIXELS} pixels)"
            )
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"need 0 < min_pixels <= max_pixels, got {self.min_pixels} and {self.max_pixels}"
            )
        if self.patch_size % 2:
            raise ValueError(f"patch_size must be even, got {self.patch_size}")
        if self.factor**2 > self.max_pixels:
            raise ValueError(
                f"a visual token has {self.factor} x {self.factor} pixels, more than max_pixels"
                f" {self.max_pixels}"
            )

    @property
    def factor(self) -> int:
        """Resized sides are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch with all its frames."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_config(cls, config: Mapping[str, Any], file: str) -> Self:
        """Reads Hugging Face's preprocessor config; `file` is its name in errors.

        Where `size` is absent, Hugging Face's default for the class counts. Keys that do not bear
        on pixels are skipped.

        Raises:
            ValueError: for a setting that is not computed here, or a missing one whose default is
                another model's.
        """
        values: dict[str, Any] = {key: value for key, value in config.items() if value is not None}
        for key, computed in cls.computes.items():
            if values.get(key, computed[0]) not in computed:
                raise ValueError(
                    f"{file}: {key} = {values[key]!r} is not supported, only"
                    f" {' or '.join(map(repr, computed))}"
                )
        for key in cls.refuses:
            if key in values:
                raise ValueError(f"{file}: {key} is not read by Hugging Face for videos; use size")
        size = values.get("size", cls.default_size)
        if not isinstance(size, Mapping):
            raise ValueError(f"{file}: size must have shortest_edge and longest_edge, got {size}")
        values = {
            "min_pixels": size.get("shortest_edge"),
            "max_pixels": size.get("longest_edge"),
        } | values
        for key in ("min_pixels", "max_pixels", "patch_size", "image_mean", "image_std"):
            if values.get(key) is None:
                raise ValueError(
                    f"{file}: {key} is missing (size.shortest_edge and .longest_edge are the pixel"
                    " limits)"
                )
        try:
            values["mean"], values["std"] = (
                _per_channel(values["image_mean"]),
                _per_channel(values["image_std"]),
            )
            return cls(
                **{field.name: values[field.name] for field in fields(cls) if field.name in values}
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """(frame groups, rows, columns) of patches. Raises ValueError where Hugging Face refuses
        the size."""
        if min(height, width) < 1:
            raise ValueError(f"an image of {width} x {height} pixels is empty")
        rows, columns = (side // self.patch_size for side in self.resized(frames, height, width))
        return -(-frames // self.temporal_patch_size), rows, columns

    def resized(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing."""
        raise NotImplementedError

    @property
    def scale(self) -> np.ndarray:
        """[4, channels] float32: what becomes of a byte (`pvm_jax.data.pixels`)."""
        raise NotImplementedError


class ImageSettings(PixelSettings):
    """Settings of `Qwen2VLImageProcessorPil`."""

    computes = PixelSettings.computes | {
        "image_processor_type": (
            "Qwen2VLImageProcessor",
            "Qwen2VLImageProcessorFast",
            "Qwen2VLImageProcessorPil",
        )
    }
    default_size: ClassVar[dict[str, int]] = {
        "shortest_edge": 56 * 56,
        "longest_edge": 28 * 28 * 1280,
    }

    def resized(self, frames: int, height: int, width: int) -> tuple[int, int]:
        return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)

    @property
    def scale(self) -> np.ndarray:
        return scale_of(self.rescale_factor, _channels(self.mean), _channels(self.std))


@dataclass(frozen=True)
class VideoSettings(PixelSettings):
    """Settings of `Qwen3VLVideoProcessor`, `fps` and the two bounds for video files alone; of a
    list of frames all are used."""

    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768
    fps: float = FrameSampling.fps
    min_frames: int = FrameSampling.min_frames
    max_frames: int = FrameSampling.max_frames

    computes = PixelSettings.computes | {"video_processor_type": ("Qwen3VLVideoProcessor",)}
    refuses = ("min_pixels", "max_pixels")
    sizes = (*PixelSettings.sizes, "max_video_tokens", "min_frames", "max_frames")
    default_size: ClassVar[dict[str, int]] = {
        "shortest_edge": 128 * 32 * 32,
        "longest_edge": 768 * 32 * 32,
    }

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.cap_pixels_per_frame, bool):
            raise ValueError(
                f"cap_pixels_per_frame must be true or false, got {self.cap_pixels_per_frame!r}"
            )
        if not (is_number(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be a finite number above 0, got {self.fps!r}")

    @property
    def sampling(self) -> FrameSampling:
        """Which frames of a file are taken."""
        return FrameSampling(self.fps, self.min_frames, self.max_frames)

    def resized(self, frames: int, height: int, width: int) -> tuple[int, int]:
        if frames < self.temporal_patch_size:
            raise ValueError(
                f"a video needs {self.temporal_patch_size} frames or more, got {frames}"
            )
        factor = self.factor
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(f"absolute aspect ratio must be smaller than {MAX_ASPECT_RATIO}")
        bounds = round(height / factor) * factor, round(width / factor) * factor
        total = (
            round(frames / self.temporal_patch_size) * self.temporal_patch_size * math.prod(bounds)
        )
        limit = self._max_pixels(frames)
        if total > limit:
            beta = math.sqrt(frames * height * width / limit)
            rows, columns = (
                max(factor, math.floor(side / beta / factor) * factor) for side in (height, width)
            )
            return rows, columns
        if total < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (frames * height * width))
            rows, columns = (math.ceil(side * beta / factor) * factor for side in (height, width))
            return rows, columns
        return bounds

    def _max_pixels(self, frames: int) -> int:
        if not self.cap_pixels_per_frame:
            return self.max_pixels
        share = min(self.max_video_tokens * self.factor**2, self.max_pixels // frames)
        return max(share, int(self.min_pixels * 1.05)) * frames

    @property
    def scale(self) -> np.ndarray:
        # torchvision folds the rescaling into mean and std, which rounds differently from the image
        # processor.
        unscale = np.float32(1 / self.rescale_factor)
        return scale_of(1.0, _channels(self.mean) * unscale, _channels(self.std) * unscale)


def patches(frames: Sequence[Image.Image], settings: PixelSettings) -> tuple[np.ndarray, Grid]:
    """The flattened patches of one image (one frame) or one video (all frames of one size), and
    their grid.

    Returns:
        [groups * rows * columns, 3 * frames * patch_size**2] uint8, the patches of a visual token
        together; and (groups, rows, columns). An image's patch holds one frame, a video's
        `temporal_patch_size`: the last one is repeated where a group is not full.

    Raises:
        ValueError: if Hugging Face refuses the size, or the frames differ in size.
    """
    if len(sizes := {frame.size for frame in frames}) > 1:
        raise ValueError(
            f"the frames of a video must have one size (width, height), got {sorted(sizes)}"
        )
    width, height = frames[0].size
    grid = groups, rows, columns = settings.grid(len(frames), height, width)
    size = columns * settings.patch_size, rows * settings.patch_size
    resized = [np.asarray(frame.resize(size, Image.Resampling.BICUBIC)) for frame in frames]
    if len(frames) > 1:
        resized += resized[-1:] * (groups * settings.temporal_patch_size - len(frames))
    square, side = settings.merge_size, settings.patch_size
    pixels = np.stack(resized).reshape(
        groups, -1, rows // square, square, side, columns // square, square, side, CHANNELS
    )
    pixels = np.ascontiguousarray(pixels.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7))
    return pixels.reshape(math.prod(grid), -1), grid


def _per_channel(value: float | Sequence[float]) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * CHANNELS
    if len(values) != CHANNELS:
        raise ValueError(f"image_mean and image_std need three numbers, got {value}")
    return values


def _channels(values: tuple[float, ...]) -> np.ndarray:
    return np.array(values, np.float32)
