"""Conversations in any format -> shards that training reads at random, images inside: `python -m
convert.dataset`."""

import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from rich.console import Console
from rich.progress import track

from pvm_jax import options
from pvm_jax.checkpoint.directory import write_aside
from pvm_jax.data.conversations import check_learnable, open_conversations
from pvm_jax.data.image_files import encoded_bytes
from pvm_jax.data.images import read_image
from pvm_jax.data.messages import ChatMessages, Messages, image_source, parse, variables_of
from pvm_jax.data.processor import Processor
from pvm_jax.data.shards import SHARDS_INDEX, SHARDS_SIZES, pack_record
from pvm_jax.data.stored import Conversations
from pvm_jax.files.paths import local_path

EXAMPLES = """
examples:
  python -m convert.dataset data/train.jsonl data/train --checkpoint checkpoints/8b
  python -m convert.dataset 'downloads/train-*.parquet' data/train \\
      --checkpoint checkpoints/8b --max_tokens 8192
  python -m convert.dataset saved_by_datasets data/train --max_rejected 0.05
With --checkpoint, the tokens and patches of every example are stored too, and training starts
without measuring them.
"""

SHARD_BYTES = 512 * 2**20
# One record a group: read at random, nothing else is read with it. Images are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
CHUNK = 8
"""Examples that a thread checks at a time."""
_HISTOGRAM_WIDTH = 40
_REASONS = 5
_PARTICULARS = re.compile(r"""'[^']*'|"[^"]*"|\S*/\S*|\d+(?:\.\d+)?|\[[^\]]*\]""")
"""What differs from one reject to the next of the same kind: names, paths, numbers."""


@dataclass(frozen=True)
class DatasetOptions:
    """What to convert, and what is left out.

    Attributes:
        src: JSON or Parquet file, several by a pattern, or a directory (docs/data.md).
        dst: directory to write; absent or empty.
        checkpoint: whose tokenizer and image settings measure the examples.
        max_tokens: longer examples are rejected (needs --checkpoint).
        max_rejected: more than this share of rejects is an error.
        threads: examples read at the same time; by default one for each core.
    """

    src: str
    dst: str
    checkpoint: str | None = None
    max_tokens: int | None = None
    max_rejected: float = 0.01
    threads: int | None = None

    def __post_init__(self):
        if self.max_tokens is not None and self.checkpoint is None:
            raise ValueError("--max_tokens needs --checkpoint: it is the tokenizer that counts")


@options.command
def main(argv: Sequence[str]) -> None:
    """Parses `argv` (default: the process's arguments) and converts."""
    given, _ = options.parse(
        DatasetOptions,
        argv,
        prog="python -m convert.dataset",
        description=__doc__ or "",
        examples=EXAMPLES,
        by_place=["src", "dst"],
    )
    jax.config.update("jax_platforms", "cpu")
    convert(
        given.src,
        given.dst,
        Processor.from_pretrained(given.checkpoint) if given.checkpoint else None,
        max_tokens=given.max_tokens,
        max_rejected=given.max_rejected,
        threads=(os.cpu_count() or 1) if given.threads is None else given.threads,
    )


def convert(
    src: str | Path | Sequence[str | Path],
    dst: str | Path,
    processor: Processor | None = None,
    *,
    max_tokens: int | None = None,
    max_rejected: float = 0.01,
    threads: int = 1,
) -> None:
    """Writes the directory `dst`, and what was rejected and why to the file `dst`.rejected.jsonl;
    prints a summary.

    Every image is decoded once, so that none stops a training run later.

    Args:
        processor: measures every example; None: the sizes are left to the training run.
        max_tokens: longer examples are rejected.
        max_rejected: the share of rejects up to which the result is kept.

    Raises:
        FileNotFoundError, ValueError: if `src` cannot be opened, `processor` is missing for
            `max_tokens`, or too many examples are rejected. There is no `dst` then.
        FileExistsError: if `dst` holds something.
        OSError: if `dst` cannot be written. There is none then.
    """
    if max_tokens is not None and processor is None:
        raise ValueError("max_tokens needs a processor, whose tokenizer counts")
    dst = local_path(dst)
    conversations = open_conversations(src)
    report_file = dst.with_name(dst.name + ".rejected.jsonl")
    with write_aside(dst) as aside, _explaining(dst), _report(report_file) as report:
        summary = _Summary()
        writer = ShardWriter(aside)
        for checked in _in_order(
            conversations, _Check(conversations, processor, max_tokens), threads
        ):
            if isinstance(checked, Rejected):
                summary.reject(checked.reason)
                report.write(json.dumps(checked._asdict()) + "\n")
            else:
                writer.write(checked.record)
                summary.add(checked)
        shards = writer.close()
        if summary.rejected > max_rejected * len(conversations) or not shards:
            raise ValueError(
                f"{summary.rejected} of {len(conversations)} examples were rejected, and"
                f" --max_rejected allows a share of {max_rejected}; the reason of each is in"
                f" {report_file}\n" + "\n".join(summary.reasons())
            )
        if processor is not None:
            np.save(aside / SHARDS_SIZES, np.array(summary.sizes, np.int32))
        index = {
            "source": str(conversations.path),
            "examples": len(summary.sizes),
            "measured_by": None if processor is None else processor.fingerprint,
            "videos": summary.videos,
            "shards": shards,
        }
        (aside / SHARDS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
    print(summary.describe(dst, report_file, measured=processor is not None))


@contextmanager
def _explaining(dst: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord says the latter of a full disk
        raise OSError(
            f"{dst} cannot be written ({error}): free space there, or choose another place"
        ) from error


@contextmanager
def _report(file: Path) -> Iterator[TextIO]:
    """`file`, to be written; it vanishes if nothing was."""
    try:
        with open(file, "w") as report:
            yield report
    finally:
        if file.exists() and not file.stat().st_size:
            file.unlink()


class Checked(NamedTuple):
    """An example that can be trained on: its record for the shards, (tokens, patches) where
    measured, its images, and whether it shows a video."""

    record: bytes
    size: tuple[int, int]
    images: int
    video: bool


class Rejected(NamedTuple):
    """One that cannot, and why."""

    example: str
    reason: str


@dataclass(frozen=True)
class _Check:
    """What is done with every example, in several threads."""

    conversations: Conversations
    processor: Processor | None
    max_tokens: int | None

    def __call__(self, index: int) -> Checked | Rejected:
        try:
            messages = self.conversations[index]
            with self.conversations.naming(index):
                embedded = ChatMessages(map(_embedded, messages), variables_of(messages))
                return self._checked(embedded)
        except ValueError as error:
            where = self.conversations.where(index)
            return Rejected(where, str(error).removeprefix(f"{where}: "))

    def _checked(self, messages: Messages) -> Checked:
        check_learnable(messages)
        conversation = parse(messages, reserved=())
        sources = [source for _, source in conversation.images]
        sources += [frame for _, video in conversation.videos for frame in video.frames]
        video = bool(conversation.videos)
        if self.processor is None:
            for source in sources:
                read_image(source)
            return Checked(pack_record(messages), (0, 0), len(sources), video)
        example = self.processor.encode(messages)
        if self.max_tokens is not None and len(example.input_ids) > self.max_tokens:
            raise ValueError(
                f"too long: {len(example.input_ids)} tokens, --max_tokens is {self.max_tokens}"
            )
        return Checked(
            pack_record(messages),
            (len(example.input_ids), example.num_patches),
            len(sources),
            video,
        )


def _embedded(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its images and frames read into it."""
    if not isinstance(message.get("content"), list):
        return message
    return dict(message) | {"content": [_embedded_part(part) for part in message["content"]]}


def _embedded_part(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "video" and isinstance(part.get("video"), list):
        return part | {"video": [_embedded_image(frame) for frame in part["video"]]}
    if part.get("type") in ("image", "image_url"):
        source = image_source(part)
        return part | {"type": "image", "image": _embedded_image(source)}
    return part


def _embedded_image(source: Any) -> dict[str, Any]:
    """{"bytes": the file, "path": its name, for errors}."""
    name = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(name, str) or name.startswith("data:"):
        return {"bytes": encoded_bytes(source), "path": None}
    return {"bytes": encoded_bytes(source), "path": name.rpartition("/")[2]}


def _in_order(
    conversations: Conversations, check: Callable[[int], Checked | Rejected], threads: int
) -> Iterator[Checked | Rejected]:
    """What `check` says of every example, in their order; few are in memory at a time. Shows a
    progress bar on a terminal."""

    def chunk(start: int) -> list[Checked | Rejected]:
        return [check(index) for index in range(start, min(start + CHUNK, len(conversations)))]

    def chunks() -> Iterator[Future[list[Checked | Rejected]]]:
        running: deque[Future[list[Checked | Rejected]]] = deque()
        for start in range(0, len(conversations), CHUNK):
            running.append(pool.submit(chunk, start))
            if len(running) >= 4 * threads:
                yield running.popleft()
        yield from running

    console, pool = Console(stderr=True), ThreadPoolExecutor(threads)
    try:
        done = (checked for future in chunks() for checked in future.result())
        yield from track(
            done,
            "Converting",
            total=len(conversations),
            console=console,
            disable=not console.is_terminal,
        )
    finally:
        pool.shutdown(cancel_futures=True)


class ShardWriter:
    """Writes records to shard-00000.array_record and so on, each of about SHARD_BYTES."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._shards: list[dict[str, Any]] = []
        self._open: ArrayRecordWriter | None = None
        self._bytes = 0

    def write(self, record: bytes) -> None:
        writer = self._open or self._begin()
        writer.write(record)
        self._shards[-1]["examples"] += 1
        self._bytes += len(record)
        if self._bytes >= SHARD_BYTES:
            self.close()

    def _begin(self) -> ArrayRecordWriter:
        name = f"shard-{len(self._shards):05d}.array_record"
        self._shards.append({"file": name, "examples": 0})
        self._open, self._bytes = ArrayRecordWriter(str(self.directory / name), _WRITER_OPTIONS), 0
        return self._open

    def close(self) -> list[dict[str, Any]]:
        """Ends the shard that is being written. Returns all shards: {"file": name, "examples":
        number of them}."""
        if self._open is not None:
            self._open.close()
            self._open = None
        return self._shards


@dataclass
class _Summary:
    """What was written."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    images: int = 0
    videos: bool = False
    bytes: int = 0
    rejected: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    first_of_kind: dict[str, str] = field(default_factory=dict)

    def add(self, checked: Checked) -> None:
        self.sizes.append(checked.size)
        self.images += checked.images
        self.videos |= checked.video
        self.bytes += len(checked.record)

    def reject(self, reason: str) -> None:
        """Counts a reject."""
        kind = _PARTICULARS.sub("…", reason)
        self.rejected += 1
        self.kinds[kind] += 1
        self.first_of_kind.setdefault(kind, reason)

    def reasons(self) -> list[str]:
        """A line for each of the most frequent kinds of reasons: how many, and the first."""
        lines = [
            f"{count:>9,}: {self.first_of_kind[kind]}"
            for kind, count in self.kinds.most_common(_REASONS)
        ]
        if left := self.rejected - sum(count for _, count in self.kinds.most_common(_REASONS)):
            lines.append(f"{left:>9,}: for other reasons")
        return lines

    def describe(self, dst: Path, report_file: Path, *, measured: bool) -> str:
        """A few lines for the user."""
        lines = [
            f"{dst}: {len(self.sizes):,} examples with {self.images:,} images,"
            f" {self.bytes / 1e6:,.1f} MB"
        ]
        if self.rejected:
            lines.append(f"{self.rejected:,} examples rejected: {report_file}")
            lines += self.reasons()
        if measured:
            tokens, patches = np.array(self.sizes).sum(0)
            lines.append(
                f"{tokens:,} tokens, {patches:,} patches: {patches / tokens:.2f} patches a token"
            )
            lines += histogram([tokens for tokens, _ in self.sizes])
        return "\n".join(lines)


def histogram(lengths: Sequence[int]) -> list[str]:
    """A line for each power of two: how many lengths are at most that and more than the one
    before."""
    bins = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
    first = int(np.flatnonzero(bins)[0])
    return [
        f"{'tokens':>10} up to {2**power:>9,}: {count:>9,}"
        f" {'#' * -(-count * _HISTOGRAM_WIDTH // bins.max())}".rstrip()
        for power, count in enumerate(bins.tolist())
        if power >= first
    ]


if __name__ == "__main__":
    main()
