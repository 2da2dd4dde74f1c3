"""What a stored record means: its columns -> chat messages with their pictures in them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pvm_jax.data.messages import Messages

COLUMNS = ("messages", "images", "image")
"""The columns of a record that make up its conversation."""


def record_messages(record: Any, root: Path) -> Messages:
    """The messages of a record with each picture in its part, relative paths starting from `root`.

    An {"type": "image"} part without a picture of its own shows the next one of the record's
    `images` (or `image`) column. Where no message has image parts, the pictures stand at the
    beginning of the first user turn, as TRL has it.

    Raises:
        ValueError: if it is not a record of messages, or image parts and pictures differ in number.
    """
    if not isinstance(record, Mapping) or "messages" not in record:
        raise ValueError('not an object {"messages": [{"role": …, "content": …}, …]}')
    messages = record["messages"]
    if isinstance(
        messages, str
    ):  # tables whose contents are now strings, now lists, hold them as JSON
        messages = json.loads(messages)
    if not isinstance(messages, list) or not all(
        isinstance(message, Mapping) for message in messages
    ):
        raise ValueError("messages must be a list of {'role': …, 'content': …}")
    pictures = _pictures(record)
    parts = [part for message in messages for part in _content_parts(message)]
    if pictures and not any(part.get("type") == "image" for part in parts):
        messages = _with_leading_images(messages, len(pictures))
        parts = [part for message in messages for part in _content_parts(message)]
    shown = sum(_is_placeholder(part) for part in parts)
    if shown != len(pictures):
        raise ValueError(
            f"the messages have {shown} image parts for the {len(pictures)} pictures of the record"
        )
    supply = iter(pictures)
    return [_with_pictures(message, supply, root) for message in messages]


def _pictures(record: Mapping[str, Any]) -> list[Any]:
    """The pictures beside the messages, in order."""
    images, image = record.get("images"), record.get("image")
    if images and image is not None:
        raise ValueError(
            "the record has both an 'images' and an 'image' column: leave one of them out"
        )
    if images is not None and not isinstance(images, list):
        raise ValueError(f"'images' must be a list, got {type(images).__name__}")
    return list(images or ([] if image is None else [image]))


def _content_parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return (
        [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    )


_IMAGE_KEYS = ("image", "url", "path")


def _is_placeholder(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image" and all(part.get(key) is None for key in _IMAGE_KEYS)


def _with_leading_images(messages: list[Any], count: int) -> list[Any]:
    """Image parts before what the first user turn says."""
    first = next(
        (number for number, message in enumerate(messages) if message.get("role") == "user"), None
    )
    if first is None:
        raise ValueError(f"no turn shows the record's {count} pictures: there is no user turn")
    content = messages[first].get("content")
    text = (
        content
        if isinstance(content, list)
        else [{"type": "text", "text": content}]
        if content
        else []
    )
    shown = dict(messages[first]) | {"content": [{"type": "image"} for _ in range(count)] + text}
    return [*messages[:first], shown, *messages[first + 1 :]]


def _with_pictures(
    message: Mapping[str, Any], supply: Iterator[Any], root: Path
) -> Mapping[str, Any]:
    if not isinstance(message.get("content"), list):
        return message
    return dict(message) | {
        "content": [_with_picture(part, supply, root) for part in message["content"]]
    }


def _with_picture(part: Any, supply: Iterator[Any], root: Path) -> Any:
    if not isinstance(part, Mapping):
        return part
    if _is_placeholder(part):
        return dict(part) | {"image": _absolute(next(supply), root)}
    if part.get("type") == "image":
        return dict(part) | {
            key: _absolute(part[key], root) for key in _IMAGE_KEYS if part.get(key) is not None
        }
    if isinstance(part.get("video"), list):
        return dict(part) | {"video": [_absolute(frame, root) for frame in part["video"]]}
    return part


def _absolute(image: Any, root: Path) -> Any:
    """`image` with its path, if it is one, made absolute."""
    if isinstance(image, str):
        return image if image.startswith("data:") or "://" in image else str(root / image)
    if (
        isinstance(image, Mapping)
        and image.get("bytes") is None
        and isinstance(image.get("path"), str)
    ):
        return dict(image) | {"path": _absolute(image["path"], root)}
    return image
