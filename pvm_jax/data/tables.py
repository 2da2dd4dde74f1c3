"""Conversations in tables: Parquet files, and directories that `datasets` saved."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pvm_jax.data.conventions import COLUMNS, TURNS, concerns
from pvm_jax.data.stored import Parts
from pvm_jax.files.cache import local_copies
from pvm_jax.files.json_file import read_json

ROW_GROUP_CACHE_BYTES = 512 * 2**20

SAVED_INDEX = "state.json"
"""The file that makes a directory one that `datasets` saved."""


class ParquetFiles(Parts):
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
        parquet = pyarrow("parquet")
        self._open = _checked(files, parquet.ParquetFile)
        for file, opened in zip(files, self._open, strict=True):
            _check_columns(file, opened.schema_arrow.names)
        metadata = [opened.metadata for opened in self._open]
        groups = [
            [one.row_group(group).num_rows for group in range(one.num_row_groups)]
            for one in metadata
        ]
        self.set_parts(files, groups)
        self._group_of_part = np.concatenate([np.arange(len(lengths)) for lengths in groups])
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def _record(self, index: int) -> Any:
        part, place = self.place_of(index)
        return _row(self._table(part), place)

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


class SavedDataset(Parts):
    """A directory that `datasets.Dataset.save_to_disk` wrote: Arrow files, mapped into memory."""

    def __init__(self, path: Path, every_column: bool = False):
        """Reads the files' record batches' headers. Raises ValueError if a file is missing, broken
        or another table."""
        self.path = path
        files = self.files_of(read_json(path / SAVED_INDEX), "_data_files", "filename")
        tables = _checked(files, _mapped_batches)
        for file, batches in zip(files, tables, strict=True):
            if batches:
                _check_columns(file, batches[0].schema.names)
        self._batches = [
            batch.select(_wanted(batch.schema.names, every_column))
            for one in tables
            for batch in one
        ]
        self.set_parts(files, [[batch.num_rows for batch in batches] for batches in tables])

    def _record(self, index: int) -> Any:
        part, place = self.place_of(index)
        return _row(self._batches[part], place)


def pyarrow(part: str) -> ModuleType:
    """Its module of this name. Raises ImportError, saying what to install."""
    try:
        return import_module(f"pyarrow.{part}")
    except ImportError as error:
        raise ImportError(
            "Parquet and Arrow files are read by pyarrow: pip install 'pvm-jax[data]'"
        ) from error


def _checked(files: Sequence[Path], read: Callable[[Path], Any]) -> list[Any]:
    """`read(file)` of each, what pyarrow refuses named."""
    opened = []
    for file, copy in zip(files, local_copies(files), strict=True):
        try:
            opened.append(read(copy))
        except (pyarrow("lib").ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    return opened


def _mapped_batches(file: Path) -> list[Any]:
    """The record batches of an Arrow stream; their contents stay on disk until they are read."""
    reader = pyarrow("ipc").open_stream(pyarrow("lib").memory_map(str(file)))
    return list(reader)


def _wanted(names: Sequence[str], every_column: bool) -> list[str]:
    return [name for name in names if every_column or concerns(name)]


def _check_columns(file: Path, names: Sequence[str]) -> None:
    if twice := [name for name in set(names) if names.count(name) > 1]:
        raise ValueError(f"{file} has the column {twice[0]!r} twice")
    if not set(TURNS) & set(names):
        raise ValueError(
            f"{file} has no column 'messages' (and 'images' or 'image'; {' and '.join(TURNS[1:])}"
            f" are read too), only {', '.join(names)}"
        )


def _decoder(kind: Any, *, filled: bool) -> Callable[[Any], Any] | None:
    """What turns values of an Arrow type into what was stored; None: nothing is to be done.

    Columns of JSON are parsed (`datasets` 5 stores so what differs from row to row), and keep their
    nulls. Structs lose them where they are `filled`: every one has the keys of all others.
    """
    types = pyarrow("types")
    if getattr(kind, "extension_name", None) == "arrow.json":
        return lambda value: value if value is None else json.loads(value)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _decoder(kind.value_type, filled=filled)
        return inner and (lambda value: value if value is None else [inner(one) for one in value])
    if types.is_struct(kind):
        inners = {field.name: d for field in kind if (d := _decoder(field.type, filled=filled))}
        return (lambda value: _decoded(value, inners, filled=filled)) if inners or filled else None
    return None


def _decoded(
    row: dict[str, Any] | None, decoders: dict[str, Callable[[Any], Any]], *, filled: bool
) -> Any:
    """A row (or a struct) with its columns of JSON decoded, and without nulls if they are
    `filled`."""
    if row is None:
        return None
    decoded = row | {name: decode(row[name]) for name, decode in decoders.items()}
    if not filled:
        return decoded
    return {name: value for name, value in decoded.items() if value is not None}


def _row(table: Any, place: int) -> dict[str, Any]:
    """Row `place` of a table or a record batch. Raises ValueError for a damaged one, whose offsets
    would be followed anywhere."""
    row = table.slice(place, 1)
    row.validate(full=True)
    decoders = {
        field.name: d
        for field in table.schema
        if (d := _decoder(field.type, filled=field.name in COLUMNS))
    }
    return _decoded(row.to_pylist()[0], decoders, filled=False)
