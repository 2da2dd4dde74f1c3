"""A checkpoint's chat template: the text that it makes of a conversation, what it reads for that,
and which of the text is learned."""

import inspect
import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from pvm_jax.data.messages import MARKS, Conversation

Segment = tuple[str, bool]
"""A stretch of text, and whether it is learned."""

NEAR = 6
"""Messages before an answer that are rendered anew to find the place of the next one, so that a
long conversation takes time by its length and not by the square of it."""

_ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
_LINKS = {"tool": ("name", "tool_call_id")}
"""Keys that say which call a turn answers; its place says so too, and a template may skip them."""

_ROLE_TESTS = re.compile(r"""\brole\b['"\]]*\s*(?:[=!]=|in)\s*[(\[]?((?:\s*['"]\w+['"],?)+)""")

_ONE_MESSAGE = re.compile(r"\b(?:for|set)\s+(\w+)\s*(?:=|in\b)[^%]*?messages\b")
_NOTHING = ("", [], {})

_PROBE = "Zq7Probe"
"""A text that no template writes of itself."""


class ChatTemplate:
    """A Jinja template that writes conversations as text.

    Attributes:
        source: its text.
        structure: the tokens that it alone may write.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, structure: Sequence[str]):
        """Raises ValueError if `source` is not Jinja."""
        self.source, self.structure, self._tokenizer = source, tuple(structure), tokenizer
        try:
            tokens = list(jinja2.Environment().lex(source))
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error
        self._variables = {value for _, kind, value in tokens if kind == "name"}
        self._keys = _keys_read(source)
        self._roles = {*_ROLES, *re.findall(r"\w+", " ".join(_ROLE_TESTS.findall(source)))}
        self._taken = {"messages", "add_generation_prompt"} | set(
            inspect.signature(tokenizer.apply_chat_template).parameters
        ) - {"tools", "documents"}
        self._shown: set[tuple[Any, ...]] = set()

    def render(self, conversation: Conversation, *, add_generation_prompt: bool) -> str:
        """The text of the whole conversation.

        Raises:
            ValueError: where the template refuses it or leaves a part of it out (a turn, a key of a
                message, tools), naming that.
        """
        for name in conversation.variables:
            if name in self._taken or name not in self._variables:
                raise ValueError(
                    f"the chat template reads no {name!r} from the record: leave it out, or take"
                    " a checkpoint whose template does"
                )
        for number, message in enumerate(conversation.messages):
            self._check_names(conversation, number, message)
        text = self._render(conversation, conversation.messages, add_generation_prompt)
        for number, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                self._check_shown(conversation, number, message)
        return text

    def segments(self, conversation: Conversation, *, add_generation_prompt: bool) -> list[Segment]:
        """The text of the whole conversation, cut at both ends of each assistant turn: what stands
        before a turn, then the turn, and at last what stands after all of them.

        A turn begins where the template, given what came before, would prompt for it, and ends in
        its last token.

        Raises:
            ValueError: as `render`, and where a turn has no such place.
        """
        messages = conversation.messages
        whole = self.render(conversation, add_generation_prompt=add_generation_prompt)
        segments, end, last = [], 0, 0
        for turn in [n for n, message in enumerate(messages) if message["role"] == "assistant"]:
            if turn == 0:
                raise ValueError(
                    "messages[0]: a conversation to learn from cannot begin with the assistant"
                )
            prompt, answer = self._turn(conversation, last, turn, whole, end)
            segments += [(prompt, False), (answer, turn not in conversation.unlearned)]
            end, last = end + len(prompt) + len(answer), turn
        return [*segments, (whole[end:], False)]

    def _turn(
        self, conversation: Conversation, last: int, turn: int, whole: str, end: int
    ) -> tuple[str, str]:
        """What `whole` holds from `end`, where turn `last` ends, up to the answer `turn`; and that.

        Found among the messages near it, if these give what stands in `whole`; else among all
        before it.
        """
        first = min(_first_question(conversation.messages) + 1, last)
        for start in sorted({max(first, last - NEAR), first}, reverse=True):
            known = conversation.messages[:first] + conversation.messages[start:turn]
            since = known[: len(known) - (turn - 1 - last)] if end else []
            try:
                found = self._border(conversation, since, known, conversation.messages[turn])
            except ValueError:
                if start == first:
                    raise
                continue
            if found and whole.startswith("".join(found), end):
                return found
        raise ValueError(
            f"messages[{turn}]: what is learned has no exact place, since the chat template writes"
            " no prompt for an assistant turn, no token at its end, or a turn differently once"
            " others follow: use another template, or one assistant turn a conversation"
        )

    def _border(
        self, conversation: Conversation, since: list[Any], known: list[Any], answer: Any
    ) -> tuple[str, str] | None:
        """What the template writes from the end of `since` on: up to the answer, and the answer."""
        before = self._render(conversation, known, False)
        prompt = self._render(conversation, known, True)
        through = self._render(conversation, [*known, answer], False).rstrip()
        start = self._render(conversation, since, False).rstrip() if since else ""
        grows = all(b.startswith(a) for a, b in pairwise((start, before, prompt, through)))
        if not grows or before == prompt or not through.endswith(self.structure):
            return None
        return prompt[len(start) :], through[len(prompt) :]

    def _render(self, conversation: Conversation, messages: list[Any], prompt: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.source,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **conversation.variables,
                )
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template refuses the first {len(messages)} messages: {error}"
            ) from error

    def _check_names(
        self, conversation: Conversation, number: int, message: dict[str, Any]
    ) -> None:
        """Raises ValueError for a role or a key that means nothing to the template."""
        role = message["role"]
        if role not in self._roles:
            near = _OTHER_NAMES.get(role.lower()) or _nearest(role, self._roles)
            raise ValueError(
                f"messages[{number}]: unknown role {role!r}: "
                + (f"did you mean {near!r}?" if near else f"there are {', '.join(_ROLES)}")
            )
        for key in set(_own_keys(message)) - self._keys:
            changed = list(conversation.messages)
            changed[number] = {name: value for name, value in message.items() if name != key}
            texts = [self._render(conversation, m, False) for m in (changed, conversation.messages)]
            if texts[0] == texts[1]:
                raise _unread(number, key)

    def _check_shown(
        self, conversation: Conversation, number: int, message: dict[str, Any]
    ) -> None:
        """Raises ValueError if the template leaves the message or one of its keys out: with a probe
        in its place the text must be another. One look for all messages of a kind."""
        before = conversation.messages[number - 1]["role"] if number else None
        for key in ["content", *_own_keys(message)]:
            kind = (message["role"], before, key, type(message[key]))
            if kind in self._shown or not (probe := _probed(message[key])):
                continue
            changed = list(conversation.messages)
            changed[number] = message | {key: probe}
            if _PROBE not in self._render(conversation, changed, False):
                if key != "content":
                    raise _unread(number, key)
                raise ValueError(
                    f"messages[{number}]: the chat template leaves out this turn of role"
                    f" {message['role']!r}: say it in a turn that it writes"
                )
            self._shown.add(kind)


def _keys_read(source: str) -> set[str]:
    """The keys of a message that a template names: as message.key, message['key'],
    message.get('key') or 'key' in message."""
    names = "|".join({"messages", *_ONE_MESSAGE.findall(source)})
    index = r"(?:\[[^\]'\"]*\])?"
    read = rf"""\b(?:{names}){index}(?:\.get\(|\.|\[)\s*['"]?(\w+)"""
    asked = rf"""['"](\w+)['"]\s+(?:not\s+)?in\s+(?:{names})\b"""
    return {*re.findall(read, source), *re.findall(asked, source)}


def _own_keys(message: dict[str, Any]) -> list[str]:
    """The keys whose values the template alone can read."""
    skipped = ("role", "content", *_LINKS.get(message["role"], ()))
    return [key for key, value in message.items() if key not in skipped and value not in _NOTHING]


def _unread(number: int, key: str) -> ValueError:
    near = _nearest(key, (*MARKS, "tool_calls", "reasoning_content"))
    return ValueError(
        f"messages[{number}]: nothing reads the key {key!r}, the chat template neither: "
        + (f"did you mean {near!r}?" if near else "leave it out")
    )


def _has_text(part: Any) -> bool:
    return isinstance(part, dict) and bool(part.get("text"))


def _probed(value: Any) -> Any:
    """`value` with the probe in place of its text; None where it has none."""
    if isinstance(value, str):
        return _PROBE if value else None
    if isinstance(value, list) and any(map(_has_text, value)):
        return [part | {"text": _PROBE} if _has_text(part) else part for part in value]
    return None


def _first_question(messages: Sequence[dict[str, Any]]) -> int:
    """The place of the first user turn; 0 where there is none."""
    return next((n for n, message in enumerate(messages) if message["role"] == "user"), 0)


def _nearest(name: str, names: Collection[str]) -> str | None:
    return next(iter(get_close_matches(name.lower(), names, 1)), None)


def check_border(asked: str, content: Any) -> None:
    """Raises ValueError for an answer that begins with white space, which the tokenizer joins to
    the end of what asks for it."""
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    answer = next((text for text in texts if text), "")
    if answer[:1].isspace():
        raise ValueError(
            "the tokenizer merges characters across the border of an assistant turn: the prompt's"
            f" end {asked[-1:]!r} and the answer's beginning {answer[:1]!r} become one token, near"
            f" {answer[:40]!r}: strip white space from the turn's beginning"
        )
