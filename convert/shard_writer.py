"""Records -> the shards that `pvm_jax.data.shards` reads at random."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from pvm_jax.files.paths import on_bucket
from pvm_jax.files.writing import upload

SHARD_BYTES = 512 * 2**20
# One record a group: read at random, nothing else is read with it. Images are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"


class ShardWriter:
    """Writes records to shard-00000.array_record and so on, each of about SHARD_BYTES."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._shards: list[dict[str, Any]] = []
        self._open: ArrayRecordWriter | None = None
        self._bytes = 0
        # ArrayRecord writes on this machine alone.
        self._spool = TemporaryDirectory() if on_bucket(directory) else None
        self._where = directory if self._spool is None else Path(self._spool.name)

    def write(self, record: bytes) -> None:
        writer = self._open or self._begin()
        writer.write(record)
        self._shards[-1]["examples"] += 1
        self._bytes += len(record)
        if self._bytes >= SHARD_BYTES:
            self.close()

    def _begin(self) -> ArrayRecordWriter:
        name = f"shard-{len(self._shards):05d}.array_record"
        self._shards.append({"file": name, "examples": 0})
        self._open, self._bytes = ArrayRecordWriter(str(self._where / name), _WRITER_OPTIONS), 0
        return self._open

    def close(self) -> list[dict[str, Any]]:
        """Ends the shard that is being written. Returns all shards: {"file": name, "examples":
        number of them}."""
        if self._open is not None:
            self._open.close()
            self._open = None
            if self._where != self.directory:
                name = self._shards[-1]["file"]
                upload(self._where / name, self.directory / name)
        return self._shards
