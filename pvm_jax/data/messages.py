"""Chat messages as users give them -> what the chat template reads, and the images and videos
beside it."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np

from pvm_jax.data.boxes import Box, read_boxes
from pvm_jax.data.image_files import Source
from pvm_jax.data.video_files import Video, VideoFile
from pvm_jax.files.json_file import is_number

DEFAULT_FPS = 24.0

IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
"""Under which an image part holds its picture."""

VIDEO_KEYS = ("video", "path", "url")
"""Under which a video part holds its frames or its file."""

MARKS = ("weight", "loss", "train", "trainable")
"""Keys of an assistant turn that say whether it is learned, in the words of OpenAI, ms-swift,
Axolotl and verl."""

_CALL_KEYS = ("id", "type", "index")
_FUNCTION_KEYS = ("name", "arguments")

Messages = Sequence[Mapping[str, Any]]


class ChatMessages(list[Mapping[str, Any]]):
    """Messages with what their record gives the chat template besides; a slice keeps it.

    Attributes:
        variables: by name: `tools` (a list of JSON schemas), and others that the template reads.
    """

    def __init__(
        self, messages: Iterable[Mapping[str, Any]] = (), variables: Mapping[str, Any] | None = None
    ):
        super().__init__(messages)
        self.variables = dict(variables or {})

    @overload
    def __getitem__(self, index: SupportsIndex) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> "ChatMessages": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "Mapping[str, Any] | ChatMessages":
        found = super().__getitem__(index)
        return ChatMessages(found, self.variables) if isinstance(found, list) else found


def variables_of(messages: Messages) -> dict[str, Any]:
    """What the chat template is given beside the messages."""
    return dict(messages.variables) if isinstance(messages, ChatMessages) else {}


@dataclass(frozen=True)
class Conversation:
    """A parsed conversation.

    Attributes:
        messages: what the chat template reads: images and videos are bare {"type": …} parts.
        images, videos: the sources in their order, each with its place for errors.
        boxes: what is marked in each image.
        unlearned: places of the assistant turns that are marked as not to be learned.
        variables: what else the chat template reads, as tools.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[tuple[str, Source]] = field(default_factory=list)
    videos: list[tuple[str, Video | VideoFile]] = field(default_factory=list)
    boxes: list[list[Box]] = field(default_factory=list)
    unlearned: set[int] = field(default_factory=set)
    variables: dict[str, Any] = field(default_factory=dict)


def parse(messages: Messages, reserved: Sequence[str]) -> Conversation:
    """Reads messages {"role": …, "content": text or parts}; other keys (tool_calls, …) go on to the
    template.

    A key of a message, a part or a call that holds None is as if it were not there. What the
    template writes as it stands, a call's arguments and the tools, keeps its own: where a table
    has filled it in, `tables` has taken it out.

    Args:
        reserved: tokens that nothing of the user's may hold, since the chat template gives a
            conversation its structure by them.

    Raises:
        ValueError: for anything malformed, with its place.
    """
    if isinstance(messages, str | Mapping) or len(messages) == 0:
        raise ValueError("a conversation must be a list of at least one message")
    variables = variables_of(messages)
    conversation = Conversation(variables={k: v for k, v in variables.items() if v is not None})
    for number, message in enumerate(messages):
        with naming(f"messages[{number}]"):
            message = _parse_message(message, f"messages[{number}]", conversation)
            if not is_learned(message):
                conversation.unlearned.add(number)
            message = {key: value for key, value in message.items() if key not in MARKS}
            conversation.messages.append(message)
            _check_calls(message.get("tool_calls", []))
            _check_texts(message, reserved)
    for name, value in conversation.variables.items():
        with naming(name):
            _check_texts({name: value}, reserved)
    return conversation


def shows_video(messages: Messages) -> bool:
    """Whether a part of one of the turns is a video."""
    return any(
        isinstance(part, Mapping) and part.get("type") == "video"
        for message in messages
        if isinstance(content := message.get("content"), list | tuple)
        for part in content
    )


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether the loss falls on this turn: on the assistant's, unless one of MARKS says no.

    Raises:
        ValueError: for marks that are neither yes nor no, that differ, or of another's turn.
    """
    marks = {key: message[key] for key in MARKS if message.get(key) is not None}
    for key, mark in marks.items():
        if not isinstance(mark, bool | int | float) or mark not in (0, 1):
            raise ValueError(f"{key} must be true or false (1 or 0), got {mark!r}")
    answer = message.get("role") == "assistant"
    if len(set(map(bool, marks.values()))) > 1:
        raise ValueError(f"{' and '.join(marks)} say different things: leave one of them out")
    if not answer and any(marks.values()):
        raise ValueError(
            f"{next(iter(marks))}: loss falls on assistant turns alone, this one's role is"
            f" {message.get('role')!r}"
        )
    return answer and all(marks.values())


def _check_calls(calls: Any) -> None:
    """Raises ValueError unless they are calls of functions, as {"function": {"name": …,
    "arguments": …}} or the function alone."""
    for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if (
            not isinstance(call, Mapping)
            or not isinstance(function, Mapping)
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("arguments", {}), str | Mapping)
        ):
            raise ValueError(
                f'tool_calls[{number}] must be {{"type": "function", "function": {{"name": …,'
                f' "arguments": {{…}}}}}}, got {call!r:.80}'
            )
        known = (
            {"function", *_CALL_KEYS} if function is not call else {*_CALL_KEYS, *_FUNCTION_KEYS}
        )
        if unread := {*call} - known | {*function} - known - {*_FUNCTION_KEYS}:
            raise ValueError(f"tool_calls[{number}]: nothing reads {', '.join(sorted(unread))}")


def _check_texts(value: Any, reserved: Sequence[str]) -> None:
    """Raises ValueError for a text that is not Unicode, or that could become one of the `reserved`
    tokens, also where the template writes several texts one after the other."""
    for text in _strings(value):
        if typed := [token for token in reserved if token in text]:
            raise ValueError(
                f"the text holds {typed[0]}, which only the chat template may write: give"
                ' images and videos as parts ({"type": "image", "image": …}), and each'
                " turn as a message of its own"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode: half a surrogate pair, {text[error.start]!a}, at"
                f" {error.start}"
            ) from error


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
    message = {
        key: value if key == "content" else _present(value)
        for key, value in message.items()
        if value is not None
    }
    content = message.get("content", "" if message.get("tool_calls") else None)
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
    part = {key: value for key, value in part.items() if value is not None}
    match part.pop("type", None):
        case "text":
            text = part.pop("text", None)
            if not isinstance(text, str):
                raise ValueError("a text part needs a string under 'text'")
            parsed = {"type": "text", "text": text}
        case "image" | "image_url":
            conversation.boxes.append(read_boxes(part.pop("boxes", [])))
            conversation.images.append((where, image_source(part)))
            parsed = {"type": "image"}
        case "video":
            conversation.videos.append((where, _parse_video(part)))
            parsed = {"type": "video"}
        case kind:
            raise ValueError(f"unknown part type {kind!r}: there are text, image and video")
    if part:
        raise ValueError(f"{parsed['type']} parts have no {', '.join(part)}")
    return parsed


def image_source(part: dict[str, Any]) -> Source:
    """Takes the picture out of an image part, which then is without it.

    Raises:
        ValueError: unless there is one.
    """
    if part.get("text") == "":
        del part["text"]
    given = [key for key in IMAGE_KEYS if key in part]
    if len(given) != 1:
        raise ValueError(
            f"an image part needs one source, under {', '.join(map(repr, IMAGE_KEYS[:-1]))} or"
            f" {IMAGE_KEYS[-1]!r}, got {given or 'none'}"
        )
    source = part.pop(given[0])
    if given[0] == "base64":
        return f"data:image;base64,{source}"
    if given[0] == "image_url" and isinstance(source, Mapping):
        if unread := _present(source).keys() - {"url", "detail"}:
            raise ValueError(f"image_url: nothing reads {', '.join(sorted(unread))}")
        if source.get("detail") not in (None, "auto"):
            raise ValueError(
                "image_url: the checkpoint's settings say how fine a picture is read: leave"
                " 'detail' out"
            )
        return source.get("url", "")
    return source


def video_source(part: dict[str, Any]) -> Any:
    """Takes the frames or the file out of a video part, which then is without it.

    Raises:
        ValueError: unless there is one of them.
    """
    given = [key for key in VIDEO_KEYS if key in part]
    if len(given) != 1:
        raise ValueError(
            "a video part needs its file or its list of frames under 'video' (a file also under"
            f" 'path' or 'url'), got {given or 'none'}"
        )
    return part.pop(given[0])


def video_file(source: Any, part: dict[str, Any]) -> VideoFile:
    """A file with what the part says of its frames, which then is without it.

    Raises:
        ValueError: for what makes no sense.
    """
    fps, count = (part.pop(key, None) for key in ("fps", "num_frames"))
    if fps is not None and count is not None:
        raise ValueError("give fps or num_frames, not both")
    if fps is not None and not (is_number(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    if count is not None and not (isinstance(count, int) and count > 1):
        raise ValueError(f"num_frames must be a whole number of at least 2, got {count!r}")
    return VideoFile(source, fps, count)


def is_video_file(source: Any) -> bool:
    """Whether a video's source is a file, and no list of frames."""
    return isinstance(source, str | Path | bytes | Mapping)


def _parse_video(part: dict[str, Any]) -> Video | VideoFile:
    frames = video_source(part)
    if is_video_file(frames):
        return video_file(frames, part)
    fps, seconds = (part.pop(key, None) for key in ("fps", "timestamps"))
    if not isinstance(frames, list | tuple | np.ndarray) or len(frames) == 0:
        raise ValueError("a video part needs its file or its list of frames under 'video'")
    if seconds is None:
        if fps is None:
            warnings.warn(
                f"a video has neither fps nor timestamps: taking {DEFAULT_FPS:g} frames a second,"
                " as Hugging Face does",
                stacklevel=2,
            )
            fps = DEFAULT_FPS
        if not is_number(fps) or not fps > 0:
            raise ValueError(f"fps must be a positive number, got {fps!r}")
        seconds = [number / float(fps) for number in range(len(frames))]
        if not math.isfinite(seconds[-1]):
            raise ValueError(f"fps {fps!r} is too small: the last frame's time is infinite")
        return Video(list(frames), seconds)
    if fps is not None:
        raise ValueError("give fps or timestamps, not both")
    if not isinstance(seconds, list | tuple | np.ndarray) or not all(map(is_number, seconds)):
        raise ValueError(f"timestamps must be seconds, one for each frame, got {seconds!r:.80}")
    seconds = [float(second) for second in seconds]
    if len(seconds) != len(frames) or seconds != sorted(seconds) or seconds[0] < 0:
        raise ValueError(
            f"timestamps must be {len(frames)} ascending seconds from 0 on, one for each frame, got"
            f" {seconds}"
        )
    return Video(list(frames), seconds)


def _present(value: Any) -> Any:
    """Without the keys that hold None, at any depth but in a call's arguments."""
    if isinstance(value, Mapping):
        return {
            key: item if key == "arguments" else _present(item)
            for key, item in value.items()
            if item is not None
        }
    return [_present(item) for item in value] if isinstance(value, list | tuple) else value


def _strings(value: Any) -> Iterator[str]:
    """All texts in `value`, keys among them; of text parts that follow each other also the whole,
    as they stand and without the white space that templates take from their ends."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
        for is_text, run in groupby(value, lambda part: isinstance(_text(part), str)):
            if is_text:
                texts = [_text(part) for part in run]
                yield "".join(texts)
                yield "".join(text.strip() for text in texts)


def _text(part: Any) -> Any:
    return part.get("text") if isinstance(part, Mapping) else None
