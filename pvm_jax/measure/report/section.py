"""What a measurement gives the report, and the curve that several of them draw."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pvm_jax.measure.intervals import PositionBucket, by_position
from pvm_jax.measure.report.figures import AttentionMap, Panel, Series


class AnswerSample(NamedTuple):
    """A conversation and what was written in it: its pictures, each [height, width, 3] in [0, 1],
    and texts."""

    pictures: Sequence[np.ndarray]
    prompt: str
    answers: Mapping[str, str]


class Section(NamedTuple):
    """One measurement in the report: `facts`, what came out, a sentence each; `rows`, a table, its
    header first; `samples`, what was written."""

    key: str
    title: str
    panels: Sequence[Panel | AttentionMap]
    facts: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: str = ""
    samples: Sequence[AnswerSample] = ()


def curve_by_position(name: str, values: np.ndarray, buckets: Sequence[PositionBucket]) -> Series:
    """The means of `values` [conversations, answer] over the answer's tokens; buckets in which
    nothing counts are left out."""
    points = [
        (b.middle, e)
        for b, e in zip(buckets, by_position(values, buckets), strict=True)
        if np.isfinite(e.mean)
    ]
    return Series(name, [x for x, _ in points], [e for _, e in points])
