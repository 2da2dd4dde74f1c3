"""Files of buckets as files of this machine: copied when they are asked for, kept for the next
time, the longest unused removed first.

What reads at random (JSON lines, tables, shards, pictures, safetensors) reads the copy.
"""

import hashlib
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pvm_jax.files.bucket import BucketPath, reaching
from pvm_jax.files.writing import copy_file

PLACE, GIB = "PVM_JAX_CACHE", "PVM_JAX_CACHE_GIB"
"""Variables: where the copies are, by default ~/.cache/pvm_jax; and how many GiB they may take, by
default 100."""
_AT_A_TIME = 16
SETTINGS_SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Of a model's files that are no weights."""

_PARTS = 100
_ABANDONED_SECONDS = 24 * 3600.0

_unseen: Counter[tuple[Path, int]] = Counter()
"""By place and what copies may take there: bytes that this process may fetch before it looks again
what is there."""
_kept: set[Path] = set()
"""Copies that are open in this process: they stay."""
_lock = threading.Lock()


def local_copies(files: Sequence[Path]) -> list[Path]:
    """`files`, those in a bucket as copies that stay while this process runs; many are fetched at
    the same time.

    Raises:
        FileNotFoundError: if one is not there.
        OSError: if they take more than the cache may, or cannot be fetched.
    """
    if not any(isinstance(file, BucketPath) for file in files):
        return list(files)
    room, there = _most_bytes(), [file for file in files if isinstance(file, BucketPath)]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        needed = sum(pool.map(lambda file: file.stat().st_size, there))
        if needed > room:
            raise OSError(
                f"{files[0]} and what is read with it have {needed / 2**30:,.1f} GiB, and copies of"
                f" files in buckets may take {room / 2**30:g} here ({GIB}, in {_place()}): allow"
                " more, or mount the bucket"
            )
        return list(pool.map(lambda file: local_copy(file, keep=True), files))


def local_copy(file: Path, *, keep: bool = False) -> Path:
    """`file` itself, or of one in a bucket the copy of what is there now. It may vanish when others
    are fetched, unless it is to be kept.

    Raises:
        FileNotFoundError, OSError: as `local_copies`.
    """
    if not isinstance(file, BucketPath):
        return file
    info = file.info()
    if info is None or info["type"] == "directory":
        raise FileNotFoundError(f"{file} does not exist")
    version = [str(info.get(key)) for key in ("generation", "ETag", "etag", "mtime", "size")]
    name = hashlib.sha256("\n".join([str(file), *version]).encode()).hexdigest()
    copy = _place() / f"{name}{file.suffix}"
    if keep:
        with _lock:
            _kept.add(copy)
    try:
        os.utime(copy)  # it was used now
    except FileNotFoundError:
        _fetch(file, copy)
    return copy


def _fetch(file: BucketPath, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    aside = copy.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with reaching(file):
            file.files.get_file(str(file), str(aside))
        size = aside.stat().st_size
        os.replace(aside, copy)
    finally:
        aside.unlink(missing_ok=True)
    _make_room(size)


def _make_room(fetched: int) -> None:
    """Removes copies, the longest unused first, until the rest fit and leave a hundredth free: so
    much each process may fetch before it looks again, since that takes long where there are many.
    """
    place, most = _place(), _most_bytes()
    with _lock:
        _unseen[place, most] -= fetched
        if _unseen[place, most] > 0:
            return
        _unseen[place, most] = most // _PARTS
        copies = []
        for copy in os.scandir(place):
            try:
                copies.append((copy.stat().st_mtime, copy.stat().st_size, copy.path))
            except FileNotFoundError:  # another process makes room too
                continue
        left = sum(size for _, size, _ in copies)
        for used, size, name in sorted(copies):
            if left <= most - most // _PARTS:
                return
            copy = Path(name)
            # A process that is killed leaves half a file; others are being written.
            half = copy.name.startswith(".") and used > time.time() - _ABANDONED_SECONDS
            if copy not in _kept and not half:
                copy.unlink(missing_ok=True)
                left -= size


def _place() -> Path:
    return Path(os.environ.get(PLACE) or Path.home() / ".cache" / "pvm_jax")


def _most_bytes() -> int:
    given = os.environ.get(GIB, "100")
    try:
        return int(float(given) * 2**30)
    except ValueError as error:
        raise OSError(f"{GIB} must be a number of GiB, got {given!r}") from error


def copied_settings(folder: Path, into: str) -> Path:
    """The directory `folder`, or of one in a bucket the directory `into`, with a copy of its small
    files: the tokenizer's, the processor's."""
    if not isinstance(folder, BucketPath):
        return folder
    for file in folder.iterdir():
        if file.suffix in SETTINGS_SUFFIXES:
            copy_file(file, Path(into) / file.name)
    return Path(into)
