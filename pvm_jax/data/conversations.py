"""Conversations on disk, read at random: JSONL, Parquet, a directory saved by `datasets`, or shards
of `convert.dataset`.

Every format holds records {"messages": [...], "images": [...]}: chat messages as TRL and Hugging
Face have them, and the pictures that their {"type": "image"} parts show, in order. docs/data.md has
an example of each.
"""

import json
import mmap
import os
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from glob import has_magic
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import msgpack
import numpy as np

from pvm_jax.data.messages import Messages
from pvm_jax.files.paths import local_path

SHARDS_INDEX = "dataset.json"
"""The file that makes a directory one of `convert.dataset`'s; written last."""

SHARDS_SIZES = "sizes.npy"
ROW_GROUP_CACHE_BYTES = 512 * 2**20
_COLUMNS = ("messages", "images", "image")


class Conversations(Sequence[Messages]):
    """The conversations at a path, each read when it is asked for; safe to read from several
    threads.

    Attributes:
        path: what was opened.
        sizes: (tokens, patches) of every conversation, [N, 2] int32, where the data bring them
            (None: to be measured).
        measured_by: `Processor.fingerprint` of what measured them.
    """

    path: Path
    sizes: np.ndarray | None = None
    measured_by: str | None = None

    @abstractmethod
    def where(self, index: int) -> str:
        """File and place in it of conversation `index`, as `train.jsonl:17` (lines count from 1,
        rows and records from 0)."""

    @abstractmethod
    def _record(self, index: int) -> Any:
        """The record of conversation `index` as it is stored. Raises ValueError if it cannot be
        read."""

    @overload
    def __getitem__(self, index: int) -> Messages: ...
    @overload
    def __getitem__(self, index: slice) -> list[Messages]: ...
    def __getitem__(self, index: int | slice) -> Messages | list[Messages]:
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
            return record_messages(self._record(index), self._root)

    def columns(self, index: int) -> dict[str, Any]:
        """What the record of conversation `index` holds besides messages and pictures, as a
        solution (of tables: where they were opened with `every_column`)."""
        with self.naming(index):
            return {
                name: value for name, value in self._record(index).items() if name not in _COLUMNS
            }

    @contextmanager
    def naming(self, index: int) -> Iterator[None]:
        """Turns what conversation `index` is refused for into a ValueError that names its place."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.where(index)}: {error}") from error
        except Exception as error:  # no check foresees all that a record can hold
            raise ValueError(f"{self.where(index)}: {type(error).__name__}: {error}") from error

    @property
    def _root(self) -> Path:
        """What relative image paths start from."""
        return self.path if self.path.is_dir() else self.path.parent


def open_conversations(path: str | Path, *, every_column: bool = False) -> Conversations:
    """Opens a JSONL or Parquet file, several Parquet files (`data/train-*.parquet`), or a directory
    of another format.

    Args:
        every_column: also read what a table holds besides messages and pictures
            (`Conversations.columns`).

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if what is there holds no conversation or is none of the formats.
        ImportError: if it takes pyarrow, and that is not installed.
    """
    path = local_path(path)
    if has_magic(str(path)) and not path.exists():
        return ParquetFiles(path, sorted(Path(path.parent).glob(path.name)), every_column)
    if path.is_file():
        return (
            ParquetFiles(path, [path], every_column)
            if path.suffix == ".parquet"
            else JsonLines(path)
        )
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or directory of conversations")
    if (path / SHARDS_INDEX).is_file():
        return Shards(path)
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise ValueError(
            f"{path} holds several splits: choose one,"
            f" {' or '.join(str(path / split) for split in splits)}"
        )
    if (path / "state.json").is_file():
        return SavedDataset(path, every_column)
    if parquet := sorted(path.glob("*.parquet")):
        return ParquetFiles(path, parquet, every_column)
    raise ValueError(
        f"{path} is no directory of conversations: it has no {SHARDS_INDEX} (convert.dataset), no"
        " state.json (datasets.Dataset.save_to_disk) and no *.parquet files"
    )


def stored_files(path: str | Path) -> list[Path]:
    """The file at `path`, or those of the pattern or in the directory, but hidden ones; sorted."""
    path = local_path(path)
    files = (
        [path]
        if path.is_file()
        else path.parent.glob(path.name)
        if has_magic(str(path))
        else path.glob("[!.]*")
    )
    return sorted(file for file in files if file.is_file())


def size_of(messages: Messages, count: Callable[[Messages], tuple[int, int]]) -> tuple[int, int]:
    """(tokens, patches) by `count` (`Processor.count`). Raises ValueError for a conversation that
    teaches nothing."""
    check_learnable(messages)
    return count(messages)


def check_learnable(messages: Messages) -> None:
    """Raises ValueError unless there is an assistant turn."""
    if not any(message.get("role") == "assistant" for message in messages):
        raise ValueError("there is no assistant turn to learn from")


class JsonLines(Conversations):
    """A JSONL file, whose blank lines count for nothing. Memory holds the byte offsets of its
    lines."""

    def __init__(self, path: Path):
        """Scans `path` once for line ends. Raises ValueError if all lines are blank."""
        self.path = path
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty")
        self._file = os.open(path, os.O_RDONLY)
        ends, lines = [0], []
        with mmap.mmap(self._file, 0, access=mmap.ACCESS_READ) as content:
            while (start := ends[-1]) < len(content):
                end = content.find(b"\n", start) + 1 or len(content)
                if not content[start:end].isspace():
                    lines.append(len(ends) - 1)
                ends.append(end)
        if not lines:
            raise ValueError(f"{path} is empty")
        self._ends, self._lines = np.array(ends, np.int64), np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index] + 1}"

    def _record(self, index: int) -> Any:
        line = self._lines[index]
        start, end = self._ends[line : line + 2].tolist()
        return json.loads(os.pread(self._file, end - start, start))


class _Parts(Conversations):
    """Records that lie in parts of several, each part in a file; `_ends` are the numbers of records
    up to each part's end."""

    _ends: np.ndarray
    _files: Sequence[Path]
    _file_of_part: np.ndarray
    _first_of_file: np.ndarray

    def _set_parts(self, files: Sequence[Path], lengths: Sequence[Sequence[int]]) -> None:
        """Args: lengths: records of each part of each file. Raises ValueError if there is no
        record."""
        self._files = files
        self._file_of_part = np.repeat(np.arange(len(files)), [len(parts) for parts in lengths])
        self._ends = np.cumsum([length for parts in lengths for length in parts], dtype=np.int64)
        self._first_of_file = np.cumsum([0, *[sum(parts) for parts in lengths]])
        if not len(self):
            raise ValueError(f"{self.path} holds no conversation")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def where(self, index: int) -> str:
        file = self._file_of_part[self._place(index)[0]]
        return f"{self._files[file]}:{index - self._first_of_file[file]}"

    def _place(self, index: int) -> tuple[int, int]:
        """Part of record `index`, and its place there."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)


class ParquetFiles(_Parts):
    """Parquet files as Hugging Face's Hub has them. Memory holds the row groups that were read
    last, half a GiB of them.

    A row group is the least that can be read: in random order that is quick while the data fit this
    memory. Larger data are to be converted (`python -m convert.dataset`).
    """

    def __init__(self, path: Path, files: Sequence[Path], every_column: bool = False):
        """Reads the files' footers. Raises FileNotFoundError if there is no file, ValueError for
        another table."""
        if not files:
            raise FileNotFoundError(f"{path}: no such Parquet file")
        self.path, self._every_column = path, every_column
        parquet = _pyarrow("parquet")
        self._open = [_checked(file, parquet.ParquetFile) for file in files]
        for file, opened in zip(files, self._open, strict=True):
            _check_columns(file, opened.schema_arrow.names)
        metadata = [opened.metadata for opened in self._open]
        groups = [
            [one.row_group(group).num_rows for group in range(one.num_row_groups)]
            for one in metadata
        ]
        self._set_parts(files, groups)
        self._group_of_part = np.concatenate([np.arange(len(lengths)) for lengths in groups])
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def _record(self, index: int) -> Any:
        part, place = self._place(index)
        return self._table(part).slice(place, 1).to_pylist()[0]

    def _table(self, part: int) -> Any:
        with self._lock:
            table = self._cache.pop(part, None)
            if table is None:
                file = self._open[self._file_of_part[part]]
                columns = _wanted(file.schema_arrow.names, self._every_column)
                table = file.read_row_group(int(self._group_of_part[part]), columns=columns)
            self._cache[part] = table
            while (
                len(self._cache) > 1
                and sum(kept.nbytes for kept in self._cache.values()) > ROW_GROUP_CACHE_BYTES
            ):
                self._cache.popitem(last=False)
            return table


class SavedDataset(_Parts):
    """A directory that `datasets.Dataset.save_to_disk` wrote: Arrow files, mapped into memory."""

    def __init__(self, path: Path, every_column: bool = False):
        """Reads the files' record batches' headers. Raises ValueError if a file is missing, broken
        or another table."""
        self.path = path
        names = [
            entry["filename"]
            for entry in json.loads((path / "state.json").read_text())["_data_files"]
        ]
        files = [path / name for name in names]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise ValueError(
                f"{path}: state.json names files that are missing: {', '.join(missing)}"
            )
        tables = [_checked(file, _mapped_batches) for file in files]
        for file, batches in zip(files, tables, strict=True):
            if batches:
                _check_columns(file, batches[0].schema.names)
        self._batches = [
            batch.select(_wanted(batch.schema.names, every_column))
            for one in tables
            for batch in one
        ]
        self._set_parts(files, [[batch.num_rows for batch in batches] for batches in tables])

    def _record(self, index: int) -> Any:
        part, place = self._place(index)
        return self._batches[part].slice(place, 1).to_pylist()[0]


class Shards(_Parts):
    """A directory that `convert.dataset` wrote: ArrayRecord files with the images in them."""

    def __init__(self, path: Path):
        """Reads the index. Raises ValueError if a shard is missing or holds another number of
        records than the index says."""
        self.path = path
        index = json.loads((path / SHARDS_INDEX).read_text())
        files = [path / shard["file"] for shard in index["shards"]]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise ValueError(
                f"{path}: {SHARDS_INDEX} names shards that are missing: {', '.join(missing)}"
            )
        self._set_parts(files, [[shard["examples"]] for shard in index["shards"]])
        from grain.sources import ArrayRecordDataSource  # import pvm_jax need not wait for it

        self._source: Any = ArrayRecordDataSource([str(file) for file in files])
        if len(self._source) != len(self):
            raise ValueError(
                f"{path}: the shards hold {len(self._source)} records, {SHARDS_INDEX} says"
                f" {len(self)}"
            )
        self.measured_by = index["measured_by"]
        if self.measured_by is not None:
            self.sizes = np.load(path / SHARDS_SIZES)

    def _record(self, index: int) -> Any:
        return unpack_record(self._source[index])


def pack_record(messages: Messages) -> bytes:
    """One record of a shard: the messages as MessagePack, images as {"bytes": …, "path": …} in
    their parts."""
    record = msgpack.packb({"messages": messages})
    assert record is not None
    return record


def unpack_record(record: bytes) -> dict[str, Any]:
    """What `pack_record` packed."""
    return msgpack.unpackb(record)


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


@lru_cache
def _pyarrow(part: str) -> ModuleType:
    try:
        return import_module(f"pyarrow.{part}")
    except ImportError as error:
        raise ImportError(
            "Parquet and Arrow files are read by pyarrow: pip install 'pvm-jax[data]'"
        ) from error


def _checked(file: Path, read: Callable[[Path], Any]) -> Any:
    """`read(file)`, what pyarrow refuses named."""
    try:
        return read(file)
    except _pyarrow("lib").ArrowInvalid as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _mapped_batches(file: Path) -> list[Any]:
    """The record batches of an Arrow stream; their contents stay on disk until they are read."""
    reader = _pyarrow("ipc").open_stream(_pyarrow("lib").memory_map(str(file)))
    return list(reader)


def _wanted(names: Sequence[str], every_column: bool) -> list[str]:
    return [name for name in names if every_column or name in _COLUMNS]


def _check_columns(file: Path, names: Sequence[str]) -> None:
    if "messages" not in names:
        raise ValueError(
            f"{file} has no column 'messages' (and 'images' or 'image'), only {', '.join(names)}"
        )
