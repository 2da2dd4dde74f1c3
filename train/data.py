"""Conversations on disk -> batches of few static shapes, in an order that the seed alone decides.

The file is JSONL: one object a line, chat messages in the form that chat templates take, images by path (relative to the
file itself) and videos by the paths of their frames:

    {"messages": [
      {"role": "user", "content": [{"type": "image", "image": "images/17.png"}, {"type": "text", "text": "How many?"}]},
      {"role": "assistant", "content": "Three."}]}

Loss falls on assistant turns. An example is never truncated: it goes into the smallest bucket that holds it, or nowhere.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from pvm_jax.batch import Batch, Example
from pvm_jax.config import ModelConfig
from pvm_jax.processing import Processor
from train.config import Bucket, SFTConfig

Messages = list[dict[str, Any]]


class Conversations(Sequence[Messages]):
    """The conversations of a JSONL file. Memory holds the byte offsets of its lines; a line is read when it is asked for."""

    def __init__(self, path: str | Path):
        """Scans `path` once for line ends.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it has no line.
        """
        self.path = Path(path)
        with open(self.path, "rb") as file:
            lengths = [len(line) for line in file]
        if not lengths:
            raise ValueError(f"{self.path} is empty")
        ends = np.cumsum(lengths)
        self._spans = np.stack([ends - lengths, lengths], axis=1)
        self._file = os.open(self.path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Messages:
        """The messages of line `index` (from 0), image paths made absolute.

        Raises:
            ValueError: naming file and line, if the line is not an object with a list of messages.
        """
        start, length = self._spans[index]
        try:
            record = json.loads(os.pread(self._file, int(length), int(start)))
            return [_with_absolute_paths(message, self.path.parent) for message in record["messages"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{self.where(index)}: not an object {{"messages": [{{"role": ..., "content": ...}}, ...]}}: {error!r}'
            ) from error

    def where(self, index: int) -> str:
        """`file:line` of conversation `index`, for error messages."""
        return f"{self.path}:{index + 1}"

    @contextmanager
    def naming(self, index: int) -> Iterator[None]:
        """Turns what conversation `index` is refused for into a ValueError that names its line."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.where(index)}: {error}") from error


def _with_absolute_paths(message: dict[str, Any], root: Path) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return message
    return message | {"content": [_absolute_item(item, root) for item in content]}


def _absolute_item(item: dict[str, Any], root: Path) -> dict[str, Any]:
    if "image" in item:
        return item | {"image": str(root / item["image"])}
    if "video" in item:
        return item | {"video": [str(root / frame) for frame in item["video"]]}
    return item


@dataclass(frozen=True)
class TrainingData:
    """The batches of a run.

    Attributes:
        batches: element i is this host's part of step i's batch, NumPy leaves.
        report: what became of the examples, for the log.
    """

    batches: grain.MapDataset[Batch]
    report: str

    def iterator(self, start: int, threads: int, prefetch: int) -> Iterator[Batch]:
        """The batches from step `start` on, read ahead in `threads` threads."""
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        return iter(self.batches[start:].to_iter_dataset(options))


def load_training_data(
    config: SFTConfig,
    processor: Processor,
    model_config: ModelConfig,
    *,
    rows: slice = slice(None),
    sizes_file: Path | None = None,
) -> TrainingData:
    """Measures every example, sorts them into buckets and lays out all batches of the run.

    Every host gets the same shape at every step.

    Args:
        rows: those of a batch that this host reads.
        sizes_file: keeps the measured sizes for the next start on the same data (an .npy file).

    Raises:
        ValueError: for a bad line (named), for an example that no bucket holds with `too_long` "error", or if no bucket can
            fill a batch.
    """
    data = config.data
    conversations = Conversations(data.path)
    sizes = _cached(sizes_file, lambda: measure(conversations, processor.count, data.threads))
    buckets = sorted(data.buckets, key=lambda bucket: (bucket.tokens, bucket.patches))
    members = assign(sizes, buckets, least=-(-config.batch_size // config.epochs))
    too_long = len(conversations) - sum(map(len, members))
    if too_long and data.too_long == "error":
        raise ValueError(_describe_too_long(conversations, sizes, members, too_long))

    def encode(index: int) -> Example:
        with conversations.naming(index):
            return processor.encode(conversations[index])

    parts = []
    for bucket, indices in zip(buckets, members, strict=True):
        if steps := len(indices) * config.epochs // config.batch_size:
            order = grain.MapDataset.range(len(indices)).shuffle(config.seed).repeat(config.epochs)
            batches = order[: steps * config.batch_size].batch(config.batch_size)
            parts.append(batches.map(partial(_read_rows, encode, model_config, bucket, indices, rows)))
    if not parts:
        raise ValueError(f"{data.path}: no bucket has the {config.batch_size} examples of one batch; {too_long} are too long")
    batches = _interleave(parts, config.seed)
    left_over = sum(len(indices) * config.epochs for indices in members) - len(batches) * config.batch_size
    batches = batches[: config.max_steps]
    report = (
        f"{len(conversations):,} examples x {config.epochs} epochs: {len(batches):,} steps of {config.batch_size}; "
        f"{too_long:,} examples too long for every bucket, {left_over:,} readings fill no batch"
    )
    return TrainingData(batches, report)


def _read_rows(
    encode: Callable[[int], Example],
    model_config: ModelConfig,
    bucket: Bucket,
    indices: np.ndarray,
    rows: slice,
    places: np.ndarray,
) -> Batch:
    """The batch of the examples at `places` of a bucket's `indices`: those `rows` of it that this host reads."""
    examples = [[encode(index)] for index in indices[places[rows]].tolist()]
    return Batch.from_rows(examples, model_config, length=bucket.tokens, patches=bucket.patches)


def _cached(file: Path | None, make: Callable[[], np.ndarray]) -> np.ndarray:
    if file and file.exists():
        return np.load(file)
    array = make()
    if file and jax.process_index() == 0:
        aside = file.with_suffix(".partial.npy")
        np.save(aside, array)
        aside.replace(file)
    return array


def measure(conversations: Conversations, count: Callable[[Messages], tuple[int, int]], threads: int) -> np.ndarray:
    """(tokens, patches) of every conversation, [N, 2], with a progress bar on a terminal."""

    def sizes(start: int) -> list[tuple[int, int]]:
        return [count_one(index) for index in range(start, min(start + _MEASURE_CHUNK, len(conversations)))]

    def count_one(index: int) -> tuple[int, int]:
        messages = conversations[index]
        with conversations.naming(index):
            if not any(message.get("role") == "assistant" for message in messages):
                raise ValueError("there is no assistant turn to learn from")
            return count(messages)

    starts = range(0, len(conversations), _MEASURE_CHUNK)
    with ThreadPoolExecutor(threads) as pool:
        console = Console()
        chunks = track(
            pool.map(sizes, starts),
            "Measuring examples",
            total=len(starts),
            console=console,
            disable=not console.is_terminal,
        )
        return np.array([size for chunk in chunks for size in chunk], np.int64)


_MEASURE_CHUNK = 64


def assign(sizes: np.ndarray, buckets: Sequence[Bucket], *, least: int) -> list[np.ndarray]:
    """Indices of the examples that go into each bucket: the first in `buckets` that holds them.

    A bucket with fewer than `least` examples could not fill a batch: its examples go on to the next one that holds them.
    """
    members, waiting = [], np.arange(len(sizes))
    for place, bucket in enumerate(buckets):
        fits = (sizes[waiting, 0] <= bucket.tokens) & (sizes[waiting, 1] <= bucket.patches)
        later = any(b.tokens >= bucket.tokens and b.patches >= bucket.patches for b in buckets[place + 1 :])
        if later and fits.sum() < least:
            fits[:] = False
        members.append(waiting[fits])
        waiting = waiting[~fits]
    return members


def _interleave(parts: Sequence[grain.MapDataset], seed: int) -> grain.MapDataset:
    """All batches of all buckets: each bucket's in their order, the buckets in a random order that all hosts share."""
    lengths = [len(part) for part in parts]
    bucket_of_step = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(parts)), lengths))
    place = np.empty(len(bucket_of_step), np.int64)
    for bucket, length in enumerate(lengths):
        place[bucket_of_step == bucket] = np.arange(length)
    return grain.MapDataset.range(len(place)).map(lambda step: parts[bucket_of_step[step]][int(place[step])])


def _describe_too_long(conversations: Conversations, sizes: np.ndarray, members: list[np.ndarray], count: int) -> str:
    first = int(np.setdiff1d(np.arange(len(sizes)), np.concatenate(members))[0])
    tokens, patches = sizes[first]
    return (
        f"{count} examples fit no bucket, the first is {conversations.where(first)} with {tokens} tokens and {patches} "
        "patches: add a larger bucket to data.buckets or set data.too_long to drop"
    )
