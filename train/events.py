"""TensorBoard's event files, written by whoever logs: what was flushed outlives the process, and a full disk is an error.

(tensorboardX's own SummaryWriter writes from a thread, minutes later: a killed run loses them, a full disk blocks the run.)
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

_protos: Any = event_pb2  # its classes are made while it is imported


class EventWriter:
    """One event file of a directory; what older files say of step `start` and later is hidden by TensorBoard."""

    def __init__(self, directory: Path, *, start: int):
        """Makes `directory` where it is missing, and the file in it.

        Raises:
            OSError: if they cannot be written, here as in all methods.
        """
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(directory / "events"))
        self._write(session_log={"status": _protos.SessionLog.START}, step=start)
        self.flush()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """A point of the curve `name`."""
        self._add(summary.scalar(name, value), step)

    def add_text(self, name: str, text: str, step: int) -> None:
        """A text in Markdown."""
        self._add(summary.text(name, text), step)

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """An image [H, W, 3] uint8."""
        self._add(summary.image(name, image, rescale=1, dataformats="HWC"), step)

    def flush(self) -> None:
        """Returns when all that was added is on the disk."""
        with self._explaining():
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        with self._explaining():
            self._events.close()

    def _add(self, content: Any, step: int) -> None:
        self._write(summary=content, step=step)

    def _write(self, **fields: Any) -> None:
        with self._explaining():
            self._events.write_event(_protos.Event(**fields, wall_time=time.time()))

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self._directory} cannot be written ({error}): free space there; the same command then continues from the "
                "last step checkpoint"
            ) from error
