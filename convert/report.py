"""What the two commands show their user: a progress bar and a summary."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def report(target: str, tensors: int, total: int) -> Iterator[Callable[[int], None]]:
    """Shows the bytes that the yielded function is told of, and sums up at the end.

    Args:
        target: what is written, for the summary.
        total: bytes to come.
    """
    console, start = Console(stderr=True), time.monotonic()
    columns = (
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
    seconds = time.monotonic() - start
    print(
        f"{target}: {tensors} tensors, {total / 1e9:.2f} GB, {seconds:.1f} s"
        f" ({total / 1e6 / seconds:.0f} MB/s), peak memory {peak_memory() / 2**30:.2f} GiB"
    )


def peak_memory() -> int:
    """Bytes of memory that this process has had resident at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
