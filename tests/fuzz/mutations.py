"""Seeded damage to what users give, and what may come of it: it is taken, or refused in one clear
line, soon."""

import builtins
import copy
import json
import re
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

SECONDS = 10.0
"""A case that takes longer hangs; most take milliseconds."""

VALUES = (
    *(None, "", "x", "1", "null", "[]", '{"a": 1}', "\ud800", "a\0b", "a\nb", "~"),
    *("é漢🙂", "a" * 300),
    *(0, 1, -1, 2, 0.5, 1e-6, 1e400, -1e400, float("nan"), 10**30, 2**31, True, False),
    *([], {}, [1], ["x"], [None], [[]], [{}], {"a": 1}, {"": None}),
)  # fmt: skip
"""What may stand where something else should."""

_RAISED = [name for name in vars(builtins) if name.endswith(("Error", "Exception"))]
_FOREIGN = re.compile(rf"\b(?:{'|'.join(_RAISED)})\b|Traceback| object at 0x")
"""The name of one of Python's exceptions, or of a thing in memory: nothing that a user wrote."""


class Outcome(NamedTuple):
    """What came of a case: what was made of it, or why it was refused."""

    made: Any = None
    refused: str | None = None


def outcome(make: Callable[[], Any], *, names: Sequence[str]) -> Outcome:
    """What `make` returns, or the line with which it refuses.

    Raises:
        AssertionError: if the line is none, or holds none of `names` (files, keys).
        Whatever else `make` raises, and TimeoutError if it takes too long.
    """
    try:
        with _time_limit():
            return Outcome(made=make())
    except TimeoutError:  # which is an OSError
        raise
    except (ValueError, OSError) as error:
        line = str(error)
    assert line.strip(), "nothing is said"
    assert not (found := _FOREIGN.search(line)), f"{found} is not a user's word: {line}"
    assert any(name in line for name in names), f"{line!r} names nothing of {names}"
    return Outcome(refused=line)


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"a case takes more than {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_of(options: Sequence[Any], rng: np.random.Generator) -> Any:
    """One of `options`, a copy."""
    return copy.deepcopy(options[int(rng.integers(len(options)))])


def mutated(
    value: Any, rng: np.random.Generator, values: Sequence[Any], keys: Sequence[str]
) -> Any:
    """A copy of a value of JSON with one to three changes: a part replaced, left out, put in twice,
    or under another key."""
    value = copy.deepcopy(value)
    for _ in range(1 + int(rng.integers(6) == 0) + int(rng.integers(6) == 0)):
        if inside := list(_inside(value)):
            _change(*inside[int(rng.integers(len(inside)))], rng, values, keys)
    return value


def _inside(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (list or object, index or key in it)."""
    if isinstance(value, dict | list):
        for place in value if isinstance(value, dict) else range(len(value)):
            yield value, place
            yield from _inside(value[place])


def _change(
    holder: Any, place: Any, rng: np.random.Generator, values: Sequence[Any], keys: Sequence[str]
) -> None:
    kind = rng.integers(10)
    if kind < 5:
        holder[place] = one_of(values, rng)
    elif kind < 7:
        del holder[place]
    elif isinstance(holder, list):
        holder.insert(place, one_of([holder[place], *values], rng))
    elif kind < 9:
        holder[_misspelt(place, rng) if kind == 7 else one_of(keys, rng)] = holder.pop(place)
    else:
        holder[one_of(keys, rng)] = one_of([holder[place], *values], rng)


def _misspelt(word: str, rng: np.random.Generator) -> str:
    at = int(rng.integers(len(word) + 1))
    return one_of([word[:at] + word[at + 1 :], f"{word[:at]}e{word[at:]}", word.title()], rng)


def shuffled(value: Any, rng: np.random.Generator, fixed: Collection[str] = ()) -> Any:
    """The same value of JSON, its keys in another order, but for what is under `fixed` keys."""
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {k: value[k] if k in fixed else shuffled(value[k], rng, fixed) for k in keys}
    return [shuffled(item, rng, fixed) for item in value] if isinstance(value, list) else value


def with_nulls(
    value: Any, rng: np.random.Generator, keys: Sequence[str], *, but: Sequence[str] = ()
) -> Any:
    """The same, with keys that hold null in some of its objects, but for what stands under one of
    `but`."""
    if isinstance(value, dict):
        more = {one_of(keys, rng): None} if rng.integers(2) else {}
        return more | {
            key: item if key in but else with_nulls(item, rng, keys, but=but)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [with_nulls(item, rng, keys, but=but) for item in value]
    return value


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """`content` cut off, with bytes changed, put in, taken out or written twice, or something
    else."""
    start, end = sorted(rng.integers(0, len(content) + 1, 2).tolist())
    return [
        lambda: content[:start],
        lambda: content[:start] + rng.bytes(1) + content[start + 1 :],
        lambda: content[:start] + rng.bytes(8) + content[start:],
        lambda: content[:start] + content[end:],
        lambda: content[:end] + content[start:],
        lambda: content[:start] + bytes(end - start) + content[end:],
        lambda: one_of([b"", b"\n", b"\0", b"null", b"[]", b"{}", b"[" * 5000, b'"'], rng),
        lambda: content.decode(errors="replace").encode("utf-16"),
        lambda: content + one_of([b"\0", b"}", b"\n\n", b"x"], rng),
    ][int(rng.integers(9))]()


def shown(case: Any) -> str:
    """A case, to be read in a failure."""
    return case.decode(errors="replace") if isinstance(case, bytes) else json.dumps(case)
