"""What a source of conversations holds, as one short text: a run that goes on must read what it
began with."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pvm_jax.data.conversations import stored_files
from pvm_jax.data.image_files import encoded_bytes, file_of
from pvm_jax.data.messages import parse
from pvm_jax.data.shards import Shards
from pvm_jax.data.stored import Conversations
from pvm_jax.data.video_files import MAX_FILE_BYTES, Video, VideoFile
from pvm_jax.files.bucket import BucketError
from pvm_jax.files.cache import local_copies

BLOCK_BYTES = 2**20
MOST_BLOCKS = 2048
STRETCHES, STRETCH = 16, 256


def contents_of(conversations: Conversations, threads: int) -> str:
    """A hash (SHA-256, hexadecimal) of what was opened, in seconds whatever its size.

    It reads the names and sizes of the source's files and all their bytes, of more than 2 GiB as
    many blocks spread evenly over them; and the pictures, in files of their own, of 4,096 records:
    all of them where there are no more, else 16 stretches of 256 spread evenly. What it may miss in
    larger data, a picture that now has another size, is noticed when the example is read
    (`train.data.loading`).
    """
    found = hashlib.sha256()
    with ThreadPoolExecutor(threads) as pool:
        files = stored_files(conversations.path)
        copies = local_copies(files)
        for file, copy in zip(files, copies, strict=True):
            found.update(f"{file.name} {copy.stat().st_size}\n".encode())
        for digest in pool.map(_block, _spread(list(_blocks(copies)), MOST_BLOCKS)):
            found.update(digest)
        if not isinstance(conversations, Shards):  # these hold their pictures themselves
            for digest in pool.map(_pictures, *_records(conversations)):
                found.update(digest)
    return found.hexdigest()


def _blocks(files: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    """Every block's file and first byte."""
    for file in files:
        for start in range(0, file.stat().st_size, BLOCK_BYTES):
            yield file, start


def _spread(items: list, most: int) -> list:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, most).astype(int)]


def _block(block: tuple[Path, int]) -> bytes:
    file, start = block
    with file.open("rb") as opened:
        opened.seek(start)
        return hashlib.sha256(opened.read(BLOCK_BYTES)).digest()


def _records(conversations: Conversations) -> tuple[list[Conversations], list[int]]:
    """The records whose pictures are looked at."""
    count = len(conversations)
    starts = _spread(list(range(0, count, STRETCH)), STRETCHES)
    places = [place for start in starts for place in range(start, min(start + STRETCH, count))]
    return [conversations] * len(places), places


def _pictures(conversations: Conversations, index: int) -> bytes:
    """Of a record's pictures; nothing of a record that measuring will refuse."""
    try:
        conversation = parse(conversations[index], ())
    except ValueError:
        return b""
    sources: list[Any] = [source for _, source in conversation.images]
    videos = [video for _, video in conversation.videos]
    sources += [frame for one in videos if isinstance(one, Video) for frame in one.frames]
    found = hashlib.sha256()
    for video in videos:
        if isinstance(video, VideoFile):
            found.update(_beginning(video))
    for source in sources:
        try:
            found.update(hashlib.sha256(encoded_bytes(source)).digest())
        except BucketError:
            raise
        except (OSError, ValueError):
            found.update(b"cannot be read")
    return found.digest()


def _beginning(video: VideoFile) -> bytes:
    """Of a video file, which is large: its length, its first MiB, and what is taken of it."""
    taken = f"{video.fps} {video.num_frames}".encode()
    try:
        file, _ = file_of(video.source, "video", MAX_FILE_BYTES)
    except (OSError, ValueError):
        return b"cannot be read" + taken
    if not isinstance(file, Path):
        return hashlib.sha256(file.getvalue()).digest() + taken
    return f"{file.stat().st_size} ".encode() + _block((file, 0)) + taken
