"""Means over conversations and their 95% intervals, in buckets of a token's position."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Estimate(NamedTuple):
    """A mean and its 95% interval; NaN where nothing was measured, an interval of NaN for a single
    conversation."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: np.ndarray, resamples: int = RESAMPLES) -> Estimate:
    """Mean of `values` [conversations, ...] over conversations, NaN left out, and its bootstrap
    interval.

    Conversations are resampled, not tokens: what is said about one image is not independent.
    """
    flat = np.asarray(values, float).reshape(len(values), -1)
    counts = np.isfinite(flat).sum(1)
    sums = np.where(np.isfinite(flat), flat, 0).sum(1)[counts > 0]
    counts = counts[counts > 0]
    if not len(counts):
        return Estimate(np.nan, np.nan, np.nan)
    mean = float(sums.sum() / counts.sum())
    if len(counts) == 1:
        return Estimate(mean, np.nan, np.nan)
    drawn = np.random.default_rng(0).integers(0, len(counts), (resamples, len(counts)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return Estimate(mean, float(low), float(high))


class PositionBucket(NamedTuple):
    """Tokens `first` to `last` of an answer, counted from 1."""

    first: int
    last: int

    @property
    def middle(self) -> float:
        """On a logarithmic axis."""
        return float(np.sqrt(self.first * self.last))

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first:,} to {self.last:,}"

    def of(self, values: np.ndarray) -> np.ndarray:
        """The bucket's part of `values` [..., answer]."""
        return values[..., self.first - 1 : self.last]


def doubling_buckets(longest: int, first: int = 8) -> list[PositionBucket]:
    """1 to `first`, then ranges that end at twice the last's end, up to `longest`; a short last one
    joins the one before."""
    ends = [min(first, longest)]
    while ends[-1] < longest:
        ends.append(min(2 * ends[-1], longest))
    if len(ends) > 1 and ends[-1] - ends[-2] < ends[-2] / 2:
        del ends[-2]
    return [PositionBucket(start + 1, end) for start, end in zip([0, *ends], ends, strict=False)]


def by_position(values: np.ndarray, buckets: Sequence[PositionBucket]) -> list[Estimate]:
    """Of `values` [conversations, answer] by answer token, an Estimate for each bucket of
    positions."""
    return [estimate(bucket.of(values)) for bucket in buckets]


def by_length(
    values: np.ndarray, lengths: np.ndarray, buckets: Sequence[PositionBucket]
) -> list[Estimate]:
    """Of `values` [conversations, answer], an Estimate for each bucket of the answers' `lengths`
    [conversations]."""
    chosen = [(lengths >= bucket.first) & (lengths <= bucket.last) for bucket in buckets]
    return [
        estimate(values[which]) if which.any() else Estimate(np.nan, np.nan, np.nan)
        for which in chosen
    ]
