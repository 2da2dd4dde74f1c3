"""LoRA (arXiv 2106.09685): a low-rank update beside any Linear of the backbone, stacked ones
included."""

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pvm_jax.config import LoRAConfig
from pvm_jax.model.blocks import pad_to_multiple
from pvm_jax.model.layers import (
    Heads,
    Linear,
    Rngs,
    matrix_for,
    parameter,
    product,
    project,
    project_from_heads,
    project_to_heads,
    travels,
    zeros,
)
from pvm_jax.sharding import is_whole, platform

ADAPTER = "lora"
WIDE = 1024
"""Features from which on a product is joined with its update: of fewer that saves little."""
_NAMES_SHOWN = 8


class LowRank(nnx.Module):
    """x -> alpha / rank (x A^T) B^T in x's dtype: what a Linear adds to its own y. The product B A
    is never formed.

    A [..., rank, in], B [..., out, rank], with the leading axis of a stack. Fresh ones are PEFT's:
    A uniform within 1 / sqrt(in), B zero. They are float32, whatever the Linear is: small, and what
    trains.
    """

    def __init__(self, linear: Linear, config: LoRAConfig, *, rngs: Rngs):
        *stack, out_features, in_features = linear.weight.shape
        out_axis, in_axis = linear.weight.get_metadata("axes")
        bound = 1 / math.sqrt(in_features)
        shape_a, shape_b = (*stack, config.rank, in_features), (*stack, out_features, config.rank)
        self.a = parameter(rngs, _uniform(bound), shape_a, ("rank", in_axis), "float32")
        self.b = parameter(rngs, zeros, shape_b, (out_axis, "rank"), "float32")
        self.scale = config.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """As `Linear`'s, and so the other two."""
        return self.scale * project(project(x, self.a), self.b)

    def joins(self, x: jax.Array, weight: nnx.Param[jax.Array]) -> bool:
        """Whether x is better multiplied by the Linear's weight W and B at once (`joined`): a TPU
        would write the update of a wide product, and read it again to add it."""
        if platform() != "tpu" or min(weight.shape) < WIDE or not travels(x, weight):
            return False
        axes = zip(weight.get_metadata("axes"), weight.shape, strict=True)
        return all(is_whole(name, size) for name, size in axes)

    def joined(self, x: jax.Array, weight: nnx.Param[jax.Array]) -> jax.Array:
        """x W^T and the update, [..., out]. The rank is filled up with zeros."""
        w, a, b = (matrix_for(x, p) for p in (weight, self.a, self.b))
        return _joined(self.scale, x, w, pad_to_multiple(a, 0), pad_to_multiple(b, 1))

    def to_heads(self, x: jax.Array, heads: Heads, part: slice) -> jax.Array:
        return self.scale * project_to_heads(project(x, self.a), self.b, heads, part)

    def from_heads(self, x: jax.Array, heads: Heads) -> jax.Array:
        return self.scale * project(project_from_heads(x, self.a, heads), self.b)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _joined(scale: float, x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x W^T + scale (x A^T) B^T as one product of what lies side by side, [x, h] and [W, B]."""
    return _with_hidden(scale, x, w, a, b)[0]


def _with_hidden(scale: float, x: Any, w: Any, a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """The same, and h = scale x A^T."""
    hidden = scale * product(x, a)
    return product(_beside(x, hidden), _beside(w, b)), hidden


def _joined_forward(scale: float, x: Any, w: Any, a: Any, b: Any) -> tuple[jax.Array, Any]:
    y, hidden = _with_hidden(scale, x.value, w.value, a.value, b.value)
    return y, (x.value, w.value, a.value, b.value, hidden, w.perturbed)


def _joined_backward(scale: float, kept: Any, gradient: Any) -> tuple[Any, ...]:
    x, w, a, b, hidden, trained = kept
    of_hidden = scale * product(gradient, b.T)
    of_x = product(_beside(gradient, of_hidden), _beside(w.T, a.T))
    outer = partial(jnp.einsum, "...o,...i->oi")
    of_w = outer(gradient, x) if trained else None
    return of_x, of_w, outer(of_hidden, x), outer(gradient, hidden)


_joined.defvjp(_joined_forward, _joined_backward, symbolic_zeros=True)


def _beside(x: jax.Array, more: jax.Array) -> jax.Array:
    return jnp.concatenate([x, more], -1)


def _uniform(bound: float) -> Any:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def adapt(model: nnx.Module, config: LoRAConfig, *, rngs: Rngs) -> None:
    """Gives a fresh adapter to every Linear of `model` that `config.targets` names; the model
    computes what it did.

    Raises:
        ValueError: if there is no such Linear.
    """
    linears = dict(_linears(model))
    chosen = [path for path in linears if re.fullmatch(config.targets, path)]
    if not chosen:
        names = list(linears)
        shown = ", ".join(names[:: -(-len(names) // _NAMES_SHOWN)])
        raise ValueError(
            f"lora.targets {config.targets!r} matches no Linear of the backbone; there are {shown}"
            " and others"
        )
    for path in chosen:
        linears[path].lora = nnx.data(LowRank(linears[path], config, rngs=rngs))


def _linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """The backbone's Linears by path, as in "language_model/layers/self_attn/q_proj".

    Not the branch, which is the other way to adapt a backbone, and not the head, whose weight the
    loss reads in chunks.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and path[0] not in ("pvm", "lm_head"):
            yield "/".join(map(str, path)), module


def is_adapter(path: tuple[Any, ...], _: Any = None) -> bool:
    """Whether a parameter's path is of an adapter; an NNX filter."""
    return ADAPTER in path
