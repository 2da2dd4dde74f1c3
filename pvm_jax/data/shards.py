"""Conversations in shards, as `convert.dataset` writes them: ArrayRecord files with the images
inside."""

import json
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from pvm_jax.data.messages import Messages, variables_of
from pvm_jax.data.stored import Parts

SHARDS_INDEX = "dataset.json"
"""The file that makes a directory one of `convert.dataset`'s; written last."""

SHARDS_SIZES = "sizes.npy"


class Shards(Parts):
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
        self.set_parts(files, [[shard["examples"]] for shard in index["shards"]])
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
    """One record of a shard as MessagePack: the messages, images as {"bytes": …, "path": …} in
    their parts, and what the chat template gets besides."""
    variables = variables_of(messages)
    tools = {"tools": variables.pop("tools")} if "tools" in variables else {}
    others = {"chat_template_kwargs": variables} if variables else {}
    record = msgpack.packb({"messages": list(messages), **tools, **others})
    assert record is not None
    return record


def unpack_record(record: bytes) -> dict[str, Any]:
    """What `pack_record` packed."""
    return msgpack.unpackb(record)
