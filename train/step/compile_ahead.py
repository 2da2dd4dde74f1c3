"""Ahead of time: compiles a jitted function for devices that are not here, and says what it would
take of each."""

import importlib.util
import os
import re
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# What the TPU compiler says of a program that does not fit: either of two sentences.
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES = re.compile(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")


@dataclass(frozen=True)
class Compiled:
    """What a program takes of each device.

    Attributes:
        total: bytes at once: arguments, results that do not replace them, and temporaries.
        seconds: that the compilation took.
        temporaries: of these, what lives within it; 0 where it did not compile.
        refusal: what the compiler said where the program does not fit; None where it compiled.
        results: the shardings of what it returns, where it compiled.
        text: the compiled program as the compiler writes it, where it compiled.
    """

    total: int
    seconds: float
    temporaries: int = 0
    refusal: str | None = None
    results: Any = None
    text: str | None = field(default=None, repr=False)


def tpu_devices(topology: str) -> list[Any]:
    """The chips of a TPU slice, by generation and shape ("v5e:4x4"), to compile for. No TPU is
    looked for, none is used.

    To be called before anything asks JAX for a device.

    Raises:
        ModuleNotFoundError: if libtpu, the compiler, is not installed.
        ValueError: if there is no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"compiling for {topology} needs libtpu, the TPU's compiler, and no TPU: pip install"
            f" 'jax[tpu]=={jax.__version__}'"
        )
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology {topology!r}: libtpu knows none (v5e:4x4, v5p:2x2x1, v6e:2x4 are some):"
            f" {error}"
        ) from None


def gpu_devices(count: int) -> list[Any]:
    """`count` GPUs of this machine's kind, to compile for; those beyond the ones that are here as
    further hosts like this.

    Raises:
        RuntimeError: if there is no GPU here: XLA compiles for one by asking it.
        ValueError: if `count` is more than there are here and no multiple of them.
    """
    try:
        here = jax.devices("gpu")
    except RuntimeError as error:
        raise RuntimeError(
            "devices: JAX sees no GPU here, and XLA compiles for GPUs by asking one of their kind:"
            " run this on a machine with at least one, with pip install"
            f" 'jax[cuda13]=={jax.__version__}' (a TPU slice needs none: --topology)"
        ) from error
    if count <= len(here):
        return here[:count]
    if count % len(here):
        raise ValueError(
            f"devices: {count} are neither at most the {len(here)} of this machine nor a multiple"
            " of them"
        )
    topology = f"1x{count // len(here)}x{len(here)}"  # slices x hosts x GPUs of a host
    return list(
        topologies.get_topology_desc(platform=jax.default_backend(), topology=topology).devices
    )


def compile_ahead(function: Any, *args: Any, mesh: Mesh, **static: Any) -> Compiled:
    """Compiles the jitted `function` for ShapeDtypeStructs `args` whose shardings lie on `mesh`.
    Nothing runs.

    Args:
        static: its static arguments.
    """
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        try:
            program = function.lower(*args, **static).compile()
        except jax.errors.JaxRuntimeError as error:
            if (total := refused_bytes(str(error), device_bytes(args))) is None:
                raise
            return Compiled(total, time.perf_counter() - start, refusal=str(error))
    sizes = program.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    total = sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes
    return Compiled(
        total,
        time.perf_counter() - start,
        temporaries=sizes.temp_size_in_bytes,
        results=program.output_shardings,
        text=program.as_text(),
    )


def refused_bytes(message: str, arguments: int) -> int | None:
    """Bytes that the compiler asked for in vain; None if `message` is of another failure."""
    if match := _USED.search(message):
        return _bytes(match[1], match[2])
    if match := _TEMPORARIES.search(message):
        return arguments + _bytes(match[1], match[2])
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def usable_bytes(mesh: Mesh) -> int:
    """Bytes of one of the mesh's devices, TPU or GPU, that programs may take."""
    if mesh.devices.flat[0].platform == "gpu":
        return jax.local_devices()[0].memory_stats()["bytes_limit"]
    # The compiler knows, and says so when it is asked for what no chip has.
    everywhere = NamedSharding(mesh, PartitionSpec())
    impossible = jax.ShapeDtypeStruct((2**40,), jnp.bfloat16, sharding=everywhere)
    try:
        jax.jit(lambda x: 2 * x, out_shardings=everywhere).lower(impossible).compile()
    except jax.errors.JaxRuntimeError as error:
        if match := _USED.search(str(error)) or _TEMPORARIES.search(str(error)):
            return _bytes(match[3], match[4])
        raise
    raise AssertionError("a program of terabytes compiled")


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of ShapeDtypeStructs with their shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)
