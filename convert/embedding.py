"""Chat messages with their pictures and the frames of their videos read into them, as shards hold
them."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from pvm_jax.data.image_files import encoded_bytes, read_image
from pvm_jax.data.messages import image_source, is_video_file, video_file, video_source
from pvm_jax.data.video_files import FrameSampling, VideoFile, decoded


def embedded_message(
    message: Mapping[str, Any], sampling: FrameSampling | None = None
) -> Mapping[str, Any]:
    """The message with its images and frames read into it, of a video file those that are taken by
    `sampling` (None: Hugging Face's)."""
    sampling = sampling or FrameSampling()
    if not isinstance(message.get("content"), list):
        return message
    return dict(message) | {
        "content": [_embedded_part(part, sampling) for part in message["content"]]
    }


def _embedded_part(part: Any, sampling: FrameSampling) -> Any:
    if not isinstance(part, Mapping):
        return part
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "video":
        source = video_source(part)
        if is_video_file(source):
            return _embedded_video(video_file(source, part), sampling) | part
        if isinstance(source, list):
            return part | {"video": [_embedded_image(frame) for frame in source]}
        return part | {"video": source}
    if part.get("type") in ("image", "image_url"):
        source = image_source(part)
        return part | {"type": "image", "image": _embedded_image(source)}
    return part


def _embedded_video(file: VideoFile, sampling: FrameSampling) -> dict[str, Any]:
    """A part with the frames as PNG, which loses nothing, and their times."""
    video, frames = decoded(file, sampling), []
    for frame in video.frames:
        packed = BytesIO()
        read_image(frame).save(packed, "PNG")
        frames.append({"bytes": packed.getvalue(), "path": None})
    return {"type": "video", "video": frames, "timestamps": list(video.seconds)}


def _embedded_image(source: Any) -> dict[str, Any]:
    """{"bytes": the file, "path": its name, for errors}."""
    name = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(name, str) or name.startswith("data:"):
        return {"bytes": encoded_bytes(source), "path": None}
    return {"bytes": encoded_bytes(source), "path": name.rpartition("/")[2]}
