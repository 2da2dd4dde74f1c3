"""How many tokens and patches every example takes: measured now, by whoever wrote the data, or at
an earlier start."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from pvm_jax.data.conversations import size_of
from pvm_jax.data.messages import Messages, shows_video
from pvm_jax.data.processor import Processor
from pvm_jax.data.stored import Conversations
from pvm_jax.files.bucket import BucketError
from pvm_jax.files.writing import write_whole

NO_VIDEOS = "shows a video: set data.videos to true"
"""Said of an example whose batch has room for images alone."""

_CHUNK = 64
"""Examples that a thread measures at a time."""


def measure(
    conversations: Conversations,
    count: Callable[[Messages], tuple[int, int]],
    threads: int,
    *,
    videos: bool,
    read: Callable[[Conversations, int], Messages] = Conversations.__getitem__,
) -> np.ndarray:
    """(tokens, patches) of every conversation, [N, 2] int32, with a progress bar on a terminal.
    `read` refuses what it must; without `videos`, these are refused too."""

    def sizes(start: int) -> list[tuple[int, int]]:
        return [size(index) for index in range(start, min(start + _CHUNK, len(conversations)))]

    def size(index: int) -> tuple[int, int]:
        messages = read(conversations, index)
        with conversations.naming(index):
            size = count(messages)
            if not videos and shows_video(messages):
                raise ValueError(NO_VIDEOS)
            return size

    starts = range(0, len(conversations), _CHUNK)
    with ThreadPoolExecutor(threads) as pool:
        console = Console()
        chunks = track(
            pool.map(sizes, starts),
            f"Measuring {conversations.path}",
            total=len(starts),
            console=console,
            disable=not console.is_terminal,
        )
        return np.array([size for chunk in chunks for size in chunk], np.int32)


def sizes_of(
    conversations: Conversations, processor: Processor, threads: int, *, videos: bool
) -> np.ndarray:
    """[N, 2] int32: those that the data bring, if this very processor measured them, else measured
    now (`measure`)."""
    if conversations.videos and not videos:
        raise ValueError(f"{conversations.path}: {NO_VIDEOS}")
    if conversations.sizes is not None and not _measured_by_another(conversations, processor):
        return conversations.sizes
    count = partial(size_of, count=processor.count)
    return measure(conversations, count, threads, videos=videos)


def measured_here(sources: Sequence[Conversations], processor: Processor) -> str:
    """What the report says about the sources whose own sizes are not taken."""
    stale = [str(source.path) for source in sources if _measured_by_another(source, processor)]
    if not stale:
        return ""
    return (
        ". Measured here, since convert.dataset measured with another tokenizer or image settings:"
        f" {', '.join(stale)}"
    )


def _measured_by_another(conversations: Conversations, processor: Processor) -> bool:
    return (
        conversations.measured_by is not None and conversations.measured_by != processor.fingerprint
    )


def cached(file: Path | None, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` gives, or the array that an earlier start wrote to `file` (.npy).

    Raises:
        OSError: naming `file`, where it cannot be written.
    """
    if file and file.exists():
        return np.load(BytesIO(file.read_bytes()))
    array = make()
    if file and jax.process_index() == 0:
        content = BytesIO()
        np.save(content, array)
        try:
            write_whole(file, content.getvalue())
        except BucketError:
            raise
        except OSError as error:
            raise OSError(
                f"{file} cannot be written ({error}): free space there, or give another --run_dir"
            ) from error
    return array
