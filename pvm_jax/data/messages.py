"""Chat messages as users give them -> what the chat template reads, and the images and videos
beside it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pvm_jax.data.images import Source

DEFAULT_FPS = 24.0

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Video:
    """The frames of a video, and the second at which each was taken."""

    frames: Sequence[Source]
    seconds: Sequence[float]

    def moments(self, group: int) -> list[float]:
        """The time of each group of frames, midway between its first and last; the last frame fills
        up its group."""
        seconds = [*self.seconds, *[self.seconds[-1]] * (-len(self.seconds) % group)]
        return [(seconds[i] + seconds[i + group - 1]) / 2 for i in range(0, len(seconds), group)]


@dataclass(frozen=True)
class Conversation:
    """A parsed conversation.

    Attributes:
        messages: what the chat template reads: images and videos are bare {"type": …} parts.
        images, videos: the sources in their order, each with its place for errors.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[tuple[str, Source]] = field(default_factory=list)
    videos: list[tuple[str, Video]] = field(default_factory=list)


def parse(messages: Messages, reserved: Sequence[str]) -> Conversation:
    """Reads messages {"role": …, "content": text or parts}; other keys (tool_calls, …) go on to the
    template.

    Args:
        reserved: tokens that no text may hold, since the chat template gives a conversation its
            structure by them.

    Raises:
        ValueError: for anything malformed, with its place.
    """
    if isinstance(messages, str | Mapping) or len(messages) == 0:
        raise ValueError("a conversation must be a list of at least one message")
    conversation = Conversation()
    for number, message in enumerate(messages):
        with naming(f"messages[{number}]"):
            conversation.messages.append(
                _parse_message(message, f"messages[{number}]", conversation)
            )
            for text in _strings(conversation.messages[-1]):
                if typed := [token for token in reserved if token in text]:
                    raise ValueError(
                        f"the text holds {typed[0]}, which only the chat template may write: give"
                        ' images and videos as parts ({"type": "image", "image": …}), and each'
                        " turn as a message of its own"
                    )
    return conversation


def asked(messages: Messages) -> Messages:
    """The conversation without its last turn, if that is the assistant's: what there is to answer.

    Raises:
        ValueError: if that is nothing.
    """
    asked = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    if not asked or asked[-1].get("role") == "assistant":
        raise ValueError(
            "the conversation has no turn to answer: its last one, the assistant's left out, must"
            " be the user's"
        )
    return asked


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts `where` in front of an error's message."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _parse_message(
    message: Mapping[str, Any], where: str, conversation: Conversation
) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f'a message must be {{"role": …, "content": …}}, got {message!r:.80}')
    message = _present(message)
    content = message.get("content", "" if "tool_calls" in message else None)
    if isinstance(content, list | tuple):
        parts = []
        for number, part in enumerate(content):
            with naming(f"content[{number}]"):
                parts.append(_parse_part(part, f"{where}: content[{number}]", conversation))
        return message | {"content": parts}
    if not isinstance(content, str):
        raise ValueError(
            f"content must be a string or a list of parts, got {type(content).__name__}"
        )
    return message | {"content": content}


def _parse_part(part: Mapping[str, Any], where: str, conversation: Conversation) -> dict[str, Any]:
    """The part for the template; an image or video goes to `conversation`."""
    if not isinstance(part, Mapping):
        raise ValueError(
            f'a part must be {{"type": "text" | "image" | "video", …}}, got {part!r:.80}'
        )
    part = _present(part)
    match part.pop("type", None):
        case "text":
            text = part.pop("text", None)
            if not isinstance(text, str):
                raise ValueError("a text part needs a string under 'text'")
            parsed = {"type": "text", "text": text}
        case "image":
            given = [key for key in ("image", "url", "path") if key in part]
            if len(given) != 1:
                raise ValueError(
                    "an image part needs one source, under 'image', 'url' or 'path', got"
                    f" {given or 'none'}"
                )
            conversation.images.append((where, part.pop(given[0])))
            parsed = {"type": "image"}
        case "video":
            conversation.videos.append((where, _parse_video(part)))
            parsed = {"type": "video"}
        case kind:
            raise ValueError(f"unknown part type {kind!r}: there are text, image and video")
    if part:
        raise ValueError(f"{parsed['type']} parts have no {', '.join(part)}")
    return parsed


def _parse_video(part: dict[str, Any]) -> Video:
    frames, fps, seconds = (part.pop(key, None) for key in ("video", "fps", "timestamps"))
    if isinstance(frames, str | Path | bytes):
        raise ValueError(
            "video files are not decoded here: give the list of frames, with their fps"
        )
    if not isinstance(frames, list | tuple | np.ndarray) or len(frames) == 0:
        raise ValueError("a video part needs its list of frames under 'video'")
    if seconds is None:
        if fps is None:
            warnings.warn(
                f"a video has neither fps nor timestamps: taking {DEFAULT_FPS:g} frames a second,"
                " as Hugging Face does",
                stacklevel=2,
            )
            fps = DEFAULT_FPS
        if not isinstance(fps, int | float | np.integer | np.floating) or not 0 < fps < float(
            "inf"
        ):
            raise ValueError(f"fps must be a positive number, got {fps!r}")
        return Video(list(frames), [number / float(fps) for number in range(len(frames))])
    if fps is not None:
        raise ValueError("give fps or timestamps, not both")
    try:
        seconds = [float(second) for second in seconds]
    except (TypeError, ValueError) as error:
        raise ValueError(f"timestamps must be seconds, one for each frame: {error}") from error
    if len(seconds) != len(frames) or seconds != sorted(seconds):
        raise ValueError(
            f"timestamps must be {len(frames)} ascending seconds, one for each frame, got {seconds}"
        )
    return Video(list(frames), seconds)


def _present(value: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that hold None, with which tables of messages (datasets) fill their
    columns."""
    return {key: item for key, item in value.items() if item is not None}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
