"""Pictures and videos beside messages -> into the parts that show them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pvm_jax.data.image_files import HOME
from pvm_jax.data.messages import IMAGE_KEYS, VIDEO_KEYS

_SOURCES = {"image": IMAGE_KEYS, "video": VIDEO_KEYS}
_WORDS = {"image": "pictures", "video": "videos"}

_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/\s]{48,}=*\s*")
"""A PNG, JPEG, GIF or WebP as text."""

_INLINE = re.compile(r"<img>[^<>]+</img>")
_OTHER_TAG = re.compile(
    r"<\|?(?:image|img|video)[ _-]?\d+\|?>|<img>|<\|(?:image|video)\|>"
    r"|(?-i:<Image>|<IMAGE>|<Video>|<VIDEO>)",
    re.IGNORECASE,
)
"""Where others mean a picture to stand: with its path, or beside the pictures of the record."""

Message = Mapping[str, Any]


def placed(messages: Sequence[Message], record: Mapping[str, Any], root: Path) -> Sequence[Message]:
    """The messages with every picture and video of the record in the part that shows it, relative
    paths starting from `root`.

    Parts {"type": "image"} without a picture of their own show the record's, in order or by their
    `index`. Where there are none, `<image>` tags in the texts are the places; where there are none
    of these either, the pictures stand at the beginning of the first user turn, as TRL has it.
    Videos alike.

    Raises:
        ValueError: if places and pictures differ in number, or are said in two ways.
    """
    beside = {kind: _beside(record, kind) for kind in _SOURCES}
    for kind, sources in beside.items():
        if not sources:
            _check_words(messages, kind)
    for kind, sources in beside.items():
        _check_tags(messages, _OTHER_TAG if sources else _INLINE)
        messages = _filled(_with_places(messages, kind, len(sources)), kind, sources)
    return [_with_paths(message, root) for message in messages]


def _beside(record: Mapping[str, Any], kind: str) -> list[Any]:
    """The pictures (or videos) beside the messages, in order."""
    several, single = record.get(f"{kind}s"), record.get(kind)
    if several is not None and not isinstance(several, list):
        raise ValueError(f"'{kind}s' must be a list, got {type(several).__name__}")
    if kind == "video" and single is not None:
        single = [single]
    found = [_given(several or [], f"{kind}s")]
    found.append(_given(single if isinstance(single, list) else [single], kind))
    if all(found):
        raise ValueError(
            f"the record has both an '{kind}s' and an '{kind}' column: leave one of them out"
        )
    return found[0] or found[1]


def _given(sources: list[Any], name: str) -> list[Any]:
    """`sources`, or none where all are empty, as rows without pictures have them."""
    empty = [number for number, source in enumerate(sources) if _is_empty(source)]
    if empty and len(empty) < len(sources):
        raise ValueError(f"{name}[{empty[0]}] is empty: leave it out")
    return [] if empty else sources


def _is_empty(source: Any) -> bool:
    if isinstance(source, Mapping):
        return all(value is None or value == "" for value in source.values())
    return source is None or (isinstance(source, str | list) and not source)


def _with_places(messages: Sequence[Message], kind: str, count: int) -> Sequence[Message]:
    """The messages with parts for `count` pictures that the record has beside them."""
    parts = _showing(messages, kind)
    places = sum(_is_place(part, kind) for part in parts)
    tags = sum(_count_tags(message, kind) for message in messages) if count else 0
    if tags and parts:
        raise ValueError(
            f"the texts have {tags} <{kind}> tags, and there are {kind} parts: leave the tags out"
        )
    if tags and tags != count:
        raise ValueError(
            f"the texts have {tags} <{kind}> tags for the {count} {_WORDS[kind]} of the record"
        )
    if tags:
        return [_split_at_tags(message, kind) for message in messages]
    if count and not parts:
        return _with_leading(messages, kind, count)
    if places != count:
        raise ValueError(
            f"the messages have {places} {kind} parts for the {count} {_WORDS[kind]} of the record"
        )
    return messages


def _check_words(messages: Sequence[Message], kind: str) -> None:
    """Raises ValueError for a tag of a record without pictures, unless it is spoken of: in an
    answer, or in a typed part where no other part shows a picture."""
    parts = _showing(messages, kind)
    tags = sum(
        _count_tags(message, kind)
        for message in messages
        if message.get("role") != "assistant"
        and (parts or not isinstance(message.get("content"), list))
    )
    if tags:
        raise ValueError(
            f"the texts have {tags} <{kind}> tags for the 0 {_WORDS[kind]} of the record"
            + (
                f", and there are {kind} parts: leave the tags out"
                if parts
                else ": if they are words, give them in a part of type text"
            )
        )


def _check_tags(messages: Sequence[Message], other: re.Pattern[str]) -> None:
    """Raises ValueError for a tag of another convention in a question that is a plain text."""
    for message in messages:
        content = message.get("content")
        if message.get("role") == "assistant" or not isinstance(content, str):
            continue
        if found := other.search(content):
            raise ValueError(
                f"the text holds {found[0]:.80}, which is no place of a picture here: write"
                " <image>, and the pictures in their order under 'images'"
            )


def _parts(message: Message) -> list[Any]:
    content = message.get("content")
    return [p for p in content if isinstance(p, Mapping)] if isinstance(content, list) else []


def _showing(messages: Sequence[Message], kind: str) -> list[Mapping[str, Any]]:
    """The parts that show pictures (or videos)."""
    parts = (part for message in messages for part in _parts(message))
    return [part for part in parts if str(part.get("type")).removesuffix("_url") == kind]


def _is_place(part: Mapping[str, Any], kind: str) -> bool:
    """Whether the part shows something that is not in it."""
    return part.get("type") == kind and all(part.get(key) is None for key in _SOURCES[kind])


def _count_tags(message: Message, kind: str) -> int:
    texts = [message.get("content"), *(part.get("text") for part in _parts(message))]
    return sum(text.count(f"<{kind}>") for text in texts if isinstance(text, str))


def _split_at_tags(message: Message, kind: str) -> Message:
    if not _count_tags(message, kind):
        return message
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    split = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            split.append(part)
            continue
        for number, piece in enumerate(text.split(f"<{kind}>")):
            split += [{"type": kind}] * (number > 0) + [dict(part) | {"text": piece}] * bool(piece)
    return dict(message) | {"content": split}


def _with_leading(messages: Sequence[Message], kind: str, count: int) -> Sequence[Message]:
    """Parts before what the first user turn says."""
    first = next((n for n, message in enumerate(messages) if message.get("role") == "user"), None)
    if first is None:
        raise ValueError(
            f"no turn shows the record's {count} {_WORDS[kind]}: there is no user turn"
        )
    content = messages[first].get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise ValueError(
            f"messages[{first}]: content must be a string or a list of parts, got"
            f" {type(content).__name__}"
        )
    shown = dict(messages[first]) | {"content": [{"type": kind}] * count + content}
    return [*messages[:first], shown, *messages[first + 1 :]]


def _filled(messages: Sequence[Message], kind: str, sources: list[Any]) -> Sequence[Message]:
    """The messages with the sources in their places."""
    parts = [part for message in messages for part in _parts(message) if _is_place(part, kind)]
    order = [part.get("index") for part in parts]
    if all(index is None for index in order):
        order = list(range(len(parts)))
    elif sorted(map(repr, order)) != sorted(map(repr, range(len(parts)))):
        raise ValueError(
            f"the 'index' of {kind} parts must be 0 to {len(parts) - 1}, each once, got {order}"
        )
    supply = (sources[index] for index in order)
    filled = []
    for message in messages:
        if any(_is_place(part, kind) for part in _parts(message)):
            content = [
                _with_source(part, kind, next(supply))
                if isinstance(part, Mapping) and _is_place(part, kind)
                else part
                for part in message["content"]
            ]
            message = dict(message) | {"content": content}
        filled.append(message)
    return filled


def _with_source(part: Mapping[str, Any], kind: str, source: Any) -> dict[str, Any]:
    part = {key: value for key, value in part.items() if key != "index"}
    if kind == "video" and isinstance(source, Mapping) and "video" in source:
        return part | dict(source)
    return part | {kind: source}


def _with_paths(message: Message, root: Path) -> Message:
    """The message with the paths in its parts made absolute."""
    if not isinstance(message.get("content"), list):
        return message
    return dict(message) | {"content": [_with_path(part, root) for part in message["content"]]}


def _with_path(part: Any, root: Path) -> Any:
    if not isinstance(part, Mapping):
        return part
    if part.get("type") in ("image", "image_url"):
        given = [key for key in IMAGE_KEYS if key != "base64" and part.get(key) is not None]
        return dict(part) | {key: _absolute(part[key], root) for key in given}
    if part.get("type") == "video":
        given = [key for key in VIDEO_KEYS if part.get(key) is not None]
        return dict(part) | {key: _absolute_video(part[key], root) for key in given}
    return part


def _absolute_video(source: Any, root: Path) -> Any:
    if isinstance(source, list):
        return [_absolute(frame, root) for frame in source]
    return _absolute(source, root)


def _absolute(image: Any, root: Path) -> Any:
    """`image` with its path, if it is one, made absolute."""
    if isinstance(image, str):
        if _BASE64.fullmatch(image):
            return f"data:image;base64,{image}"
        absolute = image.startswith(("data:", HOME)) or "://" in image
        return image if absolute else str(root / image)
    if isinstance(image, Mapping) and image.get("bytes") is None:
        named = [key for key in ("path", "url") if isinstance(image.get(key), str)]
        return dict(image) | {key: _absolute(image[key], root) for key in named}
    return image
