"""One writer at a time: a lock that ends with the process that holds it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock

from pvm_jax.files.bucket import BucketPath
from pvm_jax.files.lease import Lease
from pvm_jax.files.paths import any_path, on_bucket


@contextmanager
def sole_writer(
    target: str | Path, *, lock: Path | None = None, otherwise: str = "choose another place"
) -> Iterator[None]:
    """Keeps every other process that asks for the same from writing to `target` during the block.

    Process 0 of several asks for all. The kernel holds the lock: that of a process that was killed
    is free at once; in a bucket, after half a minute (`pvm_jax.files.lease`).

    Args:
        lock: the file that is locked and vanishes with the block; None: `.NAME.lock` beside
            `target`.
        otherwise: what the error proposes beside waiting.

    Raises:
        OSError: if another process writes there, or the lock cannot be made.
        ValueError: for a URL that is no bucket's (`any_path`).
    """
    path = any_path(target).absolute()
    if jax.process_index() != 0:
        yield
        return
    file = path.with_name(f".{path.name}.lock") if lock is None else lock
    try:
        held = _acquired(file)
    except TimeoutError as error:
        raise OSError(
            f"{target} is being written by another process: wait until it has ended, or {otherwise}"
        ) from error
    except OSError as error:
        raise OSError(f"{target} cannot be written ({error}): {otherwise}") from error
    with held:
        try:
            yield
        finally:
            if not on_bucket(file):  # where the lease does it
                file.unlink(missing_ok=True)  # while it is held: nobody else can have taken it


def _acquired(file: Path) -> Any:
    """The lock, held; as a context it lets go at its end."""
    if isinstance(file, BucketPath):
        return Lease(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file, timeout=0).acquire()
