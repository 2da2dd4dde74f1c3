"""JSON files that others wrote, read as what they should be: every error names file and key."""

import json
import math
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn, Self

_REQUIRED = object()


class JsonObject(Mapping[str, Any]):
    """A JSON object that knows where it stands. Its methods read one key as what it should be.

    A key that is absent gives `default`; without a default it is an error. So is null, except
    where None is the default.

    Attributes:
        file: its name in errors.
        parent: the keys above this object, each with a dot behind it.
    """

    def __init__(self, values: Mapping[str, Any], file: str, parent: str = ""):
        self._values, self.file, self.parent = values, file, parent

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def refuse(self, key: str, reason: str) -> NoReturn:
        """Raises the ValueError that names file and key."""
        raise ValueError(f"{self.file}: {self.parent}{key} {reason}")

    def object(self, key: str, default: Any = _REQUIRED) -> Self:
        """Raises ValueError for anything but an object."""
        value = self._read(key, default, lambda value: isinstance(value, Mapping), "an object")
        return value if value is default else type(self)(value, self.file, f"{self.parent}{key}.")

    def objects(self, key: str) -> list[Self]:
        """Raises ValueError for anything but a list of objects."""

        def fits(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)

        found = self._read(key, _REQUIRED, fits, "a list of objects")
        return [
            type(self)(value, self.file, f"{self.parent}{key}[{place}].")
            for place, value in enumerate(found)
        ]

    def integer(self, key: str, default: Any = _REQUIRED, *, least: int = 0) -> int:
        """Raises ValueError for anything but a whole number of at least `least`, in 32 bits."""
        what = f"a whole number of at least {least}"
        return self._read(key, default, lambda value: _is_integer(value, least), what)

    def integers(
        self, key: str, default: Any = _REQUIRED, *, least: int = 0, bits: int = 32
    ) -> tuple[int, ...]:
        """Raises ValueError for anything but a list of whole numbers of at least `least`, in
        `bits`."""

        def fits(value: Any) -> bool:
            return isinstance(value, list | tuple) and all(
                _is_integer(x, least, bits) for x in value
            )

        what = f"a list of whole numbers of at least {least}"
        value = self._read(key, default, fits, what)
        return value if value is default else tuple(value)

    def number(self, key: str, default: Any = _REQUIRED, *, above: float = 0.0) -> float:
        """Raises ValueError for anything but a finite number greater than `above`."""
        value = self._read(
            key,
            default,
            lambda value: is_number(value) and value > above,
            f"a finite number above {above:g}",
        )
        return value if value is default else float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """Raises ValueError for anything but true or false."""
        return self._read(key, default, lambda value: isinstance(value, bool), "true or false")

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """Raises ValueError for anything but a string."""
        return self._read(key, default, lambda value: isinstance(value, str), "a text")

    def _read(self, key: str, default: Any, fits: Any, what: str) -> Any:
        value = self._values.get(key, default)
        if value is _REQUIRED:
            self.refuse(key, "is missing")
        if value is not default and not fits(value):
            self.refuse(key, f"must be {what}, got {json.dumps(value, default=repr)[:80]}")
        return value


def read_json(file: Path) -> JsonObject:
    """The object in `file`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no regular file, not JSON, or JSON but no object.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist")
    if not file.is_file():
        raise ValueError(f"{file} is no regular file")
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, got {json.dumps(values)[:80]}")
    return JsonObject(values, str(file))


def read_json_if_any(file: Path) -> JsonObject:
    """The object in `file`; an empty one where there is no such file. Raises ValueError as
    `read_json`."""
    return read_json(file) if file.exists() else JsonObject({}, str(file))


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`, for `json.loads(…, object_pairs_hook=once)`. Raises ValueError if a
    key stands twice, of which JSON's readers take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, NumPy's among them, and not true or false."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def _is_integer(value: Any, least: int, bits: int = 32) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and least <= value < 2 ** (bits - 1)
