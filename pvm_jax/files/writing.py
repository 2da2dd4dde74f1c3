"""Files that are written whole, or grow, on this machine and in buckets alike."""

import os
import shutil
import time
import uuid
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self, cast

from pvm_jax.files.bucket import BucketPath, reaching
from pvm_jax.files.paths import on_bucket

UPLOAD_SECONDS = 30.0


def write_whole(file: Path, content: bytes) -> None:
    """Writes `file` so that it is there whole or not at all; what was there is replaced.

    Raises:
        OSError: if it cannot be written.
    """
    if on_bucket(file):
        file.write_bytes(content)  # an object appears whole
        return
    aside = file.with_name(f".{file.name}.partial")
    aside.write_bytes(content)
    os.replace(aside, file)


def copy_file(source: Path, target: Path) -> None:
    """Copies a small file."""
    target.write_bytes(source.read_bytes())


def check_writable(directory: Path) -> None:
    """Makes `directory`. Raises OSError, of one line, if it takes no file: one that is there may do
    so."""
    directory.mkdir(parents=True, exist_ok=True)
    if on_bucket(directory):
        probe = directory / f".{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()
    else:
        TemporaryFile(dir=directory).close()


def remove_tree(directory: Path) -> None:
    """Removes a directory, as far as that is possible, and if it is there."""
    if on_bucket(directory):
        cast(BucketPath, directory).rmtree(missing_ok=True)
    else:
        shutil.rmtree(directory, ignore_errors=True)


def upload(file: Path, target: Path) -> None:
    """Moves `file` of this machine to `target` in a bucket, whatever its size."""
    with reaching(target):
        cast(BucketPath, target).files.put_file(str(file), str(target))
    file.unlink()


class Growing:
    """A file that is appended to, bytes at a time.

    In a bucket nothing can be appended: what grows is a temporary file here, and `flush` sends it
    whole, at most once in `every` seconds; a process that is killed loses what came after.
    """

    def __init__(self, file: Path, *, every: float = UPLOAD_SECONDS):
        """Raises OSError if `file` cannot be read or written."""
        self._file, self._every, self._sent = file, every, time.monotonic()
        self._in_bucket = on_bucket(file)
        self._open: Any = TemporaryFile() if self._in_bucket else file.open("ab")  # noqa: SIM115
        if self._in_bucket and file.exists():
            self._open.write(file.read_bytes())

    def write(self, content: bytes) -> None:
        self._open.write(content)

    def flush(self) -> None:
        """What was written is on the disk, or in the bucket where that has waited long enough."""
        self._open.flush()
        if self._in_bucket and time.monotonic() - self._sent >= self._every:
            self._send()

    def close(self) -> None:
        """All is written."""
        if self._in_bucket:
            self._send()
        self._open.close()

    def _send(self) -> None:
        self._open.seek(0)
        self._file.write_bytes(self._open.read())
        self._sent = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
