"""How near computed numbers must be to what they should be. `make isa` puts the errors seen beside
the bars."""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np

RECORD = "PVM_JAX_CLOSE_RECORD"
"""Environment variable: the file to which every comparison adds a line."""

_ROOT = Path(__file__).parents[1]


def assert_close(
    actual, expected, bar: float, *, scale: float | None = None, what: str = ""
) -> None:
    """Every array of `actual` differs from that of `expected` by less than `bar` of what is
    compared.

    Args:
        actual: an array, a number, or a tree of them.
        expected: a tree of the same structure, its arrays of the same shapes; NaN stands where
            `actual` has it.
        bar: the largest difference allowed, relative: ten times the largest error seen on any
            machine.
        scale: the size of what is compared; None takes the largest value of each expected array.
            Differences of terms that cancel need that of the terms.
        what: names it in the error.
    """
    caller = sys._getframe(1)
    place = f"{Path(caller.f_code.co_filename).relative_to(_ROOT)}:{caller.f_lineno}"
    leaves, structure = jax.tree.flatten_with_path(expected)
    assert jax.tree.structure(actual) == structure, f"{place}: another structure"
    for (path, want), got in zip(leaves, jax.tree.leaves(actual), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        assert got.shape == want.shape, (
            f"{what}{jax.tree_util.keystr(path)}: {got.shape} beside {want.shape}"
        )
        error = np.nanmax(np.abs(got - want), initial=0)
        size = scale or np.nanmax(np.abs(want), initial=0)
        error = error / size if size else error
        _record(place, float(error), bar)
        assert error < bar, (
            f"{what}{jax.tree_util.keystr(path)}: {error:.2e} of its size, bar {bar:.0e}"
        )


def _record(place: str, error: float, bar: float) -> None:
    if file := os.environ.get(RECORD):
        with open(file, "a") as lines:
            lines.write(json.dumps({"place": place, "error": error, "bar": bar}) + "\n")
