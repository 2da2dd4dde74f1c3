"""Stored conversations, each read when it is asked for: what all formats share."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from pvm_jax.data.conventions import COLUMNS, record_messages
from pvm_jax.data.messages import ChatMessages
from pvm_jax.files.bucket import BucketError
from pvm_jax.files.json_file import JsonObject


class Conversations(Sequence[ChatMessages]):
    """The conversations at a path, each read when it is asked for; safe to read from several
    threads.

    Attributes:
        path: what was opened.
        sizes: (tokens, patches) of every conversation, [N, 2] int32, where the data bring them
            (None: to be measured).
        measured_by: `Processor.fingerprint` of what measured them.
        videos: whether the data say that one of them shows a video.
    """

    path: Path
    sizes: np.ndarray | None = None
    measured_by: str | None = None
    videos: bool = False

    @abstractmethod
    def where(self, index: int) -> str:
        """File and place in it of conversation `index`, as `train.jsonl:17` (lines count from 1,
        rows and records from 0)."""

    @abstractmethod
    def _record(self, index: int) -> Any:
        """The record of conversation `index` as it is stored. Raises ValueError if it cannot be
        read."""

    @overload
    def __getitem__(self, index: int) -> ChatMessages: ...
    @overload
    def __getitem__(self, index: slice) -> list[ChatMessages]: ...
    def __getitem__(self, index: int | slice) -> ChatMessages | list[ChatMessages]:
        """The messages of conversation `index` (from 0), each picture in its part, paths made
        absolute.

        Raises:
            ValueError: naming the record, if it is not one of messages, or has not as many pictures
                as image parts.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        with self.naming(index):
            return record_messages(self._record(index), self._root(index))

    def columns(self, index: int) -> dict[str, Any]:
        """What the record of conversation `index` holds besides messages and pictures, as a
        solution (of tables: where they were opened with `every_column`)."""
        with self.naming(index):
            return {
                name: value for name, value in self._record(index).items() if name not in COLUMNS
            }

    @contextmanager
    def naming(self, index: int) -> Iterator[None]:
        """Turns what conversation `index` is refused for into a ValueError that names its place,
        once; what a bucket does not give stays a BucketError, what takes another package an
        ImportError."""
        where = f"{self.where(index)}: "
        try:
            yield
        except BucketError as error:  # not the record's fault
            raise BucketError(f"{where}{str(error).removeprefix(where)}") from error
        except ImportError as error:  # nor is a package that is not installed
            raise ImportError(f"{where}{str(error).removeprefix(where)}") from error
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}{str(error).removeprefix(where)}") from error
        except RecursionError as error:
            raise ValueError(f"{where}lists and objects are nested too deeply") from error
        except Exception as error:  # no check foresees all that a record can hold
            raise ValueError(f"{where}{type(error).__name__}: {error}") from error

    def _root(self, index: int) -> Path:
        """What relative image paths of conversation `index` start from."""
        return self._folder

    @cached_property
    def _folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


class Joined(Conversations):
    """Several files or directories, one after the other."""

    def __init__(self, path: Path, members: Sequence[Conversations]):
        """`path` is what they are called together."""
        self.path, self._members = path, members
        self._ends = np.cumsum([len(member) for member in members])
        self.videos = any(member.videos for member in members)
        measured = {member.measured_by for member in members}
        sizes = [member.sizes for member in members if member.sizes is not None]
        if len(measured) == 1 and len(sizes) == len(members):
            self.measured_by, self.sizes = measured.pop(), np.concatenate(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, index: int) -> str:
        member, place = self._place_of(index)
        return member.where(place)

    def _record(self, index: int) -> Any:
        member, place = self._place_of(index)
        return member._record(place)

    def _root(self, index: int) -> Path:
        member, place = self._place_of(index)
        return member._root(place)

    def _place_of(self, index: int) -> tuple[Conversations, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._members[number], index - (int(self._ends[number - 1]) if number else 0)


class Parts(Conversations):
    """Records that lie in parts of several, each part in a file; `_ends` are the numbers of records
    up to each part's end."""

    _ends: np.ndarray
    _files: Sequence[Path]
    _file_of_part: np.ndarray
    _first_of_file: np.ndarray

    def set_parts(self, files: Sequence[Path], lengths: Sequence[Sequence[int]]) -> None:
        """Args: lengths: records of each part of each file. Raises ValueError if there is no
        record."""
        self._files = files
        self._file_of_part = np.repeat(np.arange(len(files)), [len(parts) for parts in lengths])
        self._ends = np.cumsum([length for parts in lengths for length in parts], dtype=np.int64)
        self._first_of_file = np.cumsum([0, *[sum(parts) for parts in lengths]])
        if not len(self):
            raise ValueError(f"{self.path} holds no conversation")

    def files_of(self, index: JsonObject, parts: str, name: str) -> list[Path]:
        """The files that an index names: under `name` of each object of its list `parts`. Raises
        ValueError if one is missing, or none of this directory."""
        entries = index.objects(parts)
        for entry in entries:
            if Path(entry.text(name)).name != entry.text(name):
                entry.refuse(name, f"must be a file of this directory, got {entry[name]!r:.80}")
        files = [self.path / entry.text(name) for entry in entries]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise ValueError(f"{index.file} names files that are missing: {', '.join(missing)}")
        return files

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def where(self, index: int) -> str:
        file = self._file_of_part[self.place_of(index)[0]]
        return f"{self._files[file]}:{index - self._first_of_file[file]}"

    def place_of(self, index: int) -> tuple[int, int]:
        """Part of record `index`, and its place there."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)


def plain_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns as JSON holds them: a date as its text; without those that hold bytes."""

    def text(value: Any) -> str:
        if isinstance(value, bytes):
            raise TypeError
        return str(value)

    kept = {}
    for name, value in columns.items():
        with suppress(TypeError):
            kept[name] = json.loads(json.dumps(value, default=text))
    return kept
