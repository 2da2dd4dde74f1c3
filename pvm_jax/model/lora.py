"""LoRA (arXiv 2106.09685): a low-rank update beside any Linear of the backbone, stacked ones
included."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from pvm_jax.config import LoRAConfig
from pvm_jax.model.layers import (
    Heads,
    Linear,
    Rngs,
    parameter,
    project,
    project_from_heads,
    project_to_heads,
    zeros,
)

ADAPTER = "lora"
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

    def to_heads(self, x: jax.Array, heads: Heads, part: slice) -> jax.Array:
        return self.scale * project_to_heads(project(x, self.a), self.b, heads, part)

    def from_heads(self, x: jax.Array, heads: Heads) -> jax.Array:
        return self.scale * project(project_from_heads(x, self.a, heads), self.b)


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
