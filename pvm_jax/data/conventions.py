"""What a stored record means by the convention that it follows (LLaVA, ShareGPT, TRL, ms-swift, …):
its columns -> chat messages with their pictures in them.

docs/data.md has the table of the conventions that are read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pvm_jax.data.messages import MARKS, ChatMessages
from pvm_jax.data.placement import placed

TURNS = ("messages", "conversations", "prompt")
"""The columns of which a record has one: what is said."""

COLUMNS = (
    *TURNS,
    "completion",
    "system",
    "images",
    "image",
    "videos",
    "video",
    "tools",
    "chat_template_kwargs",
)
"""The columns that make up a conversation; the others are the record's own, as a solution."""

_REFUSED = ("audio", "audios", "chosen", "rejected", "rejected_response", "rejected_messages")
_REFUSED += ("history", "functions", "documents", "loss_mask")
"""Columns that say what is to be learned in ways that are not read."""

_ELSEWHERE = {
    "system_prompt": "'system'",
    "system_message": "'system'",
    "enable_thinking": "'chat_template_kwargs'",
}
"""Columns that have their place in another."""

_LABEL = "label"
"""Says of a completion whether it is a good one."""

_OF_PICTURES = re.compile(r"image|img|picture|photo|video|media", re.IGNORECASE)
_PICTURE_FILE = re.compile(
    r"data:(?:image|video)/.*|.*\.(?:png|jpe?g|webp|gif|bmp|tiff?|mp4|webm|avi|mov|mkv)",
    re.IGNORECASE | re.DOTALL,
)

_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "observation": "tool",
}
"""Who speaks in ShareGPT's records, where it is not called as the role."""

_NEAR = 0.86


def record_messages(record: Any, root: Path) -> ChatMessages:
    """The messages of a record with each picture in its part, relative paths starting from `root`.

    Raises:
        ValueError: for what is no record of messages, a column that would have to be read and is
            not, and pictures that have no place.
    """
    if not isinstance(record, Mapping):
        raise ValueError('not an object {"messages": [{"role": …, "content": …}, …]}')
    record = {name: value for name, value in record.items() if value is not None}
    _check_names(record)
    messages = placed(_turns(record), record, root)
    _check_pictures(record, messages)
    return ChatMessages(messages, _variables(record))


def concerns(name: str) -> bool:
    """Whether a column makes up the conversation, or might be meant to."""
    known = (*COLUMNS, *_REFUSED, *_ELSEWHERE, *MARKS, _LABEL)
    return name in known or _near(name) is not None or _OF_PICTURES.search(name) is not None


def _near(name: str) -> str | None:
    found = get_close_matches(name.lower(), COLUMNS, 1, _NEAR)
    return found[0] if found and name not in COLUMNS else None


def _check_names(record: Mapping[str, Any]) -> None:
    for name, value in record.items():
        if value in ("", [], {}) or name in COLUMNS:
            continue
        if near := _near(name):
            raise ValueError(f"nothing reads {name!r}: did you mean {near!r}?")
        if name in _REFUSED:
            raise ValueError(f"{name!r} is not read here: give what is to be learned as messages")
        if place := _ELSEWHERE.get(name):
            raise ValueError(f"nothing reads {name!r}: it belongs in {place}")
        if name == _LABEL and "completion" in record and value is not True:
            raise ValueError(f"'label' marks the completion as {value!r}: leave bad ones out")
        if name in MARKS and value not in (True, 1):
            raise ValueError(
                f"{name!r} marks a turn and not a record: leave the record out, or put it in its"
                " turns"
            )


def _check_pictures(record: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for a record that shows nothing, and has pictures in a column that is not
    read."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if any(isinstance(part, Mapping) and part.get("type") != "text" for part in parts):
        return
    for name, value in record.items():
        if name not in COLUMNS and _OF_PICTURES.search(name) and _is_picture(value):
            raise ValueError(
                f"nothing reads {name!r}, which seems to hold pictures, and the record shows none:"
                " call it 'images' (or 'videos')"
            )


def _is_picture(value: Any) -> bool:
    """Whether it is a picture or a video, or a list that begins with one."""
    if isinstance(value, list):
        return bool(value) and _is_picture(value[0])
    if isinstance(value, Mapping):
        return any(map(_is_picture, (value.get("bytes"), value.get("path"), value.get("url"))))
    return isinstance(value, bytes) or (
        isinstance(value, str) and _PICTURE_FILE.fullmatch(value) is not None
    )


def _turns(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What is said, as messages of role and content."""
    given = [name for name in TURNS if name in record]
    if not given:
        raise ValueError(
            'not an object {"messages": [{"role": …, "content": …}, …]}: it has none of'
            f" {', '.join(TURNS)}"
        )
    if len(given) > 1:
        raise ValueError(f"both {given[0]!r} and {given[1]!r} say what is said: leave one out")
    turns = _messages(record, given[0])
    if "completion" in record:
        if given[0] != "prompt":
            raise ValueError(f"'completion' belongs to 'prompt', not to {given[0]!r}")
        # As TRL has it, the prompt's own answers are not learned.
        turns = [
            dict(turn) | {"loss": False}
            if turn.get("role") == "assistant" and not any(mark in turn for mark in MARKS)
            else turn
            for turn in turns
        ]
        turns += _messages(record, "completion")
    system = record.get("system", "")
    if not isinstance(system, str):
        raise ValueError(f"'system' must be a text, got {type(system).__name__}")
    if system:
        if turns and turns[0].get("role") == "system":
            raise ValueError("both 'system' and the first message are the system's: leave one out")
        turns = [{"role": "system", "content": system}, *turns]
    return turns


def _messages(record: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The messages in column `name`, ShareGPT's as the others."""
    messages = _unpacked(record[name], name)
    if not isinstance(messages, list):
        raise ValueError(f"{name} must be a list of {{'role': …, 'content': …}}")
    messages = [_unpacked(message, name) for message in messages]
    if not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"{name} must be a list of {{'role': …, 'content': …}}")
    return [_chat_message(message) for message in messages]


def _chat_message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message.get("role") is not None or message.get("from") is None:
        return message
    message = {key: value for key, value in message.items() if value is not None}
    speaker, said = message.pop("from"), message.pop("value", None)
    if not isinstance(speaker, str):
        raise ValueError(f"'from' must be a text, as human or gpt, got {speaker!r:.80}")
    if said is not None and "content" in message:
        raise ValueError("a message has both 'value' and 'content': leave one of them out")
    return {"role": _SPEAKERS.get(speaker, speaker), "content": said} | message


def _variables(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template gets besides the messages."""
    variables = _unpacked(record.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    if not isinstance(variables, Mapping):
        raise ValueError("'chat_template_kwargs' must be an object of names and values")
    tools = _unpacked(record.get("tools") or [], "tools") or []
    if not isinstance(tools, list):
        raise ValueError("'tools' must be a list of functions' JSON schemas")
    tools = [_unpacked(tool, "tools") for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("'tools' must be a list of functions' JSON schemas")
    if not tools:
        return dict(variables)
    if "tools" in variables:
        raise ValueError("'chat_template_kwargs' has tools, and so has the record: leave one out")
    return {"tools": tools, **variables}


def _unpacked(value: Any, name: str) -> Any:
    """`value`; what tables hold as a text of JSON, since it differs from row to row, as it was."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(
            f"{name}: a text here must be JSON, of messages or of tools ({error}): give what is"
            " said as a list of {'role': …, 'content': …}"
        ) from error
