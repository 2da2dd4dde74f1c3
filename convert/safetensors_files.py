"""Safetensors, a slice at a time: the library checks files, plain reads and writes move the bytes.

Its own readers map the file, and every page that they touch counts as the process's memory; its
writer wants all tensors of a file at once.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Self

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pvm_jax.checkpoint.directory import CheckpointError
from pvm_jax.files.cache import local_copies, local_copy
from pvm_jax.files.json_file import JsonObject, read_json
from pvm_jax.files.paths import on_bucket

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
KEPT = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""What a model computes in."""
DTYPES = KEPT | {"F16": np.dtype(np.float16), "F64": np.dtype(np.float64)}
"""What can be read; the others have to be cast to one of KEPT."""
NAMES = {dtype: name for name, dtype in KEPT.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `dtype` as safetensors names it, `offset` its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsReader:
    """The tensors of a Hugging Face directory, whether in one file or several."""

    def __init__(self, directory: Path):
        """Reads and checks the headers.

        Raises:
            FileNotFoundError: if there are no safetensors, or a file that the index names is
                missing.
            CheckpointError: for a file that is cut off or otherwise broken, named; for a tensor
                that is in two files, or elsewhere than the index says.
            ValueError: for an index that is malformed or leaves the directory.
        """
        self.tensors: dict[str, Stored] = {}
        index = _index(directory)
        names = sorted(set(index.values())) if index else [SINGLE]
        local_copies([directory / name for name in names])
        for name in names:
            for tensor, stored in _header(directory / name).items():
                if first := self.tensors.get(tensor):
                    raise CheckpointError(
                        f"{directory}: {tensor} is in {first.file.name} and in {name}"
                    )
                if index and index.get(tensor) != name:
                    where = f"in {index[tensor]}" if tensor in index else "nowhere"
                    raise CheckpointError(f"{directory}: {tensor} is in {name}, {where} by {INDEX}")
                self.tensors[tensor] = stored
        if lost := [tensor for tensor in index if tensor not in self.tensors]:
            raise CheckpointError(
                f"{directory}: {INDEX} places {lost[0]} in {index[lost[0]]}, which lacks it"
                f" ({len(lost)} such tensors)"
            )
        self._open = ExitStack()
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Self:
        for file in {stored.file for stored in self.tensors.values()}:
            self._descriptors[file] = self._open.enter_context(
                open(local_copy(file, keep=True), "rb", buffering=0)
            ).fileno()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out` (contiguous, of the tensor's dtype) with the tensor's elements from `start`
        on, row after row."""
        stored = self.tensors[name]
        offset, bytes_left = stored.offset + start * out.itemsize, _bytes(out)
        while bytes_left:
            count = os.preadv(self._descriptors[stored.file], [bytes_left], offset)
            if not count:
                raise CheckpointError(
                    f"{stored.file} ended while {name} was read: it was cut off meanwhile"
                )
            offset, bytes_left = offset + count, bytes_left[count:]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    directory: Path,
    tensors: Mapping[str, Planned],
    chunks: Iterator[np.ndarray],
    max_shard_size: str,
) -> None:
    """Writes files of at most `max_shard_size` ("5GB") or one larger tensor, and the index where
    there are several.

    Args:
        chunks: the tensors' contents, in the order of `tensors`; each tensor in as many pieces as
            the caller likes.

    Raises:
        ValueError: if `max_shard_size` is no size.
    """
    files = _split(tensors, _size(max_shard_size))
    for filename, names in files.items():
        with (directory / filename).open("wb") as file:
            file.write(_encode_header({name: tensors[name] for name in names}))
            left = sum(tensors[name].nbytes for name in names)
            while left:
                piece = next(chunks)
                file.write(_bytes(np.ascontiguousarray(piece)))
                left -= piece.nbytes
            if not on_bucket(directory):
                file.flush()
                os.fsync(file.fileno())
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: filename for filename, names in files.items() for name in names},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _size(text: str) -> int:
    """The bytes of "5GB", "500MB" and the like."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])B\s*", text, re.IGNORECASE)
    size = float(found[1]) * 1000 ** ("KMGT".index(found[2].upper()) + 1) if found else 0
    if size < 1:
        raise ValueError(f"max_shard_size {text!r} is no size such as 5GB, 500MB")
    return int(size)


def _split(tensors: Mapping[str, Planned], most: int) -> dict[str, list[str]]:
    """{file: names of its tensors}, in the order of `tensors`, each of at most `most` bytes or one
    larger tensor."""
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > most:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.nbytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": names
        for number, names in enumerate(files, 1)
    }


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`values` of the tensor `name` in `dtype`, one of KEPT, each rounded once, to the nearest.

    Raises:
        CheckpointError: if a finite number becomes infinite.
    """
    with np.errstate(over="ignore"):
        narrow = values
        if values.dtype == np.float64 and dtype != np.float32:
            narrow = _round_to_odd(values)
        result = narrow.astype(dtype)
    infinite = ~np.isfinite(result)
    if infinite.any() and np.isfinite(values[infinite]).any():
        raise CheckpointError(f"{name} holds numbers that are too large for {dtype}")
    return result


def _round_to_odd(values: np.ndarray) -> np.ndarray:
    """float64 -> float32 such that a second rounding, to fewer bits, is that of `values`."""
    near = values.astype(np.float32)
    bits, wide = near.view(np.uint32), near.astype(np.float64)
    bits -= np.abs(wide) > np.abs(values)
    bits |= wide != values
    return near


def files_named(directory: Path) -> list[str]:
    """The files that hold the weights of a directory, whether they are there or not.

    Raises:
        ValueError: for an index that is malformed or leaves the directory.
    """
    return sorted(set(_places(directory / INDEX).values())) or [SINGLE]


def _index(directory: Path) -> dict[str, str]:
    """The file of each tensor, as the index says; nothing where all are in one file."""
    single, places = directory / SINGLE, _places(directory / INDEX)
    if not places:
        if not single.is_file():
            raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}")
        return {}
    names = set(places.values())
    if single.is_file() and SINGLE not in names:
        raise CheckpointError(
            f"{directory} has both {SINGLE} and {INDEX}, which does not name it: remove the one"
            " that is out of date"
        )
    if missing := [name for name in sorted(names) if not (directory / name).is_file()]:
        raise FileNotFoundError(
            f"{directory}: {INDEX} names files that are missing: {', '.join(missing)}"
        )
    return places


def _places(index: Path) -> dict[str, str]:
    """What the file `index` says; nothing where there is none."""
    if not index.exists():
        return {}
    content = read_json(index)
    weight_map = content.object("weight_map")
    if not weight_map:
        content.refuse("weight_map", "is empty")
    places = {tensor: weight_map.text(tensor) for tensor in weight_map}
    for tensor, name in places.items():
        if name != Path(name).name or name == "..":
            weight_map.refuse(tensor, f"must be a file of this directory, got {name!r}")
    return places


def _header(file: Path) -> dict[str, Stored]:
    copy = local_copy(file, keep=True)
    try:
        with safe_open(copy, "numpy"):  # checks that the header fits the file
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error
    with open(copy, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = JsonObject(json.loads(raw.read(length)), str(file))
    stored = {}
    for name in header:
        if name != "__metadata__":
            entry = header.object(name)
            begin, _ = entry.integers("data_offsets", bits=64)
            shape = entry.integers("shape")
            stored[name] = Stored(file, entry.text("dtype"), shape, 8 + length + begin)
    return stored


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _encode_header(tensors: Mapping[str, Planned]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, planned in tensors.items():
        header[name] = {
            "dtype": NAMES[planned.dtype],
            "shape": planned.shape,
            "data_offsets": [offset, offset + planned.nbytes],
        }
        offset += planned.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
