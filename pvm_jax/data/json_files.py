"""Conversations in JSON files."""

import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from pvm_jax.data.stored import Conversations


class JsonLines(Conversations):
    """A JSONL file, whose blank lines count for nothing. Memory holds the byte offsets of its
    lines."""

    def __init__(self, path: Path):
        """Scans `path` once for line ends. Raises ValueError if all lines are blank."""
        self.path = path
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty")
        self._file = os.open(path, os.O_RDONLY)
        ends, lines = [0], []
        with mmap.mmap(self._file, 0, access=mmap.ACCESS_READ) as content:
            while (start := ends[-1]) < len(content):
                end = content.find(b"\n", start) + 1 or len(content)
                if not content[start:end].isspace():
                    lines.append(len(ends) - 1)
                ends.append(end)
        if not lines:
            raise ValueError(f"{path} is empty")
        self._ends, self._lines = np.array(ends, np.int64), np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index] + 1}"

    def _record(self, index: int) -> Any:
        line = self._lines[index]
        start, end = self._ends[line : line + 2].tolist()
        return json.loads(os.pread(self._file, end - start, start))
