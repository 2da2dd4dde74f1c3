"""Examples -> rows -> batches, decided before training by the measured sizes and the seed alone.

A plan knows every batch of a run, so that a run goes on at any step, and any number of hosts reads the same batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from train.config import Bucket

WINDOW = 1024
"""Examples among which the next one of a row is chosen."""


@dataclass(frozen=True)
class Plan:
    """Which examples stand in which row of which step.

    Attributes:
        batch_size: rows of a batch.
        batches: [steps] int32: the batch of each step.
        bucket_of_batch: [batches] int32.
        row_starts: [batches * batch_size + 1] int64: row r holds examples[row_starts[r] : row_starts[r + 1]].
        examples: [readings] int32.
        left_over: readings that fill no batch.
    """

    batch_size: int
    batches: np.ndarray
    bucket_of_batch: np.ndarray
    row_starts: np.ndarray
    examples: np.ndarray
    left_over: int

    def __len__(self) -> int:
        return len(self.batches)

    def bucket(self, step: int) -> int:
        """Which bucket the rows of `step` have the shape of."""
        return int(self.bucket_of_batch[self.batches[step]])

    def rows(self, step: int) -> list[list[int]]:
        """The examples in each row of `step`."""
        first = int(self.batches[step]) * self.batch_size
        starts = self.row_starts[first : first + self.batch_size + 1].tolist()
        return [self.examples[start:stop].tolist() for start, stop in pairwise(starts)]


def make_plan(
    sizes: np.ndarray,
    epochs: Sequence[np.ndarray],
    buckets: Sequence[Bucket],
    *,
    batch_size: int,
    packing: bool,
    seed: int,
    max_steps: int | None = None,
    fill_last: bool = False,
) -> Plan:
    """Lays the readings of all epochs out in rows and batches.

    An example goes to the first bucket that holds it. Rows that fill no batch of their bucket pass their examples on to the
    next bucket that holds them, or are left over (`fill_last`: rows that are all padding complete the batch). In each bucket
    an epoch's readings come before the next one's; the buckets' batches are mixed at random.

    Args:
        sizes: [N, 2], (tokens, patches) of each example.
        epochs: the examples that each epoch reads, in their order; what no bucket holds is skipped.
        buckets: smallest first.
        packing: several examples share a row.
        max_steps: how many steps are kept.
    """
    first_bucket = bucket_of_examples(sizes, buckets)
    waiting = np.empty(0, np.int32)
    bucket_of_batch, lengths, examples = [], [], []
    for number, bucket in enumerate(buckets):
        here = _fits(sizes[waiting], bucket)
        late, waiting = waiting[here], waiting[~here]
        rng = np.random.default_rng((seed, number))
        readings = [epoch[first_bucket[epoch] == number] for epoch in epochs]
        readings[-1] = np.concatenate([readings[-1], late])
        parts = [_rows(sizes, epoch, bucket, packing, rng) for epoch in readings]
        members, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        spare = len(counts) % batch_size
        if spare and fill_last:
            counts = np.pad(counts, (0, batch_size - spare))
        elif spare:
            counts, last = counts[:-spare], counts[-spare:]
            members, passed_on = np.split(members, [len(members) - last.sum()])
            waiting = np.concatenate([waiting, passed_on])
        bucket_of_batch.append(np.full(len(counts) // batch_size, number, np.int32))
        lengths.append(counts)
        examples.append(members)
    bucket_of_batch = np.concatenate(bucket_of_batch)
    order = np.random.default_rng(seed).permutation(bucket_of_batch)
    batches = np.empty(len(order), np.int32)
    batches[np.argsort(order, kind="stable")] = np.arange(len(order))
    return Plan(
        batch_size=batch_size,
        batches=batches[:max_steps],
        bucket_of_batch=bucket_of_batch,
        row_starts=np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)]),
        examples=np.concatenate(examples),
        left_over=len(waiting),
    )


def bucket_of_examples(sizes: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """[N] int32: the first bucket that holds each example of `sizes` [N, 2]; -1: none does."""
    result = np.full(len(sizes), -1, np.int32)
    for number, bucket in enumerate(buckets):
        result[(result < 0) & _fits(sizes, bucket)] = number
    return result


class Padding(NamedTuple):
    """Shares of all positions that hold nothing."""

    tokens: float
    patches: float


def padding(plan: Plan, sizes: np.ndarray, buckets: Sequence[Bucket]) -> Padding:
    """Of the plan's batches, over all its steps."""
    used = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(sizes[plan.examples], 0, dtype=np.int64)])
    of_batch = np.diff(used[plan.row_starts[:: plan.batch_size]], axis=0)
    room = plan.batch_size * _shapes(buckets)[plan.bucket_of_batch]
    return _share(of_batch[plan.batches].sum(0), room[plan.batches].sum(0))


def padding_of_single_examples(sizes: np.ndarray, buckets: Sequence[Bucket]) -> Padding:
    """If every example that a bucket holds stood in a row of its own."""
    bucket = bucket_of_examples(sizes, buckets)
    held = bucket >= 0
    return _share(sizes[held].sum(0), _shapes(buckets)[bucket[held]].sum(0))


def _share(used: np.ndarray, room: np.ndarray) -> Padding:
    return Padding(*(1 - used / np.maximum(room, 1)).tolist())


def _shapes(buckets: Sequence[Bucket]) -> np.ndarray:
    return np.array([(bucket.tokens, bucket.patches) for bucket in buckets], np.int64)


def _fits(sizes: np.ndarray, bucket: Bucket) -> np.ndarray:
    return (sizes[:, 0] <= bucket.tokens) & (sizes[:, 1] <= bucket.patches)


def _rows(
    sizes: np.ndarray, readings: np.ndarray, bucket: Bucket, packing: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `readings` in random order: their examples [readings] int32, and how many each row has [rows] int64."""
    if not packing or not len(readings):
        return readings, np.ones(len(readings), np.int64)
    rows = pack(sizes[readings], bucket)
    rows = [rows[place] for place in rng.permutation(len(rows))]
    return readings[np.concatenate(rows)], np.array([len(row) for row in rows], np.int64)


def pack(sizes: np.ndarray, bucket: Bucket) -> list[np.ndarray]:
    """Rows of `bucket` that hold examples of `sizes` [N, 2], each example once; every one must fit a row.

    A row begins with the example that has waited longest. As long as one of the next `WINDOW` examples fits, it takes the one
    that leaves least of it, tokens and patches weighed as shares of the row (norm-based greedy: Panigrahy, Talwar, Uyeda and
    Wieder, "Heuristics for Vector Bin Packing", 2011).
    """
    room = np.array([bucket.tokens, bucket.patches], np.int64)
    weight = 1 / np.maximum(room, 1)
    window = np.arange(min(WINDOW, len(sizes)))
    open_sizes = sizes[window].astype(np.int64)
    following = len(window)
    rows = []
    while len(window):
        row, free, slot = [], room, int(np.argmin(window))
        while True:
            row.append(window[slot])
            free = free - open_sizes[slot]
            if following < len(sizes):
                window[slot], open_sizes[slot] = following, sizes[following]
                following += 1
            else:
                window, open_sizes = np.delete(window, slot), np.delete(open_sizes, slot, axis=0)
            left = free - open_sizes
            fits = (left >= 0).all(1)
            if not fits.any():
                break
            slot = int(np.argmin(np.where(fits, np.square(left * weight).sum(1), np.inf)))
        rows.append(np.array(row))
    return rows
