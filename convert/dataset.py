"""Conversations in any format -> shards that training reads at random, images inside: `python -m
convert.dataset`."""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from convert.embedding import embedded_message
from convert.hub_dataset import HubData, fetched, find_dataset, one_by_one
from convert.shard_writer import ShardWriter
from convert.summary import Checked, Summary
from pvm_jax import options
from pvm_jax.checkpoint.directory import refuse_taken, write_aside
from pvm_jax.data.conversations import check_learnable, open_conversations
from pvm_jax.data.image_files import read_image
from pvm_jax.data.messages import (
    ChatMessages,
    Messages,
    asked,
    parse,
    variables_of,
)
from pvm_jax.data.processor import Processor
from pvm_jax.data.shards import SHARDS_INDEX, SHARDS_SIZES, pack_record
from pvm_jax.data.stored import Conversations, plain_columns
from pvm_jax.data.video_files import Video
from pvm_jax.files.bucket import BucketError
from pvm_jax.files.hub import SETTINGS, HubError, model_directory, named_on_hub
from pvm_jax.files.paths import any_path
from pvm_jax.files.writing import Growing, check_writable

EXAMPLES = """
examples:
  python -m convert.dataset data/train.jsonl data/train --checkpoint checkpoints/8b
  python -m convert.dataset 'downloads/train-*.parquet' data/train \\
      --checkpoint checkpoints/8b --max_tokens 8192
  python -m convert.dataset someone/pictures data/train --split train --checkpoint checkpoints/8b
  python -m convert.dataset someone/larger_than_the_disk data/train --stream --count 100000
  python -m convert.dataset saved_by_datasets data/train --max_rejected 0.05
With --checkpoint, the tokens and patches of every example are stored too, and training starts
without measuring them.
"""

CHUNK = 8
"""Examples that a thread checks at a time."""


class _Part(NamedTuple):
    """Conversations that are opened together, and what the progress bar says of them."""

    conversations: Conversations
    title: str = "Converting"


@dataclass(frozen=True)
class DatasetOptions:
    """What to convert, and what is left out.

    Attributes:
        src: JSON or Parquet file, several by a pattern, or a directory (docs/data.md); or a data
            set of the Hub: OWNER/NAME, OWNER/NAME@REVISION, hf://datasets/OWNER/NAME/PATTERN.
        dst: directory to write; absent or empty.
        checkpoint: whose tokenizer and image settings measure the examples; a directory, or a model
            of the Hub (OWNER/NAME).
        max_tokens: longer examples are rejected (needs --checkpoint).
        max_rejected: more than this share of rejects is an error.
        threads: examples read at the same time; by default one for each core.
        subset: of a data set of the Hub that has several.
        split: the same.
        stream: a data set of the Hub is fetched a file at a time, which is read and removed: the
            disk need not hold it.
        count: only the first so many examples, rejected ones among them.
        prompts: the conversations are for GRPO: each ends with the user's turn and has a solution,
            or the assistant's turn at its end is that.
    """

    src: str
    dst: str
    checkpoint: str | None = None
    max_tokens: int | None = None
    max_rejected: float = 0.01
    threads: int | None = None
    subset: str | None = None
    split: str | None = None
    stream: bool = False
    count: int | None = None
    prompts: bool = False

    def __post_init__(self):
        if self.count is not None and self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max_rejected is a share, 0 to 1, got {self.max_rejected:g}")
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
    checkpoint = given.checkpoint and model_directory(given.checkpoint, SETTINGS)
    convert(
        given.src,
        given.dst,
        Processor.from_pretrained(checkpoint) if checkpoint else None,
        max_tokens=given.max_tokens,
        max_rejected=given.max_rejected,
        threads=(os.cpu_count() or 1) if given.threads is None else given.threads,
        subset=given.subset,
        split=given.split,
        stream=given.stream,
        count=given.count,
        prompts=given.prompts,
    )


def convert(
    src: str | Path | Sequence[str | Path],
    dst: str | Path,
    processor: Processor | None = None,
    *,
    max_tokens: int | None = None,
    max_rejected: float = 0.01,
    threads: int = 1,
    subset: str | None = None,
    split: str | None = None,
    stream: bool = False,
    count: int | None = None,
    prompts: bool = False,
) -> None:
    """Writes the directory `dst`, and what was rejected and why to `dst`.rejected.jsonl; prints a
    summary. Every image is decoded once, so that none stops a training run later.

    Args:
        src: what `open_conversations` opens, or a text that names a data set of the Hub, of which
            `subset` and `split` say a part (`convert.hub_dataset`), and `stream` that it is fetched
            a file at a time, of which none is kept.
        processor: measures every example; None: the sizes are left to the training run.
        max_tokens: longer examples are rejected.
        max_rejected: the share of rejects up to which the result is kept.
        count: the first so many examples are read; None: all.
        prompts: they are prompts, which GRPO measures itself; `processor` counts for `max_tokens`.

    Raises:
        FileNotFoundError, ValueError: if `src` cannot be opened, `processor` is missing for
            `max_tokens`, or too many examples are rejected. There is no `dst` then.
        FileExistsError: if `dst` holds something.
        OSError: if `dst` cannot be written. There is none then.
    """
    if max_tokens is not None and processor is None:
        raise ValueError("max_tokens needs a processor, whose tokenizer counts")
    dst = any_path(dst)
    refuse_taken(dst)
    parts, source = _opened(src, dst, subset, split, stream)
    report_file = dst.with_name(dst.name + ".rejected.jsonl")

    def check(conversations: Conversations) -> _Check:
        return _Check(conversations, processor, max_tokens, prompts)

    with write_aside(dst) as aside, _explaining(dst), _report(report_file) as report:
        summary = Summary()
        writer = ShardWriter(aside)
        for checked in _first(count, parts, check, threads):
            if isinstance(checked, Rejected):
                summary.reject(checked.reason)
                report.write(json.dumps(checked._asdict()).encode() + b"\n")
            else:
                writer.write(checked.record)
                summary.add(checked)
        shards = writer.close()
        _check_rejects(summary, max_rejected, report_file)
        measured_by = None if prompts or processor is None else processor.fingerprint
        _write_index(aside, source, summary, measured_by, shards)
    print(summary.describe(dst, report_file, measured=processor is not None))


def _check_rejects(summary: Summary, most: float, report_file: Path) -> None:
    """Raises ValueError if more than a share of `most` were rejected, or all."""
    read = summary.rejected + len(summary.sizes)
    if summary.rejected > most * read or not summary.sizes:
        raise ValueError(
            f"{summary.rejected} of {read} examples were rejected, and --max_rejected allows a"
            f" share of {most}; the reason of each is in {report_file}, the most frequent:\n"
            + ";\n".join(summary.reasons())
        )


def _write_index(
    directory: Path,
    source: str,
    summary: Summary,
    measured_by: str | None,
    shards: list[dict[str, Any]],
) -> None:
    """Writes what makes `directory` one of shards, and the sizes if they were measured."""
    if measured_by:
        sizes = BytesIO()
        np.save(sizes, np.array(summary.sizes, np.int32))
        (directory / SHARDS_SIZES).write_bytes(sizes.getvalue())
    index = {
        "source": source,
        "examples": len(summary.sizes),
        "measured_by": measured_by,
        "videos": summary.videos,
        "shards": shards,
    }
    (directory / SHARDS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _opened(
    src: str | Path | Sequence[str | Path],
    dst: Path,
    subset: str | None,
    split: str | None,
    stream: bool,
) -> tuple[Iterable[_Part], str]:
    """The conversations, in parts that are opened when they are asked for, and what they are
    called. Nothing is fetched where `dst` cannot be written."""
    if on_hub := named_on_hub(src, "dataset"):
        data = find_dataset(on_hub, subset=subset, split=split)
        if stream:
            return _streamed(data), data.name
        check_writable(dst.parent)  # before gigabytes travel
        return [_Part(open_conversations(fetched(data), every_column=True))], data.name
    if subset or split or stream:
        raise ValueError(
            f"--subset, --split and --stream are of data sets of the Hub, and {src} is here"
        )
    conversations = open_conversations(src, every_column=True)
    return [_Part(conversations)], str(conversations.path)


def _streamed(data: HubData) -> Iterator[_Part]:
    for number, file in enumerate(one_by_one(data), 1):
        title = f"Converting file {number} of {len(data.files)}"
        yield _Part(open_conversations(file, every_column=True), title)


@contextmanager
def _explaining(dst: Path) -> Iterator[None]:
    try:
        yield
    except (BucketError, HubError):
        raise
    except (OSError, RuntimeError) as error:  # ArrayRecord says the latter of a full disk
        raise OSError(
            f"{dst} cannot be written ({error}): free space there, or choose another place"
        ) from error


@contextmanager
def _report(file: Path) -> Iterator[Growing]:
    """`file`, to be written; it vanishes if nothing was."""
    file.unlink(missing_ok=True)
    try:
        with Growing(file) as report:
            yield report
    finally:
        if file.exists() and not file.stat().st_size:
            file.unlink()


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
    prompts: bool

    def __call__(self, index: int) -> Checked | Rejected:
        try:
            messages = self.conversations[index]
            with self.conversations.naming(index):
                taken = self.processor.video_settings.sampling if self.processor else None
                whole = [embedded_message(message, taken) for message in messages]
                embedded = ChatMessages(whole, variables_of(messages))
                return self._checked(embedded, self.conversations.columns(index))
        except ValueError as error:
            where = self.conversations.where(index)
            return Rejected(where, str(error).removeprefix(f"{where}: "))

    def _checked(self, messages: Messages, columns: Mapping[str, Any]) -> Checked:
        asks = asked(messages) if self.prompts else messages
        if not self.prompts:
            check_learnable(messages)
        elif "solution" not in columns and len(asks) == len(messages):
            raise ValueError("a prompt needs a solution, or an assistant turn at its end")
        conversation = parse(messages, reserved=())
        sources = [source for _, source in conversation.images]
        videos = [video for _, video in conversation.videos if isinstance(video, Video)]
        sources += [frame for video in videos for frame in video.frames]
        size = (0, 0)
        if self.processor is None:
            for source in sources:
                read_image(source)
        else:
            example = self.processor.encode(asks, add_generation_prompt=self.prompts)
            size = len(example.input_ids), example.num_patches
        if self.max_tokens is not None and size[0] > self.max_tokens:
            raise ValueError(f"too long: {size[0]} tokens, --max_tokens is {self.max_tokens}")
        record = pack_record(messages, plain_columns(columns))
        return Checked(record, size, len(sources), bool(conversation.videos))


def _first(
    count: int | None,
    parts: Iterable[_Part],
    check: Callable[[Conversations], _Check],
    threads: int,
) -> Iterator[Checked | Rejected]:
    """What is found of the first `count` examples (None: of all). No part is asked for in vain."""
    left = sys.maxsize if count is None else count
    for conversations, title in parts:
        examples = min(left, len(conversations))
        yield from _in_order(examples, check(conversations), threads, title)
        left -= examples
        if not left:
            return


def _in_order(
    examples: int, check: Callable[[int], Checked | Rejected], threads: int, title: str
) -> Iterator[Checked | Rejected]:
    """What `check` says of the first so many examples, in their order; few are in memory at a time.
    Shows a progress bar on a terminal."""

    def chunk(start: int) -> list[Checked | Rejected]:
        return [check(index) for index in range(start, min(start + CHUNK, examples))]

    def chunks() -> Iterator[Future[list[Checked | Rejected]]]:
        running: deque[Future[list[Checked | Rejected]]] = deque()
        for start in range(0, examples, CHUNK):
            running.append(pool.submit(chunk, start))
            if len(running) >= 4 * threads:
                yield running.popleft()
        yield from running

    console, pool = Console(stderr=True), ThreadPoolExecutor(threads)
    try:
        done = (checked for future in chunks() for checked in future.result())
        yield from track(
            done,
            title,
            total=examples,
            console=console,
            disable=not console.is_terminal,
        )
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
