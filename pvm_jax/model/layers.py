"""The small parts. Parameters keep Hugging Face's names and layout ([out, in]): conversion
transposes nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from pvm_jax.model.blocks import ATTENDED
from pvm_jax.sharding import gathered, platform

Module = TypeVar("Module", bound=nnx.Module)
Rngs = nnx.Rngs | None
"""What fresh parameters are drawn from; without any they are jax.ShapeDtypeStructs, and nothing is
traced or allocated."""

ROWS = 8
"""Of a TPU's vector register."""

normal = jax.nn.initializers.normal(0.02)
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def parameter(
    rngs: Rngs, init: Callable, shape: tuple[int, ...], axes: tuple[str, ...], dtype: str
) -> nnx.Param[jax.Array]:
    """A fresh parameter; `axes` are the logical names that sharding.py's table knows."""
    fresh: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return nnx.Param(fresh if rngs is None else init(rngs.params(), shape, fresh.dtype), axes=axes)


def stack(make: Callable[[Rngs], Module], count: int, rngs: Rngs) -> Module:
    """`count` alike modules as one: every parameter gets a leading axis [count, ...], to be sliced
    or scanned."""
    if rngs is not None:
        return nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)
    graphdef, params = nnx.split(make(None))
    return nnx.merge(
        graphdef,
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), nnx.as_pure(params)
        ),
    )


class Heads(NamedTuple):
    """How an axis of N * H features lies in heads [N, width]: H is `dim`, and zeros stand behind
    each half of a head up to `width`."""

    dim: int
    width: int

    def split(self, x: jax.Array, axis: int) -> jax.Array:
        """[..., N * H, ...] -> [..., N, width, ...]."""
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        if self.width == self.dim:
            return x.reshape(*before, -1, self.dim, *after)
        halves = x.reshape(*before, -1, 2, self.dim // 2, *after)
        padding = [(0, 0)] * halves.ndim
        padding[axis + 2] = 0, (self.width - self.dim) // 2
        return jnp.pad(halves, padding).reshape(*before, -1, self.width, *after)


def project(x: jax.Array, weight: nnx.Param[jax.Array]) -> jax.Array:
    """x W^T in x's dtype: x [..., in], W [out, in] -> [..., out]."""
    return product(x, matrix_for(x, weight))


def product(
    x: jax.Array, matrix: jax.Array, *, preferred_element_type: Any | None = None
) -> jax.Array:
    """x [..., in] times matrix [out, in], transposed: [..., out]."""
    if x.size > x.shape[-1] or platform() != "tpu":
        return _times(x, matrix, preferred_element_type)
    # A single row would not go to a TPU's matrix unit, and take three times as long.
    rows = jnp.pad(x.reshape(1, -1), ((0, ROWS - 1), (0, 0)))
    y = _times(rows, matrix, preferred_element_type)
    return y[0].reshape(*x.shape[:-1], -1)


def _times(x: jax.Array, matrix: jax.Array, preferred_element_type: Any | None) -> jax.Array:
    """einsum("...i,oi->...o"), in a fraction of its time to trace."""
    last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, matrix, last, preferred_element_type=preferred_element_type)


def project_to_heads(
    x: jax.Array, weight: nnx.Param[jax.Array], heads: Heads, part: slice
) -> jax.Array:
    """The same to those heads that `part` names, [..., N, width]: a TPU writes a product's result
    in any order, and would copy it into this one."""
    if _keeps_whole(x, weight, heads):
        matrix = matrix_for(x, weight, heads, 0)[part].reshape(-1, x.shape[-1])
        # Else the compiler has the product give heads by itself.
        y = jax.lax.optimization_barrier(product(x, matrix))
        return y.reshape(*x.shape[:-1], -1, heads.dim)
    return jnp.einsum("...i,nwi->...nw", x, matrix_for(x, weight, heads, 0)[part])


def project_from_heads(x: jax.Array, weight: nnx.Param[jax.Array], heads: Heads) -> jax.Array:
    """The same of x [..., N, width]."""
    if _keeps_whole(x, weight, heads):
        return project(x.reshape(*x.shape[:-2], -1), weight)
    return jnp.einsum("...nw,onw->...o", x, matrix_for(x, weight, heads, 1))


def matrix_for(
    x: jax.Array, weight: nnx.Param[jax.Array], heads: Heads | None = None, axis: int = 0
) -> jax.Array:
    """W [out, in] for a product with x, `axis` in heads where they are given."""
    matrix, axes = weight[...].astype(x.dtype), weight.get_metadata("axes")
    if heads is not None:
        matrix = heads.split(matrix, axis)
        axes = (*axes[: axis + 1], "head_dim", *axes[axis + 1 :])
    return gathered(matrix, *axes) if travels(x, weight) else matrix


def _keeps_whole(x: jax.Array, weight: nnx.Param[jax.Array], heads: Heads) -> bool:
    """Whether a product is not by head: in a decoding step on a TPU that would copy all layers'
    weights, here into another layout, there beside what multiplies them."""
    return heads.width == heads.dim and not travels(x, weight)


def travels(x: jax.Array, weight: nnx.Param[jax.Array]) -> bool:
    """Whether W goes to where x is. What is smaller travels: a decoding step's few rows do, and its
    weights stay."""
    out_features, in_features = weight.shape
    return x.size // in_features * (in_features + out_features) > out_features * in_features


class Linear(nnx.Module):
    """y = x W^T (+ b), in x's dtype. Weight [out, in]. `lora` (lora.py) is what an adapted Linear
    adds to y."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str, str],
        *,
        bias: bool = False,
        dtype: str,
        rngs: Rngs,
    ):
        self.weight = parameter(rngs, normal, (out_features, in_features), axes, dtype)
        self.bias = parameter(rngs, zeros, (out_features,), axes[:1], dtype) if bias else None
        self.lora: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        if self.lora is not None and self.lora.joins(x, self.weight):
            return self._with_bias(self.lora.joined(x, self.weight))
        y = self._with_bias(project(x, self.weight))
        return y if self.lora is None else y + self.lora(x)

    def to_heads(self, x: jax.Array, heads: Heads, part: slice = slice(None)) -> jax.Array:
        """[..., in] -> [..., N, width]; `part`: which of the heads."""
        y = project_to_heads(x, self.weight, heads, part)
        if self.bias is not None:
            y = y + heads.split(self.bias[...].astype(x.dtype), 0)[part]
        return y if self.lora is None else y + self.lora.to_heads(x, heads, part)

    def from_heads(self, x: jax.Array, heads: Heads) -> jax.Array:
        """[..., N, width] -> [..., out]."""
        y = self._with_bias(project_from_heads(x, self.weight, heads))
        return y if self.lora is None else y + self.lora.from_heads(x, heads)

    def _with_bias(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """A table [entries, features]; read in `dtype` by `__call__`."""

    def __init__(
        self, entries: int, features: int, axes: tuple[str, str], *, dtype: str, rngs: Rngs
    ):
        self.weight = parameter(rngs, normal, (entries, features), axes, dtype)

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return self.weight[...][ids].astype(dtype)


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """[..., D] -> [..., D]: x over its root mean square along the last axis; computed in float32,
    returned in x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)).astype(
        x.dtype
    )


def l2_norm(x: jax.Array) -> jax.Array:
    """[..., D] -> [...], in float32."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


class RMSNorm(nnx.Module):
    """[..., D] -> [..., D] (`Qwen3VLTextRMSNorm`): normed in float32, scaled in x's dtype."""

    def __init__(self, features: int, eps: float, *, dtype: str, rngs: Rngs):
        self.weight = parameter(rngs, ones, (features,), ("norm",), dtype)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalize(x, self.eps) * self.weight[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """[..., D] -> [..., D], computed in float32, returned in x's dtype."""

    def __init__(self, features: int, eps: float, *, dtype: str, rngs: Rngs):
        self.weight = parameter(rngs, ones, (features,), ("norm",), dtype)
        self.bias = parameter(rngs, zeros, (features,), ("norm",), dtype)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide -= wide.mean(-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return (
            wide * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        ).astype(x.dtype)


class SwiGLU(nnx.Module):
    """[..., D] -> [..., D]: down(silu(gate(x)) * up(x)), no biases (`Qwen3VLTextMLP`)."""

    def __init__(self, features: int, intermediate: int, *, dtype: str, rngs: Rngs):
        self.gate_proj = Linear(features, intermediate, ("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.up_proj = Linear(features, intermediate, ("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.down_proj = Linear(intermediate, features, ("embed", "mlp"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        # Else a TPU may compute this anew for every tile of the last product.
        return self.down_proj(jax.lax.optimization_barrier(inner))


def remat(layer: Callable, policy: str) -> Callable:
    """`layer`, a scan body, with its backward pass recomputing what ModelConfig.remat names."""
    if policy == "none":
        return layer
    policies = jax.checkpoint_policies
    attended = policies.save_only_these_names(ATTENDED)
    dots = policies.dots_with_no_batch_dims_saveable
    keep = {
        "full": policies.nothing_saveable,
        "attention": attended,
        "dots": policies.save_from_both_policies(dots, attended),
    }
    return jax.checkpoint(layer, prevent_cse=False, policy=keep[policy])
