"""Floating-point operations of a program, counted from its jaxpr (XLA's cost analysis counts a
scan's body once), and of a training step on a batch, padding excluded."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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

# Two of them divide no size of a model; longer rows are attended to in pieces of other sizes.
_PRIMES = (101, 103, 107, 109, 113, 127)


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
    product of two of these. With primes for a and b, which divide no other size, its factors tell
    which: a, a^2, b, b^2 or ab. The xla attention computes all pairs of tokens, so half of a^2 are
    those that count. The head is counted apart, for a single target. All are whole numbers, as
    floats: int32 is too small for them.

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
    sizes = {size for leaf in jax.tree.leaves((trained, frozen)) for size in leaf.shape}
    a, b, *_ = (prime for prime in _PRIMES if all(size % prime for size in sizes))
    batch = Batch.empty(config, rows=1, length=a, patches=b * merge_factor)
    costs = Counter()
    for flops, count in _products(jax.value_and_grad(body), trained, frozen, batch).items():
        i, j = _power(flops, a), _power(flops, b)
        costs[i, j] += count * flops // (a**i * b**j)
    causes = (1, 0), (2, 0), (0, 1), (0, 2), (1, 1)
    tokens, token_pairs, visual_tokens, visual_pairs, recalls = (costs.pop(c, 0) for c in causes)
    if costs:
        raise ValueError(f"products of (tokens, visual tokens) to the powers {sorted(costs)}")
    target = jax.ShapeDtypeStruct((1, 1, config.text.hidden_size), config.dtype)
    return Work(
        tokens=float(tokens),
        token_pairs=float(token_pairs),
        visual_tokens=float(visual_tokens),
        patch_pairs=visual_pairs / merge_factor**2,
        recalls=float(recalls),
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
    return _total_flops(_products(function, *args))


def _products(function: Callable, *args: Any) -> Counter[int]:
    """{FLOPs of a product, times those of the loops around it: how many such products}."""
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _total_flops(products: Counter[int]) -> int:
    return sum(flops * count for flops, count in products.items())


def _power(number: int, prime: int) -> int:
    """How often `prime` divides `number`, which is not 0."""
    return 0 if number % prime else 1 + _power(number // prime, prime)


def _of_jaxpr(jaxpr: jex.Jaxpr) -> Counter[int]:
    return sum(map(_of_equation, jaxpr.eqns), Counter())


def _of_equation(equation: jex.JaxprEqn) -> Counter[int]:
    name, params = equation.primitive.name, equation.params
    operands: list[Any] = [variable.aval for variable in equation.invars]
    results: list[Any] = [variable.aval for variable in equation.outvars]
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        depth = math.prod(operands[0].shape[axis] for axis in contracting)
        return _one(2 * depth * results[0].size)
    if name == "conv_general_dilated":
        outputs = operands[1].shape[params["dimension_numbers"].rhs_spec[0]]
        return _one(2 * results[0].size * operands[1].size // outputs)
    inner = [_of_jaxpr(jaxpr) for jaxpr in jex.jaxprs_in_params(params)]
    if name == "cond":
        return max(inner, key=_total_flops)
    if name == "while" and any(inner):
        raise ValueError(
            "cannot count the FLOPs of a while loop: its trip count is not in the program"
        )
    if not (times := _times(name, params)):
        return Counter()
    return Counter({flops * times: count for flops, count in sum(inner, Counter()).items()})


def _one(flops: int) -> Counter[int]:
    return Counter([flops] if flops else [])


def _times(name: str, params: dict[str, Any]) -> int:
    """How often an equation runs the program inside it."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1
