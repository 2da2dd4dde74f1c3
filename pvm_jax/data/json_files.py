"""Conversations in JSON files: a record a line, or one array of records; compressed by gzip or
not."""

import gzip
import json
import mmap
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pvm_jax.data.stored import Conversations
from pvm_jax.files.cache import local_copies
from pvm_jax.files.json_file import once

_GZIP = b"\x1f\x8b"
_OTHERS = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
"""How other compressed files begin."""

_STEP = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
"""What decides where a record of an array ends: a text, or a bracket outside of one."""


class JsonFile(Conversations):
    """A JSON file of records: a record a line, blank lines skipped, or one array of them. Memory
    holds their places in the file."""

    def __init__(self, path: Path):
        """Scans `path` once for its records; what gzip compressed is unpacked to a temporary file.

        Raises:
            ValueError: if it holds none, or is no JSON file.
        """
        self.path = path
        self._file = _opened(path, *local_copies([path]))
        if not os.fstat(self._file).st_size:
            raise ValueError(f"{path} is empty")
        with mmap.mmap(self._file, 0, access=mmap.ACCESS_READ) as content:
            self._is_array = ".jsonl" not in path.suffixes and _first(content) == b"["
            found = _array(content, path) if self._is_array else _lines(content)
            flat = np.fromiter((number for place in found for number in place), np.int64)
        if not len(flat):
            raise ValueError(f"{path} is empty")
        self._places = flat.reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        number = self._places[index, 0]
        return f"{self.path}[{number}]" if self._is_array else f"{self.path}:{number}"

    def _record(self, index: int) -> Any:
        _, start, end = self._places[index].tolist()
        try:
            text = os.pread(self._file, end - start, start).decode("utf-8-sig")
            return json.loads(text, object_pairs_hook=once)
        except UnicodeDecodeError as error:
            raise ValueError(f"it is no JSON in UTF-8: {error}") from error
        except json.JSONDecodeError as error:
            advice = "" if self._is_array else ": a line is one record (an array is a .json file)"
            raise ValueError(f"{error}{advice}") from error


def _opened(path: Path, copy: Path) -> int:
    """A descriptor of the content of the file at `path`, which is here as `copy`, unpacked."""
    with open(copy, "rb") as file:
        head = file.read(8)
        if kind := next((name for begin, name in _OTHERS.items() if head.startswith(begin)), None):
            raise ValueError(f"{path} is compressed by {kind}: unpack it, or use gzip")
        if not head.startswith(_GZIP):
            return os.dup(file.fileno())
    with tempfile.TemporaryFile() as unpacked:
        try:
            with gzip.open(copy) as file:
                shutil.copyfileobj(file, unpacked)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}") from error
        unpacked.flush()
        return os.dup(unpacked.fileno())


def _first(content: mmap.mmap) -> bytes:
    """The first byte that is no white space (nor the mark by which Windows knows UTF-8)."""
    found = re.match(rb"(?:\xef\xbb\xbf)?\s*(\S)", content)
    return found[1] if found else b""


def _lines(content: mmap.mmap) -> Iterator[tuple[int, int, int]]:
    """Number (from 1), start and end of every line that is not blank."""
    start = number = 0
    while start < len(content):
        end = content.find(b"\n", start) + 1 or len(content)
        number += 1
        if not content[start:end].isspace():
            yield number, start, end
        start = end


def _array(content: mmap.mmap, path: Path) -> Iterator[tuple[int, int, int]]:
    """Number (from 0), start and end of every object of an array.

    Raises:
        ValueError: if something else is in it.
    """
    depth = number = start = end = 0
    for step in _STEP.finditer(content):
        if step[0] in (b"[", b"{"):
            if depth == 1:
                start = step.start()
                comma = b"," if number else b""
                if step[0] != b"{" or content[end:start].strip() != comma:
                    break
            depth += 1
            end = end or step.end()
        elif step[0] in (b"]", b"}"):
            depth -= 1
            if depth == 1:
                end = step.end()
                yield number, start, end
                number += 1
            elif depth == 0:
                if content[end : step.start()].strip() or content[step.end() :].strip():
                    break
                return
    raise ValueError(
        f"{path}[{number}]: an array must hold objects, commas between them, and nothing else: is"
        " the file cut off?"
    )
