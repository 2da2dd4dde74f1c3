"""Video files -> the frames that Hugging Face's Qwen3-VL processor takes of them, and their times.

This is the one place where a file becomes frames; PyAV decodes it, as it does for Hugging Face.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from pvm_jax.data.image_files import Source, file_of

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")

MAX_FILE_BYTES = 64 * 2**30


@dataclass(frozen=True)
class Video:
    """The frames of a video, and the second at which each was taken."""

    frames: Sequence[Source]
    seconds: Sequence[float]


@dataclass(frozen=True)
class VideoFile:
    """A video as it is stored, and which of its frames are taken.

    Attributes:
        source: a path, a `file://` URL, bytes or {"bytes": …, "path": …}.
        fps: frames a second of the video; None: the checkpoint's.
        num_frames: that many in its place, or all where there are fewer.
    """

    source: Any
    fps: float | None = None
    num_frames: int | None = None


@dataclass(frozen=True)
class FrameSampling:
    """How many frames are taken of a video where it does not say so itself.

    Attributes:
        fps: frames a second.
        min_frames, max_frames: bounds of their number.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768


class Outline(NamedTuple):
    """What is known of a video without decoding it: the size, and the second of each frame that
    is taken."""

    height: int
    width: int
    seconds: list[float]


def moments(seconds: Sequence[float], group: int) -> list[float]:
    """The time of each group of frames, midway between its first and last; the last frame fills up
    its group."""
    seconds = [*seconds, *[seconds[-1]] * (-len(seconds) % group)]
    return [(seconds[i] + seconds[i + group - 1]) / 2 for i in range(0, len(seconds), group)]


def outline(file: VideoFile, sampling: FrameSampling) -> Outline:
    """From the file's header (of a WebM, which has no number of frames in it, from its packets).

    Raises:
        FileNotFoundError, ValueError: if it holds no video.
        ImportError: without PyAV.
    """
    with _opened(file.source) as (container, stream, name):
        places, rate = _sampled(container, stream, name, file, sampling)
        return Outline(stream.height, stream.width, [place / rate for place in places.tolist()])


def decoded(file: VideoFile, sampling: FrameSampling) -> Video:
    """The frames that are taken, each [H, W, 3] uint8, and their times.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `outline`; ValueError also for frames that
            cannot be decoded.
    """
    with _opened(file.source) as (container, stream, name):
        places, rate = _sampled(container, stream, name, file, sampling)
        wanted, frames = set(places.tolist()), []
        try:
            for place, frame in enumerate(container.decode(stream)):
                if place in wanted:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if place == places[-1]:
                    break
        except Exception as error:  # whatever FFmpeg meets in a broken file
            raise ValueError(f"{name} cannot be decoded: {error}") from error
        if len(frames) < len(places):
            raise ValueError(
                f"{name} is cut off: of the {len(places)} frames that are taken of it"
                f" {len(frames)} are there"
            )
    return Video(frames, [place / rate for place in places.tolist()])


def first_frame(video: Video | VideoFile) -> Source:
    """A picture to know the video by. Raises as `decoded`."""
    if isinstance(video, VideoFile):
        video = decoded(VideoFile(video.source, num_frames=1), FrameSampling())
    return video.frames[0]


def sampled_places(total: int, rate: float, file: VideoFile, sampling: FrameSampling) -> np.ndarray:
    """Which of the `total` frames, `rate` a second, are taken: [frames], as
    `Qwen3VLVideoProcessor.sample_frames` has it."""
    if file.num_frames is not None:
        count = min(file.num_frames, total)
    else:
        count = int(total / rate * (sampling.fps if file.fps is None else file.fps))
        count = min(max(count, sampling.min_frames), sampling.max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int)


def _sampled(
    container: Any, stream: Any, name: str, file: VideoFile, sampling: FrameSampling
) -> tuple[np.ndarray, float]:
    """Which frames are taken, and how many the video has a second."""
    total = stream.frames
    if not total:
        total = sum(packet.size > 0 for packet in container.demux(stream))
        container.seek(0)
    rate = stream.average_rate
    if not total or not rate:
        raise ValueError(f"{name} does not say how many frames it has, or how many a second")
    return sampled_places(total, float(rate), file, sampling), float(rate)


@contextmanager
def _opened(source: Any) -> Iterator[tuple[Any, Any, str]]:
    """The container, its video and its name for errors."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "video files are decoded by PyAV: pip install 'pvm-jax[video]'"
        ) from error
    file, name = file_of(source, "video", MAX_FILE_BYTES)
    try:
        container = av.open(file if isinstance(file, BytesIO) else str(file))
    except Exception as error:  # as in `decoded`
        raise ValueError(f"{name} cannot be read as a video: {error}") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"{name} holds no video")
        yield container, container.streams.video[0], name
