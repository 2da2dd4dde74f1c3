"""What a conversion of data says at its end."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

_HISTOGRAM_WIDTH = 40
_REASONS = 5
_PARTICULARS = re.compile(r"""'[^']*'|"[^"]*"|\S*/\S*|\d+(?:\.\d+)?|\[[^\]]*\]""")
"""What differs from one reject to the next of the same kind: names, paths, numbers."""


class Checked(NamedTuple):
    """An example that can be trained on: its record for the shards, (tokens, patches) where
    measured, its images, and whether it shows a video."""

    record: bytes
    size: tuple[int, int]
    images: int
    video: bool


@dataclass
class Summary:
    """What was written."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    images: int = 0
    videos: bool = False
    bytes: int = 0
    rejected: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    first_of_kind: dict[str, str] = field(default_factory=dict)

    def add(self, checked: Checked) -> None:
        """Counts an example."""
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
