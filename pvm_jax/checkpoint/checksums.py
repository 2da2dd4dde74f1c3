"""SHA256SUMS beside a checkpoint's arrays, as `sha256sum --check` reads it: a flipped bit is
noticed.

Arrays that conversion writes need none: their chunks carry their own checksums. Orbax's do not. In
a bucket, whose service keeps and compares its own, none are written, and names alone are compared.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from pvm_jax.checkpoint.directory import CheckpointError
from pvm_jax.files.paths import on_bucket

CHECKSUMS = "SHA256SUMS"


def write_checksums(root: Path, folder: str) -> None:
    """Writes the checksum of every file below `root / folder` into `root`, unless it is in a
    bucket."""
    if on_bucket(root):
        return
    names = [
        file.relative_to(root).as_posix()
        for file in sorted((root / folder).rglob("*"))
        if file.is_file()
    ]
    lines = [
        f"{digest}  {name}\n" for name, digest in zip(names, _digests(root, names), strict=True)
    ]
    (root / CHECKSUMS).write_text("".join(lines))


def verify_checksums(root: Path) -> None:
    """Compares the files with their checksums, where there are any; the processes of a run share
    the reading.

    Raises:
        CheckpointError: naming the files that are damaged or missing, or SHA256SUMS itself.
    """
    file = root / CHECKSUMS
    if not file.exists():
        return
    try:
        pairs = [line.split("  ", 1) for line in file.read_text().splitlines()]
        expected = {name: digest for digest, name in pairs}
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    mine = sorted(expected)[jax.process_index() :: jax.process_count()]
    if on_bucket(root):
        there = {str(file) for file in root.rglob("*")}
        damaged = [name for name in mine if str(root / name) not in there]
    else:
        there = [name for name in mine if (root / name).is_file()]
        found = dict(zip(there, _digests(root, there), strict=True))
        damaged = [name for name in mine if found.get(name) != expected[name]]
    # All raise, or those without a damaged file would wait for the others for ever.
    count = int(np.sum(process_allgather(np.array(len(damaged)))))
    if count:
        named = f": {', '.join(damaged[:3])}" if damaged else ""
        raise CheckpointError(
            f"{root}: {count} files differ from {CHECKSUMS} or are missing{named}. They are"
            " damaged: write or copy this checkpoint again"
        )


def _digests(root: Path, names: Sequence[str]) -> list[str]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: _digest(root / name), names))


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
