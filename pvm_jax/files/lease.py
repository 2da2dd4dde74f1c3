"""A lock in a bucket, where no kernel holds one: an object that its holder renews.

Who finds it there watches it: if it changes, its holder is alive; if it does not, it was killed,
and the lock is free. No clocks are compared.
"""

import hashlib
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from typing import Self

from pvm_jax.files.bucket import BucketPath

BEAT = 10.0
"""Seconds between two renewals."""
BEATS = 3
"""So many may be missed."""


class Lease:
    """Holds the lock `file` until its block ends.

    A process that finds that another has taken its lock, since it was not heard of for so long,
    ends at once.
    """

    def __init__(self, file: BucketPath):
        """Waits for some beats where a lock is there.

        Raises:
            TimeoutError: if it is another process's.
            OSError: if the bucket gives no answer, or there is none.
        """
        self._file = file
        self._mine = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        self._take()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        tried: set[BucketPath] = set()
        while not self._created():
            before = self._content()
            if before is None:
                continue
            self._watch(before)
            # Of several who have seen the same lock, one may take it over.
            ticket = BucketPath(f"{self._file}.{hashlib.sha256(before.encode()).hexdigest()[:8]}")
            try:
                ticket.create(b"")
            except FileExistsError:
                if ticket in tried:  # who took it over was killed meanwhile
                    ticket.unlink(missing_ok=True)
                tried.add(ticket)
                continue
            free = self._content() == before  # or another was faster
            if free:
                self._file.write_text(f"{self._mine} 0")
            ticket.unlink()
            if free:
                return

    def _watch(self, before: str) -> None:
        """Returns if nobody renews the lock. Raises TimeoutError if somebody does."""
        patience = BEAT * BEATS
        print(
            f"{self._file} is there: watching it for {patience:.0f} s, whether who wrote it is"
            " alive",
            file=sys.stderr,
        )
        end = time.monotonic() + patience
        while (now := self._content()) == before and time.monotonic() < end:
            time.sleep(BEAT / 10)
        if now not in (None, before):
            raise TimeoutError(f"{self._file} is held by {now}")

    def _created(self) -> bool:
        content = f"{self._mine} 0"
        try:
            self._file.create(content.encode())
        except FileExistsError:  # or an answer was lost, and the library has asked again
            return self._content() == content
        return True

    def _content(self) -> str | None:
        try:
            return self._file.read_text()
        except FileNotFoundError:
            return None

    def _is_mine(self) -> bool:
        return (self._content() or "").startswith(self._mine)

    def _renew(self) -> None:
        beat = 0
        while not self._end.wait(BEAT):
            beat += 1
            try:
                if not self._is_mine():
                    print(
                        f"error: {self._file} was taken by another process, since this one was not"
                        " heard of: it ends",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(2)
                self._file.write_text(f"{self._mine} {beat}")
            except OSError:
                pass  # the bucket may answer at the next beat

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        with suppress(OSError):  # left behind, it is taken over some beats later
            if self._is_mine():
                self._file.unlink(missing_ok=True)
