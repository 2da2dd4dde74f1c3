"""What a run computes, known before any array exists: shapes, shardings and the compiled step."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from pvm_jax.batch import Batch
from pvm_jax.config import ModelConfig
from pvm_jax.model import Qwen3VL, abstract_model
from pvm_jax.sharding import batch_sharding, param_shardings
from train.config import Bucket, SFTConfig
from train.flops import Work, count_costs, peak_flops
from train.optimizer import make_optimizer, make_schedule
from train.step import Step, TrainState, cast, init_state, make_loss, make_step, split_model, state_shardings


@dataclass(frozen=True)
class Program:
    """The compiled part of a run.

    Attributes:
        model_config: with the run's dtypes, remat and kernel.
        graphdef: structure of that model.
        state: what a step changes: ShapeDtypeStructs with their shardings.
        frozen: parameters that do not train, in the compute dtype: ShapeDtypeStructs with their shardings.
        step: jitted, donates its state; metrics count its FLOPs (`step_costs`) where the devices' peak is known.
        batch_sharding: of every leaf of a batch.
    """

    config: SFTConfig
    model_config: ModelConfig
    graphdef: nnx.GraphDef
    state: TrainState
    frozen: Any
    step: Step
    batch_sharding: NamedSharding

    def begin(self, model: Qwen3VL) -> tuple[TrainState, Any]:
        """The state at step 0 and the frozen parameters, out of a loaded `model`."""
        _, trained, frozen = split_model(model, self.config.trainable)
        _, optimizer = _optimizer(self.config, 1)  # a fresh state knows nothing of the schedule's length
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        return init_state(trained, optimizer, shardings), cast(nnx.as_pure(frozen), self.config.dtype)

    def model(self, state: TrainState, frozen: Any) -> Qwen3VL:
        """The model as it stands after a step."""
        return nnx.merge(self.graphdef, state.params, frozen)

    def abstract_batch(self, bucket: Bucket) -> Batch:
        """ShapeDtypeStructs of a step's batch in rows of `bucket`, with their shardings."""
        row = Batch.empty(self.model_config, rows=1, length=bucket.tokens, patches=bucket.patches)

        def abstract(x: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.config.batch_size, *x.shape[1:]), x.dtype, sharding=self.batch_sharding)

        return jax.tree.map(abstract, row)


def make_program(config: SFTConfig, model_config: ModelConfig, total: int, mesh: Mesh) -> Program:
    """The program of a run of `total` steps on a model of `model_config`, as `config` trains it.

    Raises:
        ValueError: if nothing would train.
    """
    schedule, optimizer = _optimizer(config, total)
    model_config = replace(model_config, dtype=config.dtype, remat=config.remat, attention=config.attention)
    if config.trainable == "lora":
        model_config = replace(model_config, lora=config.lora)
    graphdef, trained, frozen = split_model(abstract_model(model_config), config.trainable)
    shardings = state_shardings(trained, optimizer, mesh)
    state = jax.eval_shape(partial(TrainState.begin, optimizer=optimizer), nnx.as_pure(trained))
    weights = jax.eval_shape(partial(cast, dtype=config.dtype), nnx.as_pure(frozen))

    # Nobody asks for the FLOPs of a step where the devices' peak is unknown.
    costs = step_costs(config, model_config) if peak_flops(mesh.devices.flat[0].device_kind) else None
    loss = make_loss(graphdef, chunk=config.loss_chunk)
    step = make_step(loss, optimizer, schedule, accumulation=config.accumulation, costs=costs)
    return Program(
        config=config,
        model_config=model_config,
        graphdef=graphdef,
        state=_placed(state, shardings),
        frozen=_placed(weights, param_shardings(frozen, mesh)),
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        batch_sharding=batch_sharding(mesh),
    )


def rows_per_shard(config: SFTConfig, mesh: Mesh) -> int:
    """Rows of a batch that a device (a group of `tensor` devices) computes at the same time.

    Raises:
        ValueError: if they do not divide evenly.
    """
    shards, rows = mesh.shape["data"] * mesh.shape["fsdp"], config.batch_size // config.accumulation
    if rows % shards:
        most, rest = divmod(config.batch_size, shards)
        remedy = f"batch_size must be a multiple of {shards}" if rest else f"accumulation must divide {most}"
        raise ValueError(
            f"batch_size / accumulation = {rows} rows do not divide over the mesh's data x fsdp = {shards}: {remedy}"
        )
    return rows // shards


def step_costs(config: SFTConfig, model_config: ModelConfig) -> Work:
    """FLOPs of a step by what causes them: of the model's own products, not of those that remat repeats or a kernel pads."""
    plain = replace(model_config, dtype=config.dtype, remat="none", attention="xla")
    graphdef, trained, frozen = split_model(abstract_model(plain), config.trainable)
    return count_costs(graphdef, nnx.as_pure(trained), nnx.as_pure(frozen))


def _optimizer(config: SFTConfig, total: int):
    schedule = make_schedule(config.optimizer, total)
    return schedule, make_optimizer(config.optimizer, schedule)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
