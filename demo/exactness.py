"""The reward of `make demo-grpo`: how much of the inventory that a model wrote is right."""

from collections.abc import Mapping
from typing import Any


def exactness(completion: str, example: Mapping[str, Any]) -> float:
    """The fraction of right lines: those whose value is the scene's, each cell and attribute once,
    over the lines that were written or, if these are fewer, over those of the solution. Neither
    silence nor guessing on pays.

    Args:
        completion: lines `cell attribute value`; what follows the last line break counts as a line
            too.
        example: its `solution` lists every cell and attribute of the scene.
    """
    solution = set(example["solution"].splitlines())
    lines = completion.splitlines()
    return len(solution & set(lines)) / max(len(solution), len(lines))
