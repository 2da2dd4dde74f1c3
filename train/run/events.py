"""TensorBoard's event files, written by whoever logs: what was flushed outlives the process, and a
full disk is an error.

(tensorboardX's own SummaryWriter writes from a thread, minutes later: a killed run loses them, a
full disk blocks the run.)
"""

import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from pvm_jax.files.bucket import BucketError
from pvm_jax.files.paths import on_bucket

_MOST_SENT = 2**20
"""Bytes of a file that are sent to a bucket again and again; then another one begins."""
_protos: Any = event_pb2  # its classes are made while it is imported


class EventWriter:
    """One event file of a directory; what older files say of step `start` and later is hidden by
    TensorBoard."""

    def __init__(self, directory: Path, *, start: int):
        """Makes `directory` where it is missing, and the file in it.

        Raises:
            OSError: if they cannot be written, here as in all methods.
        """
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        with self._explaining():
            self._begin()
        self._write(session_log={"status": _protos.SessionLog.START}, step=start)
        self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve of `values`."""
        for name, value in values.items():
            self._add(summary.scalar(name, value), step)

    def sample(self, step: int, name: str, text: str, image: np.ndarray | None) -> None:
        """A text in Markdown and its image [H, W, 3] uint8."""
        self._add(summary.text(name, text), step)
        if image is not None:
            self._add(summary.image(name, image, rescale=1, dataformats="HWC"), step)

    def flush(self) -> None:
        """Returns when all that was added is on the disk."""
        with self._explaining():
            self._events.flush()
            if self._spool is not None:
                self._send(Path(self._spool.name))

    def close(self, *, failed: bool = False) -> None:
        """Flushes and closes the file, however the run ended."""
        self.flush()
        with self._explaining():
            self._events.close()

    def _begin(self) -> None:
        """A new file; of a bucket, to which nothing can be appended, it is written here first."""
        self._spool = TemporaryDirectory() if on_bucket(self._directory) else None
        where = self._directory if self._spool is None else Path(self._spool.name)
        # tensorboardX names files by the second: a run soon after another would write over its.
        number = len(list(self._directory.glob("events.*")))
        self._events = EventsWriter(str(where / "events"), f".{number:06d}")

    def _send(self, spool: Path) -> None:
        (file,) = spool.iterdir()
        (self._directory / file.name).write_bytes(file.read_bytes())
        if file.stat().st_size > _MOST_SENT:
            self._events.close()
            self._begin()

    def _add(self, content: Any, step: int) -> None:
        self._write(summary=content, step=step)

    def _write(self, **fields: Any) -> None:
        with self._explaining():
            self._events.write_event(_protos.Event(**fields, wall_time=time.time()))

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except BucketError as error:
            raise BucketError(
                f"{error}; the same command then continues from the last step checkpoint"
            ) from error
        except OSError as error:
            raise OSError(
                f"{self._directory} cannot be written ({error}): free space there; the same command"
                " then continues from the last step checkpoint"
            ) from error


def read_values(directory: Path) -> dict[str, list[tuple[int, Any]]]:
    """{tag: [(step, value), ...]} of all event files in `directory`, in the order in which they
    were written.

    A scalar's value is a float, a text's its string, an image's the bytes of its PNG.
    """
    values: dict[str, list[tuple[int, Any]]] = {}
    for event in _events(directory):
        for value in event.summary.value:
            values.setdefault(value.tag, []).append((event.step, _content(value)))
    return values


def read_starts(directory: Path) -> list[int]:
    """The steps at which the processes that wrote into `directory` began or went on, in their
    order."""
    return [event.step for event in _events(directory) if event.HasField("session_log")]


def _events(directory: Path) -> Iterator[Any]:
    for file in sorted(directory.glob("events.*")):
        content, place = file.read_bytes(), 0
        while place + 12 < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            if place + length + 16 > len(content):
                break  # its writer was killed
            yield _protos.Event.FromString(
                content[place + 12 : place + 12 + length]
            )  # a checksum before and after it
            place += length + 16


def _content(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "tensor":
        return value.tensor.string_val[0].decode()
    return value.image.encoded_image_string if kind == "image" else value.simple_value
