"""A short name of values: what a branch or an adapter that is stored alone was made for, and what a
run's step held.

It is written beside these, and compared, in store.py and in train/run/checkpoints.py.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pvm_jax.model.parameters import by_path, part_of

_LARGE = 2**24
"""Numbers of an array whose terms are not to be in memory all at once."""

SMALL = 2**20
"""Numbers up to which NumPy sums an array sooner than a program for its shape is compiled."""


def backbone_identity(params: Any) -> str:
    """A short hexadecimal name of all parameters outside the branch and the adapters.

    It depends on their bfloat16 values alone: not on the sharding, nor on whether they are held in
    float32 or bfloat16.

    Args:
        params: the parameter tree (`nnx.state(model)`, pure or not, or nested dicts).
    """
    backbone = _part(params, "backbone")
    return identity(backbone, _checksums(backbone))


def branch_identity(params: Any) -> str | None:
    """The same of the branch; None where there is none, or where it is silent (every gate 0)."""
    branch = _part(params, "branch")
    if not any(np.any(leaf) for path, leaf in branch.items() if path.endswith("/gate_alpha")):
        return None
    return identity(branch, _checksums(branch))


def lora_identity(params: Any) -> str | None:
    """The same of the LoRA adapters; None where there are none."""
    adapters = _part(params, "lora")
    return identity(adapters, _checksums(adapters)) if adapters else None


def exact_identity(tree: Any) -> str:
    """The same of all bits of a pytree of arrays, in their own dtypes: one that is flipped is
    always noticed."""
    arrays = by_path(tree)
    return identity(arrays, {path: _exact_checksum(array) for path, array in arrays.items()})


def identity(arrays: Mapping[str, Any], checksums: Mapping[str, Any]) -> str:
    """The name of arrays of these paths and shapes; `checksums` has the `checksum_part` of each,
    from index 0."""
    lines = [
        f"{path} {tuple(array.shape)} {int(checksums[path]):08x}"
        for path, array in sorted(arrays.items())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _part(params: Any, name: str) -> dict[str, Any]:
    """The arrays of `part_of` that name, by path."""
    return {path: leaf for path, leaf in by_path(params).items() if part_of(path) == name}


def _checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    found = {path: checksum_part(array, 0) for path, array in arrays.items() if _is_small(array)}
    large = {path: array for path, array in arrays.items() if path not in found}
    return found | {path: int(value) for path, value in (_sum_all(large) if large else {}).items()}


def _exact_checksum(array: Any) -> int:
    # Each is waited for: on a busy CPU, many programs that sum over devices block each other.
    return _sum_here(np.asarray(array)) if _is_small(array) else int(_sum_exactly(array))


def _is_small(array: Any) -> bool:
    """Small, and all of it is in this process."""
    here = not isinstance(array, jax.Array) or (
        array.is_fully_addressable or array.is_fully_replicated
    )
    return here and array.size <= SMALL


def _sum_here(array: np.ndarray, start: int = 0) -> int:
    """`_weighted_sum` of all bits of `array`."""
    bits = array.reshape(-1).view(f"uint{8 * array.dtype.itemsize}").astype(np.uint32)
    index = np.arange(bits.size, dtype=np.uint32) + np.uint32(start % 2**32)
    return int(np.sum(bits * (2 * index + 1), dtype=np.uint32))


@jax.jit
def _sum_all(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """One program sums one tensor after the other: on CPUs, where a sum needs its terms in memory,
    it takes the largest's."""
    return {path: _checksum(array, _sum_part) for path, array in arrays.items()}


@jax.jit
def _sum_exactly(x: jax.Array) -> jax.Array:
    return _checksum(x, lambda part, start: _weighted_sum(_bits(part), start))


def _checksum(x: jax.Array, of_part: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """`of_part` of the whole of x; of a large stack, a layer at a time."""
    if x.ndim < 3 or x.size < _LARGE:
        return of_part(x, jnp.uint32(0))
    starts = jnp.arange(len(x), dtype=jnp.uint32) * jnp.uint32(math.prod(x.shape[1:]))
    return jnp.sum(jax.lax.map(lambda args: of_part(*args), (x, starts)), dtype=jnp.uint32)


def checksum_part(part: Any, start: int) -> int:
    """The sum over `part` of its bfloat16 bits times (2 * flat index + 1), modulo 2^32; its first
    index is `start`.

    The checksums of an array's parts add up to the array's.
    """
    if not _is_small(part):
        return int(_sum_part(part, np.uint32(start % 2**32)))
    with np.errstate(invalid="ignore"):  # NaN is NaN in bfloat16 too
        return _sum_here(np.asarray(part, jnp.bfloat16), start)


@jax.jit
def _sum_part(part: jax.Array, start: jax.Array) -> jax.Array:
    return _weighted_sum(_bits(part.astype(jnp.bfloat16)), start)


def _weighted_sum(bits: jax.Array, start: jax.Array) -> jax.Array:
    """The weights are odd: no bit's change is a multiple of 2^32."""
    index = jnp.broadcast_to(start, bits.shape)
    for axis in range(bits.ndim):
        stride = jnp.uint32(math.prod(bits.shape[axis + 1 :]))
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of x, which has at most 32 of them a number, as uint32."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
