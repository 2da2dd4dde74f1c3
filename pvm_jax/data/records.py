"""What a stored record means: its columns -> chat messages with their pictures in them.

docs/data.md has the table of the conventions that are read.
"""

import json
from collections.abc import Mapping
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

_REFUSED = ("audio", "audios", "chosen", "rejected", "rejected_response", "history", "functions")
"""Columns that say what is to be learned in ways that are not read."""

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
    return ChatMessages(placed(_turns(record), record, root), _variables(record))


def concerns(name: str) -> bool:
    """Whether a column makes up the conversation, or might be meant to."""
    return name in (*COLUMNS, *_REFUSED, *MARKS) or _near(name) is not None


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
        if name in MARKS and value not in (True, 1):
            raise ValueError(
                f"{name!r} marks a turn and not a record: leave the record out, or put it in its"
                " turns"
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
