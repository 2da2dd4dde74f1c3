"""Examples -> rows -> batches, decided before training by the measured sizes and the seed alone.

A plan knows every batch of a run, so that a run goes on at any step, and any number of hosts reads
the same batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from train.config import Bucket

WINDOW = 512
"""Examples among which the next one of a row is chosen."""


@dataclass(frozen=True)
class Plan:
    """Which examples stand in which row of which step.

    Attributes:
        batch_size: rows of a batch.
        batches: [steps] int32: the batch of each step.
        bucket_of_batch: [batches] int32.
        row_starts: [batches * batch_size + 1] int64: row r holds examples[row_starts[r] :
            row_starts[r + 1]].
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

    An example belongs to the first bucket that holds it. The largest bucket comes first: with
    `packing` its rows begin with its own examples and are filled up with those of smaller buckets
    too. Its last batch is completed by rows of smaller buckets' examples (`fill_last`: by rows that
    are all padding); where these are too few, the rows in it are given up. In each bucket an
    epoch's readings come before the next one's; the buckets' batches are mixed at random.

    Args:
        sizes: [N, 2], (tokens, patches) of each example.
        epochs: the examples that each epoch reads, in their order; what no bucket holds is skipped.
        buckets: smallest first.
        packing: several examples share a row.
        max_steps: how many steps are kept.
    """
    owner = bucket_of_examples(sizes, buckets)
    waiting = [readings[owner[readings] >= 0] for readings in epochs]
    left_over, laid_out = 0, []
    for number in reversed(range(len(buckets))):
        layout = _Layout(sizes, buckets[number], packing, np.random.default_rng((seed, number)))
        rows = _NO_ROWS
        for epoch, readings in enumerate(waiting):
            more, placed = layout.rows(readings, np.flatnonzero(owner[readings] == number))
            rows, waiting[epoch] = rows.followed_by(more), readings[~placed]
        spare = len(rows.counts) % batch_size
        if spare and fill_last:
            rows = _Rows(rows.examples, np.pad(rows.counts, (0, batch_size - spare)))
        elif spare:
            largest_first = np.argsort(-owner[waiting[-1]], kind="stable")
            more, placed = layout.rows(waiting[-1], largest_first, batch_size - spare)
            if len(more.counts) == batch_size - spare:
                rows, waiting[-1] = rows.followed_by(more), waiting[-1][~placed]
            else:
                rows, given_up = rows.without_last(spare)
                own = owner[given_up] == number
                left_over += int(own.sum())
                waiting[-1] = np.concatenate([waiting[-1], given_up[~own]])
        laid_out.insert(0, rows)
    counts = np.concatenate([rows.counts for rows in laid_out])
    batches = [len(rows.counts) // batch_size for rows in laid_out]
    bucket_of_batch = np.repeat(np.arange(len(buckets)), batches)
    return Plan(
        batch_size=batch_size,
        batches=_mixed(bucket_of_batch, seed)[:max_steps],
        bucket_of_batch=bucket_of_batch.astype(np.int32),
        row_starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        examples=np.concatenate([rows.examples for rows in laid_out]),
        left_over=left_over,
    )


def _mixed(bucket_of_batch: np.ndarray, seed: int) -> np.ndarray:
    """[steps] int32: the batches in an order that mixes the buckets and keeps each one's own."""
    order = np.random.default_rng(seed).permutation(bucket_of_batch)
    batches = np.empty(len(order), np.int32)
    batches[np.argsort(order, kind="stable")] = np.arange(len(order))
    return batches


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
    used = np.concatenate(
        [np.zeros((1, 2), np.int64), np.cumsum(sizes[plan.examples], 0, dtype=np.int64)]
    )
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


class _Rows(NamedTuple):
    """Rows one after the other: their examples [readings] int32, and how many of them each row has,
    [rows] int64."""

    examples: np.ndarray
    counts: np.ndarray

    def followed_by(self, more: "_Rows") -> "_Rows":
        return _Rows(*map(np.concatenate, zip(self, more, strict=True)))

    def without_last(self, count: int) -> tuple["_Rows", np.ndarray]:
        """All rows but the last `count`, and the examples in these."""
        kept, cut = np.split(self.counts, [len(self.counts) - count])
        examples, given_up = np.split(self.examples, [len(self.examples) - cut.sum()])
        return _Rows(examples, kept), given_up


_NO_ROWS = _Rows(np.empty(0, np.int32), np.empty(0, np.int64))


@dataclass(frozen=True)
class _Layout:
    """How the rows of one bucket are made."""

    sizes: np.ndarray
    bucket: Bucket
    packing: bool
    rng: np.random.Generator

    def rows(
        self, readings: np.ndarray, begin: np.ndarray, limit: int | None = None
    ) -> tuple[_Rows, np.ndarray]:
        """At most `limit` rows in random order, and which of `readings` are in them, [readings]
        bool.

        Rows begin with the `readings` at the places `begin`, all of them if the limit allows, and
        are filled up with any.
        """
        fits = _fits(self.sizes[readings], self.bucket)
        begin = begin[fits[begin]]
        if self.packing:
            fits[begin] = False
            places = np.concatenate([begin, np.flatnonzero(fits)])
            rows = pack(self.sizes[readings[places]], self.bucket, len(begin), limit)
            rows = [places[rows[row]] for row in self.rng.permutation(len(rows))]
            chosen = np.concatenate([np.empty(0, np.int64), *rows])
            counts = np.array([len(row) for row in rows], np.int64)
        else:
            chosen = begin[:limit]
            counts = np.ones(len(chosen), np.int64)
        placed = np.zeros(len(readings), bool)
        placed[chosen] = True
        return _Rows(readings[chosen], counts), placed


def pack(
    sizes: np.ndarray, bucket: Bucket, begin: int, limit: int | None = None
) -> list[list[int]]:
    """At most `limit` rows of `bucket`, each a list of examples of `sizes` [N, 2], every one of
    which must fit a row.

    Without a limit each of the first `begin` examples is in a row, and each row begins with one of
    these, the one that has waited longest. As long as one of the next `WINDOW` examples fits (of
    the first `begin`, and of the others), the row takes the one that leaves least of it, tokens and
    patches weighed as shares of the row (norm-based greedy: Panigrahy, Talwar, Uyeda and Wieder,
    "Heuristics for Vector Bin Packing", 2011).
    """
    # Two windows side by side; a slot whose stream has ended holds the number N, of an example that
    # fits nowhere.
    streams = iter(range(begin)), iter(range(begin, len(sizes)))
    window = np.array([next(stream, len(sizes)) for stream in streams for _ in range(WINDOW)])
    all_tokens, all_patches = np.concatenate([sizes.T, np.full((2, 1), np.inf)], axis=1)
    tokens, patches = all_tokens[window], all_patches[window]
    rows: list[list[int]] = []
    while len(rows) != limit:
        slot = int(np.argmin(window[:WINDOW]))
        if window[slot] >= begin:
            break
        row, free_tokens, free_patches = [], bucket.tokens, bucket.patches
        while True:
            row.append(int(window[slot]))
            free_tokens, free_patches = free_tokens - tokens[slot], free_patches - patches[slot]
            following = next(streams[slot >= WINDOW], len(sizes))
            window[slot], tokens[slot], patches[slot] = (
                following,
                all_tokens[following],
                all_patches[following],
            )
            left_tokens, left_patches = free_tokens - tokens, free_patches - patches
            waste = np.square(left_tokens / bucket.tokens) + np.square(
                left_patches / max(bucket.patches, 1)
            )
            waste[(left_tokens < 0) | (left_patches < 0)] = np.inf
            slot = int(np.argmin(waste))
            if waste[slot] == np.inf:
                break
        rows.append(row)
    return rows
