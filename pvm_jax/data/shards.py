"""Conversations in shards, as `convert.dataset` writes them: ArrayRecord files with the images
inside."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgpack
import numpy as np

from pvm_jax.data.messages import Messages, variables_of
from pvm_jax.data.stored import Parts
from pvm_jax.files.cache import local_copies, local_copy
from pvm_jax.files.json_file import read_json

SHARDS_INDEX = "dataset.json"
"""The file that makes a directory one of `convert.dataset`'s; written last."""

SHARDS_SIZES = "sizes.npy"

_DIGITS = 1
"""MessagePack's number for our own kind of value."""


class Shards(Parts):
    """A directory that `convert.dataset` wrote: ArrayRecord files with the images in them."""

    def __init__(self, path: Path):
        """Reads the index. Raises ValueError if a shard is missing, broken or holds another number
        of records than the index says."""
        self.path = path
        index = read_json(path / SHARDS_INDEX)
        files = self.files_of(index, "shards", "file")
        lengths = [shard.integer("examples", least=1) for shard in index.objects("shards")]
        self.set_parts(files, [[length] for length in lengths])
        self._source = _opened(files)
        if len(self._source) != len(self):
            raise ValueError(
                f"{path}: the shards hold {len(self._source)} records, {SHARDS_INDEX} says"
                f" {len(self)}"
            )
        self.videos = index.flag("videos", False)
        self.measured_by = index.text("measured_by", None)
        if self.measured_by is not None:
            self.sizes = _sizes(path / SHARDS_SIZES, len(self))

    def _record(self, index: int) -> Any:
        try:
            return unpack_record(self._source[index])
        except RuntimeError as error:  # ArrayRecord's word for a broken file
            raise ValueError(f"the record cannot be read: {error}") from error


def _opened(files: Sequence[Path]) -> Any:
    """The shards' records, read at random. Raises ValueError, naming the file, if one is broken."""
    from grain.sources import ArrayRecordDataSource  # import pvm_jax need not wait for it

    try:
        return ArrayRecordDataSource([str(file) for file in local_copies(files)])
    except (RuntimeError, ValueError) as error:
        if len(files) > 1:  # it does not say which
            for file in files:
                _opened([file])
        raise ValueError(f"{files[0]} is no whole shard: {error}") from error


def _sizes(file: Path, count: int) -> np.ndarray:
    """(tokens, patches) of every conversation, [N, 2] int32."""
    try:
        # Mapped, a header cannot ask for more than the file holds.
        sizes = np.lib.format.open_memmap(local_copy(file), mode="r")
    except Exception as error:  # the header is parsed as Python, which raises whatever it meets
        raise ValueError(f"{file} is no whole array of NumPy: {error}") from error
    if sizes.shape != (count, 2) or sizes.dtype != np.int32 or (sizes < 0).any():
        raise ValueError(
            f"{file} must hold {count} pairs of int32, tokens and patches, got {list(sizes.shape)}"
            f" of {sizes.dtype}: convert the data anew"
        )
    return np.array(sizes)


def pack_record(messages: Messages, columns: Mapping[str, Any] = MappingProxyType({})) -> bytes:
    """One record of a shard as MessagePack: the messages, images as {"bytes": …, "path": …} in
    their parts, what the chat template gets besides, and the record's own columns."""
    variables = variables_of(messages)
    tools = {"tools": variables.pop("tools")} if "tools" in variables else {}
    others = {"chat_template_kwargs": variables} if variables else {}
    whole = {**columns, "messages": list(messages), **tools, **others}
    record = msgpack.packb(whole, default=_as_digits)
    assert record is not None
    return record


def unpack_record(record: bytes) -> dict[str, Any]:
    """What `pack_record` packed."""
    return msgpack.unpackb(record, ext_hook=_of_digits)


def _as_digits(value: Any) -> msgpack.ExtType:
    """A whole number of more than MessagePack's 64 bits. Raises ValueError for anything else."""
    if not isinstance(value, int):
        raise ValueError(f"a shard holds no {type(value).__name__}: {value!r:.80}")
    return msgpack.ExtType(_DIGITS, str(value).encode())


def _of_digits(kind: int, content: bytes) -> int:
    if kind != _DIGITS:
        raise ValueError(f"the record holds something of the unknown kind {kind}")
    return int(content)
