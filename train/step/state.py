"""One optimizer step as a pure function: gradients of what trains, and of nothing else."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pvm_jax.data.batch import Batch
from pvm_jax.model.lora import is_adapter
from pvm_jax.model.parameters import by_path
from pvm_jax.model.qwen3_vl import Qwen3VL
from pvm_jax.sharding import constrain, param_shardings
from train.config import Trainable
from train.step.flops import Work
from train.step.loss import chunked_cross_entropy

Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]
Step = Callable[["TrainState", Any, Batch], tuple["TrainState", Metrics]]

TRAINED_PARTS: dict[Trainable, tuple[str, ...]] = {
    "pvm": ("pvm",),
    "decoder": ("pvm", "language_model", "lm_head"),
    "all": ("pvm", "language_model", "lm_head", "visual"),
}


@partial(
    jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[]
)
@dataclass(frozen=True)
class TrainState:
    """What a step changes: the trained parameters (float32), the optimizer's state and the number
    of steps done, an int32 scalar; or the sharding of each."""

    params: Any
    opt_state: Any
    step: Any

    @classmethod
    def begin(cls, params: Any, optimizer: optax.GradientTransformation) -> Self:
        """Step 0: `params` in float32 with a fresh optimizer."""
        params = cast(params, "float32")
        return cls(params, optimizer.init(params), jnp.int32(0))


def split_model(model: Qwen3VL, trainable: Trainable) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model's structure, the parameters that train and those that do not (still wrapped, as
    `param_shardings` wants).

    Raises:
        ValueError: if nothing would train.
    """
    graphdef, trained, frozen = nnx.split(model, trained_filter(trainable), ...)
    if not jax.tree.leaves(trained):
        missing = (
            "LoRA adapter (pvm_jax.add_lora)"
            if trainable == "lora"
            else "PVM branch (convert.hf_to_orbax adds one)"
        )
        raise ValueError(f"trainable {trainable!r}: the model has no {missing}")
    return graphdef, trained, frozen


def trained_filter(trainable: Trainable) -> Callable[[tuple, Any], bool]:
    """The NNX filter of the parameters that train."""
    if trainable == "lora":
        return is_adapter
    parts = TRAINED_PARTS[trainable]
    return lambda path, _: path[0] in parts


def make_loss(graphdef: nnx.GraphDef, *, chunk: int) -> Loss:
    """(trained, frozen, batch) -> (summed loss, summed weights)."""

    def loss(trained: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model: Qwen3VL = nnx.merge(graphdef, trained, frozen)
        hidden = model.hidden(batch)
        return chunked_cross_entropy(
            hidden, model.head_weight(), batch.tokens, batch.loss_weights, chunk=chunk
        )

    return loss


def loss_and_gradient(
    loss: Loss, params: Any, frozen: Any, batch: Batch, *, accumulation: int
) -> tuple[jax.Array, Any]:
    """The batch's mean loss [] and its gradient, shaped as `params`; `accumulation` parts one after
    the other give what the whole would."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    if accumulation == 1:
        sums = gradient(params, frozen, batch)
    else:
        first = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), params))
        parts = jax.tree.map(partial(_micro_batches, accumulation), batch)

        def add(sums: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(params, frozen, part)), None

        sums, _ = jax.lax.scan(add, first, parts)
    (total, weight), gradients = sums
    return total / weight, jax.tree.map(lambda g: g / weight, gradients)


def _micro_batches(count: int, x: jax.Array) -> jax.Array:
    """[B, ...] -> [count, B / count, ...]. Every device keeps its own rows: part i takes rows i, i
    + count, ..."""
    parts = jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
    return constrain(parts, "layers", "batch", *["length"] * (x.ndim - 1))


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation: int = 1,
    costs: Work | None = None,
) -> Step:
    """(state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

    A step whose loss or gradient is not finite counts, but leaves parameters and moments as they
    were.

    Metrics are those of `apply_gradients` and `count`, as `with_padding` gives them.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        mean, gradients = loss_and_gradient(
            loss, state.params, frozen, batch, accumulation=accumulation
        )
        state, metrics = apply_gradients(state, mean, gradients, optimizer, schedule)
        return state, metrics | with_padding(count(batch, costs))

    return step


def apply_gradients(
    state: TrainState,
    loss: jax.Array,
    gradients: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, Metrics]:
    """The state after a step with these gradients; where they or the loss are not finite, with the
    count alone changed.

    `loss` and metrics are scalars []: loss, grad_norm (before clipping), learning_rate and, for
    each PVM layer l, gate/l, from which the step started.
    """
    norm = optax.tree.norm(gradients)
    rate = jnp.asarray(schedule(state.step), jnp.float32)
    direction, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    updates = optax.tree.scale(-rate, direction)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (optax.apply_updates(state.params, updates), opt_state),
        (state.params, state.opt_state),
    )
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": rate} | gates(state.params)
    return TrainState(params, opt_state, state.step + 1), metrics


def count(batch: Batch, costs: Work | None = None) -> Metrics:
    """What a batch holds, in scalars that can be added up: tokens and patches (padding not
    counted), columns/tokens and columns/patches (padding counted), loss_tokens; with `costs` (FLOPs
    by what causes them) also flops, padding not counted.
    """
    metrics = {"loss_tokens": (batch.loss_weights != 0).sum()}
    for name, segment_ids in (("tokens", batch.segment_ids), ("patches", batch.patch_segment_ids)):
        metrics |= {
            name: (segment_ids > 0).sum(),
            f"columns/{name}": jnp.asarray(segment_ids.size, jnp.float32),
        }
    return metrics | ({"flops": Work.of(batch).flops(costs)} if costs else {})


def with_padding(counts: Metrics) -> Metrics:
    """Sums of `count`, with the shares padding/tokens and padding/patches in place of the
    columns."""
    metrics = {name: value for name, value in counts.items() if not name.startswith("columns/")}
    shares = {
        f"padding/{name}": jnp.where(columns > 0, 1 - counts[name] / jnp.maximum(columns, 1), 0)
        for name, columns in ((name, counts[f"columns/{name}"]) for name in ("tokens", "patches"))
    }
    return metrics | shares


def gates(params: Any) -> Metrics:
    """{"gate/8": scalar, ...} out of a parameter tree; empty without a branch."""
    return {
        f"gate/{path.split('/')[1]}": gate[0]
        for path, gate in by_path(params).items()
        if path.endswith("gate_alpha")
    }


def state_shardings(
    trained: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """NamedShardings for a whole TrainState: moments lie as their parameters do, counters
    everywhere."""
    params, everywhere = param_shardings(trained, mesh), NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, nnx.as_pure(trained)),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(params, opt_state, everywhere)


def init_state(
    trained: nnx.State, optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """`TrainState.begin`, in place on the mesh."""
    begin = partial(TrainState.begin, optimizer=optimizer)
    return jax.jit(begin, out_shardings=shardings)(nnx.as_pure(trained))


def cast(params: Any, dtype: str) -> Any:
    """Every leaf in `dtype`; leaves that have it already are passed on, not copied."""
    leaves, tree = jax.tree.flatten(params)
    others = {place: leaf for place, leaf in enumerate(leaves) if leaf.dtype != dtype}
    done = _cast(others, dtype) if others else {}  # one program for all
    return tree.unflatten([done.get(place, leaf) for place, leaf in enumerate(leaves)])


@partial(jax.jit, static_argnums=1)
def _cast(arrays: dict[int, jax.Array], dtype: str) -> dict[int, jax.Array]:
    return {place: array.astype(dtype) for place, array in arrays.items()}
