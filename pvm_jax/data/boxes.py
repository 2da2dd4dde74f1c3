"""What is marked in a picture: boxes -> visual tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pvm_jax.files.json_file import is_number

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels of the picture as it is stored."""


def read_boxes(value: Any) -> list[Box]:
    """The boxes under an image part's `boxes`. Raises ValueError for what is none."""
    if not isinstance(value, list | tuple | np.ndarray):
        raise ValueError(f"boxes must be a list of [x0, y0, x1, y1], got {value!r:.80}")
    found = []
    for box in value:
        numbers = box if isinstance(box, list | tuple | np.ndarray) else ()
        if len(numbers) != 4 or not all(map(is_number, numbers)):
            raise ValueError(f"boxes: a box is [x0, y0, x1, y1] in pixels, got {box!r:.80}")
        x0, y0, x1, y1 = map(float, numbers)
        if not (0 <= x0 < x1 and 0 <= y0 < y1):
            raise ValueError(f"boxes: needs 0 <= x0 < x1 and 0 <= y0 < y1, got {[x0, y0, x1, y1]}")
        found.append((x0, y0, x1, y1))
    return found


def touched(boxes: Sequence[Box], width: int, height: int, rows: int, columns: int) -> np.ndarray:
    """[rows * columns] bool: the visual tokens of a picture of this size that a box touches.

    Raises:
        ValueError: for a box that reaches beyond the picture.
    """
    marks = np.zeros((rows, columns), bool)
    for x0, y0, x1, y1 in boxes:
        if x1 > width or y1 > height:
            raise ValueError(
                f"boxes: {[x0, y0, x1, y1]} reaches beyond the picture of {width} x {height} pixels"
            )
        across = slice(int(x0 / width * columns), int(np.ceil(x1 / width * columns)))
        marks[int(y0 / height * rows) : int(np.ceil(y1 / height * rows)), across] = True
    return marks.reshape(-1)
