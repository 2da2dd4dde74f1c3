"""An Orbax checkpoint's arrays, a block at a time: Orbax writes the tree's metadata, TensorStore
the contents.

Orbax itself saves whole arrays; a stack of 64 layers would have to be in memory.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import jax
import numpy as np
import tensorstore as ts
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from pvm_jax.checkpoint.arrays import (
    KEPT,
    STATE,
    in_database,
    location,
    new_array,
    new_context,
)
from pvm_jax.checkpoint.checksums import verify_checksums
from pvm_jax.checkpoint.identity import checksum_part, identity
from pvm_jax.checkpoint.store import PARAMS, explaining_damage, stored_arrays
from pvm_jax.files.paths import on_bucket
from pvm_jax.files.writing import copy_file

# A block fits the processor's cache, a chunk is one read from a disk, a commit is a file.
BLOCK_BYTES = 8 * 2**20
CHUNK_BYTES = 2**19
_COMMIT_BYTES = 128 * 2**20
_CACHE_BYTES = 256 * 2**20
_SPLITS = 16


def create(
    directory: Path, arrays: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, ts.TensorStore]:
    """A new checkpoint in `directory`, its arrays open for writing, by path; they are to be written
    in `blocks`."""
    _describe(directory / PARAMS, arrays)
    context = new_context()
    with ts.Transaction(atomic=True) as transaction:
        opened = {
            path: ts.open(
                location(directory / PARAMS / STATE, path, database=True) | _new(array),
                context=context,
                transaction=transaction,
            ).result()
            for path, array in arrays.items()
        }
    return {path: store.with_transaction(None) for path, store in opened.items()}


def _describe(target: Path, arrays: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Has Orbax write a checkpoint of placeholders at `target`: into a bucket by way of this
    machine, since it knows not every kind."""
    context = ocp.Context()
    # What these record would be the placeholders'.
    context.array.saving.array_metadata_store = None
    context.array.saving.enable_write_sharding_file = False
    placeholders = {path: np.zeros((), array.dtype) for path, array in arrays.items()}
    with TemporaryDirectory() as here:
        place = Path(here) / PARAMS if on_bucket(target) else target
        with context:
            ocp.save(str(place), traverse_util.unflatten_dict(placeholders, sep="/"))
        for file in place.rglob("*") if on_bucket(target) else ():
            if file.is_file():
                copy_file(file, target / file.relative_to(place).as_posix())


def open_arrays(directory: Path) -> dict[str, ts.TensorStore]:
    """The arrays of a checkpoint (`create`, `pvm_jax.save`), open for reading, by path.

    Raises:
        CheckpointError: if they cannot be opened, or are damaged.
    """
    context, place = new_context(_CACHE_BYTES), directory / PARAMS / STATE
    verify_checksums(directory)
    paths, database = stored_arrays(directory), in_database(place)
    with explaining_damage(directory):
        specs = {path: location(place, path, database=database) for path in paths}
        stores = {
            path: ts.open(spec | KEPT, context=context, read=True) for path, spec in specs.items()
        }
        return {path: store.result() for path, store in stores.items()}


def stored_identity(arrays: Mapping[str, ts.TensorStore]) -> str:
    """`pvm_jax.checkpoint.identity.identity` of stored arrays, read a block at a time."""
    return identity(arrays, {path: _checksum(array) for path, array in arrays.items()})


def _checksum(array: ts.TensorStore) -> int:
    strides, total = [prod(array.shape[axis + 1 :]) for axis in range(array.ndim)], 0
    for block in blocks(array.shape, array.dtype.numpy_dtype.itemsize):
        start = sum(part.start * stride for part, stride in zip(block, strides, strict=True))
        total += checksum_part(array[block].read().result(), start)
    return total % 2**32


class BlockWriter:
    """Writes in the background, many blocks to a commit, at most one commit on its way."""

    def __init__(self):
        self._transaction, self._bytes = ts.Transaction(atomic=True), 0
        self._committing: ts.Future | None = None

    def write(self, part: ts.TensorStore, content: np.ndarray) -> None:
        part.with_transaction(self._transaction).write(content).copy.result()
        self._bytes += content.nbytes
        if self._bytes >= _COMMIT_BYTES:
            self._commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._commit()
        self._wait()

    def _commit(self) -> None:
        self._wait()
        self._committing = self._transaction.commit_async()
        self._transaction, self._bytes = ts.Transaction(atomic=True), 0

    def _wait(self) -> None:
        if self._committing is not None:
            self._committing.result()


def blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Slices that tile an array in its own order: layers of a stack or rows of a layer, of about
    BLOCK_BYTES each."""
    steps = _block_shape(shape, itemsize)
    starts = [range(0, size, step) for size, step in zip(shape, steps, strict=True)]
    for corner in product(*starts):
        yield tuple(slice(a, min(a + b, n)) for a, b, n in zip(corner, steps, shape, strict=True))


def _new(array: jax.ShapeDtypeStruct) -> dict:
    chunk = _chunk_shape(array.shape, array.dtype.itemsize)
    return {"create": True, "delete_existing": True} | new_array(array.shape, array.dtype, chunk)


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """What one read takes: one layer, cut along rows and columns, so that 16 x 16 devices read no
    more than they need."""
    if prod(shape) * itemsize <= BLOCK_BYTES // 2 or len(shape) < 2:
        return shape
    chunk = [1] * (len(shape) - 2) + list(shape[-2:])
    while prod(chunk) * itemsize > CHUNK_BYTES:
        divisible = [a for a in (-2, -1) if chunk[a] % 2 == 0 and shape[a] // chunk[a] < _SPLITS]
        if not divisible:
            break
        chunk[max(divisible, key=lambda a: chunk[a])] //= 2
    return tuple(chunk)


def _block_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """As many leading indices as BLOCK_BYTES hold, in whole chunks. The last axis stays whole: a
    block's rows are contiguous in a file."""
    block, chunk = list(shape), _chunk_shape(shape, itemsize)
    for axis, size in enumerate(shape[:-1]):
        fits = BLOCK_BYTES // (prod(block[axis + 1 :]) * itemsize) // chunk[axis] * chunk[axis]
        block[axis] = min(size, max(fits, chunk[axis]))
        if fits:
            break
    return tuple(block)
