"""Floating-point operations of a program, counted from its jaxpr (XLA's cost analysis counts a
scan's body once), and of a training step on a batch, padding excluded."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core as jex

from pvm_jax.data.batch import Batch
from pvm_jax.model.qwen3_vl import Qwen3VL

# Dense bfloat16 FLOP/s of one device, by what `Device.device_kind` says; from the vendors' data
# sheets.
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


class Work(NamedTuple):
    """What a batch asks of the model, padding excluded; or the FLOPs that one of each costs
    (`count_costs`).

    Attributes:
        tokens: all of them, visual ones included.
        token_pairs: a token and one that it sees: itself or an earlier one of its segment.
        visual_tokens: with the patches that they are made of.
        patch_pairs: two patches of one frame, in either order.
        recalls: a token and a visual token of its segment.
        loss_tokens: targets, each of which meets the vocabulary.
    """

    tokens: Any
    token_pairs: Any
    visual_tokens: Any
    patch_pairs: Any
    recalls: Any
    loss_tokens: Any

    def flops(self, costs: "Work") -> Any:
        """Of this work, at `costs` FLOPs for one of each."""
        return sum(count * cost for count, cost in zip(self, costs, strict=True))

    @classmethod
    def of(cls, batch: Batch) -> "Work":
        """Float32 scalars, computed on the device where the batch is."""
        tokens, loss_tokens = (_total(x > 0) for x in (batch.segment_ids, batch.loss_weights))
        return cls(
            tokens=tokens,
            token_pairs=(_pairs(batch.segment_ids, batch.segment_ids) + tokens) / 2,
            visual_tokens=_total(batch.visual_segment_ids > 0),
            patch_pairs=_pairs(batch.patch_segment_ids, batch.patch_segment_ids),
            recalls=_pairs(batch.segment_ids, batch.visual_segment_ids),
            loss_tokens=loss_tokens,
        )

    @classmethod
    def full(cls, rows: int, tokens: int, patches: int, merge_factor: int) -> "Work":
        """Of `rows` rows without padding: one example each, with one image, every token a target.
        No rows of this shape ask for more."""
        visual_tokens = patches // merge_factor
        row = cls(
            tokens=tokens,
            token_pairs=tokens * (tokens + 1) // 2,
            visual_tokens=visual_tokens,
            patch_pairs=patches**2,
            recalls=tokens * visual_tokens,
            loss_tokens=tokens,
        )
        return cls(*(rows * count for count in row))


def _total(counts: jax.Array) -> jax.Array:
    """Of [B, ...] counts: exact along a row, in float32 over rows (int32 would overflow)."""
    return counts.sum(tuple(range(1, counts.ndim)), dtype=jnp.int32).astype(jnp.float32).sum()


def _pairs(ids: jax.Array, others: jax.Array) -> jax.Array:
    """How many pairs of columns of [B, S] and [B, T] carry the same id; 0 is padding. The
    comparison fuses into the sum."""
    return _total((ids[:, :, None] == others[:, None, :]) & (ids > 0)[:, :, None])


def count_costs(graphdef: nnx.GraphDef, trained: Any, frozen: Any) -> Work:
    """FLOPs of the forward and the partial backward pass, by what causes them.

    They are counted from the traced model, which must neither recompute (remat "none") nor skip
    (attention "xla"): every product is linear in the tokens (a), the visual tokens (b), or a
    product of two of these, so five shapes of a row tell how much falls on each: a, a^2, b, b^2 and
    ab. The xla attention computes all pairs of tokens, so half of a^2 are those that count. The
    head is counted apart, for a single target. All are whole numbers, as floats: int32 is too small
    for them.

    Args:
        trained, frozen: pure trees of ShapeDtypeStructs, as `train.step.state.split_model` parts
            them.
    """

    def model(trained: Any, frozen: Any) -> Qwen3VL:
        return nnx.merge(graphdef, trained, frozen)

    def body(trained: Any, frozen: Any, batch: Batch) -> jax.Array:
        return model(trained, frozen).hidden(batch).sum()

    def head(trained: Any, hidden: jax.Array, frozen: Any) -> jax.Array:
        return model(trained, frozen).logits(hidden).sum()

    config = jax.eval_shape(model, trained, frozen).config
    merge_factor = config.vision.merge_factor

    def count_body(tokens: int, visual_tokens: int) -> int:
        batch = Batch.empty(config, rows=1, length=tokens, patches=visual_tokens * merge_factor)
        return count_flops(jax.value_and_grad(body), trained, frozen, batch)

    shapes = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)]
    terms = np.array([(a, a**2, b, b**2, a * b) for a, b in shapes])
    solution = np.linalg.solve(terms, [count_body(*shape) for shape in shapes])
    tokens, token_pairs, visual_tokens, visual_pairs, recalls = solution.round().tolist()
    target = jax.ShapeDtypeStruct((1, 1, config.text.hidden_size), config.dtype)
    return Work(
        tokens=tokens,
        token_pairs=token_pairs,
        visual_tokens=visual_tokens,
        patch_pairs=visual_pairs / merge_factor**2,
        recalls=recalls,
        loss_tokens=float(
            count_flops(jax.value_and_grad(head, argnums=(0, 1)), trained, target, frozen)
        ),
    )


def count_flops(function: Callable, *args: Any) -> int:
    """Multiplications and additions of the matrix products and convolutions in `function(*args)`.

    Args may be ShapeDtypeStructs: the function is traced, never run. A scan counts its body times
    its length, a `cond` its dearest branch, a `shard_map` its body times its devices, a Pallas
    kernel its body times its grid.

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
        raise ValueError(
            "cannot count the FLOPs of a while loop: its trip count is not in the program"
        )
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
