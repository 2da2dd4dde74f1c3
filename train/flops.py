"""Floating-point operations of a program, counted from its jaxpr (XLA's cost analysis counts a scan's body once)."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex

# Dense bfloat16 FLOP/s of one device, by what `Device.device_kind` says; from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device of this kind; None if it is not in the table."""
    matching = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def devices_peak_flops() -> float | None:
    """Of all devices of the run together."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return peak and peak * jax.device_count()


def count_flops(function: Callable, *args: Any) -> int:
    """Multiplications and additions of the matrix products and convolutions in `function(*args)`.

    Args may be ShapeDtypeStructs: the function is traced, never run. A scan counts its body times its length, a `cond` its
    dearest branch, a `shard_map` its body times its devices, a Pallas kernel its body times its grid.

    Raises:
        ValueError: for a `while` loop around a product, whose trip count the program does not tell.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr: jex.Jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: jex.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    operands: list[Any] = [variable.aval for variable in equation.invars]
    results: list[Any] = [variable.aval for variable in equation.outvars]
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        depth = math.prod(operands[0].shape[axis] for axis in contracting)
        return 2 * depth * results[0].size
    if name == "conv_general_dilated":
        outputs = operands[1].shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * results[0].size * operands[1].size // outputs
    inner = [_jaxpr_flops(jaxpr) for jaxpr in jex.jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise ValueError("cannot count the FLOPs of a while loop: its trip count is not in the program")
    return _times(name, params) * sum(inner)


def _times(name: str, params: dict[str, Any]) -> int:
    """How often an equation runs the program inside it."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1
