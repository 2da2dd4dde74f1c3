"""What XLA is told of a step beside its program."""

import os
import warnings
from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FAST_MEMORY = "xla_tpu_scoped_vmem_limit_kib"
"""libtpu's option: KiB of a chip's fast memory that one operation may take."""

LIMITS = {"TPU v5 lite": 48 * 1024, "TPU v5": 48 * 1024, "TPU v6 lite": 96 * 1024}
"""By device kind, of 128, 64 and 128 MiB; the rest is for what is fetched ahead. libtpu's own
16, 16 and 32 MiB make small tiles of a product, and read its operands as often
(docs/performance.md)."""


@cache
def compiler_options(mesh: Mesh) -> dict[str, str | bool] | None:
    """jax.jit's `compiler_options` of a step on `mesh`. LIBTPU_INIT_ARGS goes before; a compiler
    that knows the option no longer is not given it, with a warning."""
    kind = mesh.devices.flat[0].device_kind
    if kind not in LIMITS or FAST_MEMORY in os.environ.get("LIBTPU_INIT_ARGS", ""):
        return None
    options: dict[str, str | bool] = {FAST_MEMORY: str(LIMITS[kind])}
    everywhere = NamedSharding(mesh, PartitionSpec())
    try:
        jax.jit(lambda: jnp.zeros(()), out_shardings=everywhere).lower().compile(
            compiler_options=options
        )
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        warnings.warn(
            f"this libtpu has no option {FAST_MEMORY}: steps may take an eighth to a fifth"
            " longer than docs/performance.md says",
            stacklevel=2,
        )
        return None
    return options
