"""Sources of conversations -> batches of few static shapes, in an order that the seed alone
decides.

`pvm_jax.data.conversations` reads the sources, `train.data.packing` lays the examples out in rows.
Loss falls on assistant turns. An example is never truncated: it goes into a row that holds all of
it, or nowhere.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch, hide_images
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.example import Example
from pvm_jax.data.processor import Processor
from pvm_jax.data.stored import Conversations
from train.config import Bucket, DataConfig, ExamplesConfig, HideSchedule, Source
from train.data.packing import (
    Plan,
    bucket_of_examples,
    make_plan,
    padding,
    padding_of_single_examples,
)
from train.data.sizes import NO_VIDEOS, cached, measured_here, sizes_of


@dataclass(frozen=True)
class PlannedExamples:
    """Which examples each step of a run reads.

    Attributes:
        plan: the examples of every row, as places in the sources one after the other.
        sizes: (tokens, patches) of all examples, [N, 2] int32, by which the plan was made.
        buckets: the plan's, smallest first.
        sources: the opened sources.
        videos: whether examples may show videos.
        report: what became of the examples, for the log.
    """

    plan: Plan
    sizes: np.ndarray
    buckets: Sequence[Bucket]
    sources: Sequence[Conversations]
    videos: bool
    report: str

    def examples(self, step: int) -> list[list[str]]:
        """File and place of the examples in each row of the whole batch of `step`, whatever part of
        it this host reads."""
        return [[_where(self.sources, example) for example in row] for row in self.plan.rows(step)]

    def check(self, number: int, example: Example) -> Example:
        """Example `number` as it was read; ValueError if that is not what was measured, or shows a
        video that no batch has room for."""
        found, measured = (len(example.input_ids), example.num_patches), self.sizes[number].tolist()
        if list(found) != measured:
            raise ValueError(
                f"{_where(self.sources, number)} has {found[0]} tokens and {found[1]} patches, and"
                f" had {measured[0]} and {measured[1]} when it was measured: its record or its"
                " images have changed. Put back what was there, or set data.measure_anew to true"
            )
        if example.pixel_values_videos is not None and not self.videos:
            raise ValueError(f"{_where(self.sources, number)}: {NO_VIDEOS}")
        return example


@dataclass(frozen=True)
class TrainingData(PlannedExamples):
    """The batches of a run.

    Attributes:
        batches: element i is this host's rows of step i's batch, NumPy leaves.
    """

    batches: grain.MapDataset[Batch]

    def iterator(self, start: int, threads: int, prefetch: int) -> Iterator[Batch]:
        """The batches from step `start` on, read ahead in `threads` threads."""
        return read_ahead(self.batches, start, threads, prefetch)


def read_ahead(
    steps: grain.MapDataset[Any], start: int, threads: int, prefetch: int
) -> Iterator[Any]:
    """What `steps` holds from step `start` on, read ahead in `threads` threads."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(steps[start:].to_iter_dataset(options))


def load_training_data(
    data: DataConfig,
    processor: Processor,
    model_config: ModelConfig,
    *,
    batch_size: int,
    epochs: int = 1,
    max_steps: int | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    sources: Sequence[Conversations] | None = None,
    sizes_file: Path | None = None,
    fill_last: bool = False,
) -> TrainingData:
    """Measures every example, sorts them into rows and lays out all batches of the run.

    Every host gets the same shape at every step, and the order does not depend on how many hosts
    there are.

    Args:
        batch_size: rows of a batch, over all hosts.
        epochs: passes over the data.
        max_steps: how many steps are kept.
        seed: of the order.
        rows: those of a batch that this host reads (None: all).
        sources: those of `data`, where they are open.
        sizes_file: keeps the measured sizes for the next start on the same data (an .npy file).
        fill_last: the last batch of each bucket is filled with rows that are all padding, so that
            no example is left over.

    Raises:
        FileNotFoundError, ValueError: for a bad source or record (named), for an example that no
            bucket holds with `too_long` "error", or if no bucket can fill a batch.
        OSError: if `sizes_file` cannot be written.
    """
    sources = open_sources(data) if sources is None else sources
    planned = plan_examples(
        data,
        sources,
        lambda: np.concatenate(
            [sizes_of(source, processor, data.threads, videos=data.videos) for source in sources]
        ),
        batch_size=batch_size,
        packing=data.packing,
        epochs=epochs,
        max_steps=max_steps,
        seed=seed,
        sizes_file=sizes_file,
        fill_last=fill_last,
    )
    mine = range(batch_size) if rows is None else rows
    read = partial(_read, planned, processor, model_config, data, rows=mine)
    report = planned.report + _hidden(data, len(planned.plan)) + measured_here(sources, processor)
    batches = grain.MapDataset.range(len(planned.plan)).map(read)
    return TrainingData(**vars(replace(planned, report=report)), batches=batches)


def open_sources(data: ExamplesConfig, *, every_column: bool = False) -> list[Conversations]:
    """The sources of `data`, opened as `open_conversations` does and raises."""
    return [open_conversations(one.path, every_column=every_column) for one in data.mixture]


def _read(
    planned: PlannedExamples,
    processor: Processor,
    model_config: ModelConfig,
    data: DataConfig,
    step: int,
    *,
    rows: Sequence[int],
) -> Batch:
    """These rows of a step's batch; of the whole batch's, the step's share have their images
    hidden."""
    bucket = planned.buckets[planned.plan.bucket(step)]
    members = planned.plan.rows(step)
    examples = [
        [
            planned.check(example, _encode(planned.sources, processor, example))
            for example in members[row]
        ]
        for row in rows
    ]
    batch = Batch.from_rows(
        examples,
        model_config,
        length=bucket.tokens,
        patches=bucket.patches,
        videos=planned.videos,
    )
    share = data.hidden_share(step, len(planned.plan))
    return hide_images(batch, [_is_hidden(row, share) for row in rows])


def plan_examples(
    data: ExamplesConfig,
    sources: Sequence[Conversations],
    measure_all: Callable[[], np.ndarray],
    *,
    batch_size: int,
    packing: bool,
    epochs: int = 1,
    max_steps: int | None = None,
    seed: int = 0,
    sizes_file: Path | None = None,
    fill_last: bool = False,
) -> PlannedExamples:
    """The plan of `load_training_data`, by its arguments; `measure_all` gives (tokens, patches) of
    all examples, [N, 2]."""
    sizes = cached(sizes_file, measure_all)
    buckets = sorted(data.buckets, key=lambda bucket: (bucket.tokens, bucket.patches))
    too_long = np.flatnonzero(bucket_of_examples(sizes, buckets) < 0)
    if len(too_long) and data.too_long == "error":
        tokens, patches = sizes[too_long[0]]
        raise ValueError(
            f"{len(too_long)} examples fit no bucket, the first is {_where(sources, too_long[0])}"
            f" with {tokens} tokens and {patches} patches: add a larger bucket to data.buckets or"
            " set data.too_long to drop"
        )
    plan, epochs = _plan_of_steps(
        lambda epoch: epoch_readings(data.mixture, list(map(len, sources)), seed, epoch),
        lambda readings: make_plan(
            sizes,
            readings,
            buckets,
            batch_size=batch_size,
            packing=packing,
            seed=seed,
            max_steps=max_steps,
            fill_last=fill_last,
        ),
        epochs if len(too_long) < len(sizes) else 1,
        max_steps,
    )
    if not len(plan):
        raise ValueError(
            f"{', '.join(source.path for source in data.mixture)}: no bucket has the {batch_size}"
            f" rows of one batch; {len(too_long)} of {len(sizes)} examples are too long. Make the"
            f" batch smaller, or change data.buckets{' or data.packing' if packing else ''}"
        )
    report = _report(plan, sizes, buckets, epochs, too_long)
    return PlannedExamples(plan, sizes, buckets, sources, data.videos, report)


def _plan_of_steps(
    read: Callable[[int], np.ndarray],
    lay_out: Callable[[Sequence[np.ndarray]], Plan],
    epochs: int,
    max_steps: int | None,
) -> tuple[Plan, int]:
    """The plan of `epochs`, or of as many of them as `max_steps` take, and their number."""
    if max_steps is None:
        return lay_out([read(epoch) for epoch in range(epochs)]), epochs
    readings = [read(0)]
    plan = lay_out(readings)
    while len(plan) < max_steps and len(readings) < epochs:
        likely = math.ceil(len(readings) * max_steps / max(len(plan), 0.5))
        more = min(epochs, max(len(readings) + 1, likely))
        readings += [read(epoch) for epoch in range(len(readings), more)]
        plan = lay_out(readings)
    return plan, len(readings)


def _is_hidden(row: int, share: float) -> bool:
    """Whether a row of the whole batch is one of those whose images are hidden: they are spread
    evenly."""
    return int((row + 1) * share) > int(row * share)


def epoch_readings(
    mixture: Sequence[Source], lengths: Sequence[int], seed: int, epoch: int
) -> np.ndarray:
    """The examples that an epoch reads, shuffled: [readings] int32, places in the sources one after
    the other.

    Args:
        lengths: examples of each source.

    Raises:
        ValueError: for a weight by which an epoch reads nothing of its source.
    """
    rng, first, readings = np.random.default_rng((seed, epoch)), 0, []
    for source, length in zip(mixture, lengths, strict=True):
        whole = int(source.weight)
        part = round((source.weight - whole) * length)
        if not whole and not part:
            raise ValueError(
                f"data.sources: weight {source.weight} of the {length} examples of {source.path} is"
                " none"
            )
        readings += [
            np.tile(np.arange(length), whole) + first,
            rng.permutation(length)[:part] + first,
        ]
        first += length
    return rng.permutation(np.concatenate(readings)).astype(np.int32)


def _encode(sources: Sequence[Conversations], processor: Processor, example: int) -> Example:
    source, index = place_of(sources, example)
    messages = source[index]
    with source.naming(index):
        return processor.encode(messages)


def _where(sources: Sequence[Conversations], example: int) -> str:
    source, index = place_of(sources, example)
    return source.where(index)


def place_of(sources: Sequence[Conversations], example: int) -> tuple[Conversations, int]:
    """The source that holds an example, and its place there."""
    for source in sources:
        if example < len(source):
            return source, int(example)
        example -= len(source)
    raise IndexError(f"the sources hold no example {example} more")


def _hidden(data: DataConfig, steps: int) -> str:
    """For the log: which share of the rows has its images hidden, where that changes."""
    if not isinstance(data.hide_images, HideSchedule):
        return ""
    first, last = (data.hidden_share(step, steps) for step in (0, steps - 1))
    return (
        f". The decoder sees no image in {first:.0%} of the rows before step"
        f" {data.hide_images.step(steps):,}, in {last:.0%} from there on"
    )


def _report(
    plan: Plan, sizes: np.ndarray, buckets: Sequence[Bucket], epochs: int, too_long: np.ndarray
) -> str:
    rows = len(plan.row_starts) - 1
    now, single = padding(plan, sizes, buckets), padding_of_single_examples(sizes, buckets)
    held = np.delete(sizes, too_long, axis=0).sum(0)
    times = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    return (
        f"{len(sizes):,} examples, {times}, {len(plan):,} steps of {plan.batch_size} rows"
        f" with {len(plan.examples) / rows:.1f} examples each. Padding: {now.tokens:.1%} of tokens,"
        f" {now.patches:.1%} of patches ({single.tokens:.1%}, {single.patches:.1%} with one example"
        f" a row); the data have {held[1] / held[0]:.2f} patches a token. {len(too_long):,}"
        f" examples are too long for every bucket, {plan.left_over:,} readings fill no batch"
    )
