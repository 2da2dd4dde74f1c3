"""What a run computes, known before any array exists: shapes, shardings and the step."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Self

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.model.qwen3_vl import Qwen3VL, abstract_model
from pvm_jax.sharding import batch_sharding, param_shardings
from train.config import Bucket, RunConfig, Trainable
from train.step.flops import Work, count_costs, peak_flops
from train.step.optimizer import make_optimizer, make_schedule
from train.step.state import TrainState, cast, init_state, split_model, state_shardings


@dataclass(frozen=True)
class Program:
    """What a run computes with, whatever its steps are.

    Attributes:
        model_config: with the run's dtypes, remat and kernel.
        graphdef: structure of that model.
        state: what a step changes: ShapeDtypeStructs with their shardings.
        frozen: parameters that do not train, in the compute dtype: ShapeDtypeStructs with their
            shardings.
        optimizer, schedule: of the run's length.
        costs: FLOPs of a step by what causes them, where the devices' peak is known; nobody asks
            for them elsewhere.
        batch_sharding: of every leaf of a batch.
    """

    config: RunConfig
    model_config: ModelConfig
    graphdef: nnx.GraphDef
    state: TrainState
    frozen: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    costs: Work | None
    batch_sharding: NamedSharding

    @classmethod
    def of(cls, config: RunConfig, model_config: ModelConfig, updates: int, mesh: Mesh) -> Self:
        """The program of a run of `updates` optimizer steps on a model of `model_config`, as
        `config` trains it.

        Raises:
            ValueError: if nothing would train.
        """
        schedule = make_schedule(config.optimizer, updates)
        optimizer = make_optimizer(config.optimizer)
        model_config = replace(
            model_config, dtype=config.dtype, remat=config.remat, attention=config.attention
        )
        if config.trainable == "lora":
            model_config = replace(model_config, lora=config.lora)
        graphdef, trained, frozen = split_model(abstract_model(model_config), config.trainable)
        shardings = state_shardings(trained, optimizer, mesh)
        state = jax.eval_shape(partial(TrainState.begin, optimizer=optimizer), nnx.as_pure(trained))
        weights = jax.eval_shape(partial(cast, dtype=config.dtype), nnx.as_pure(frozen))
        return cls(
            config=config,
            model_config=model_config,
            graphdef=graphdef,
            state=placed(state, shardings),
            frozen=placed(weights, param_shardings(frozen, mesh)),
            optimizer=optimizer,
            schedule=schedule,
            costs=(
                step_costs(config, model_config)
                if peak_flops(mesh.devices.flat[0].device_kind)
                else None
            ),
            batch_sharding=batch_sharding(mesh),
        )

    @property
    def state_shardings(self) -> TrainState:
        """Of every leaf of the state."""
        return jax.tree.map(lambda x: x.sharding, self.state)

    def begin(self, model: Qwen3VL) -> tuple[TrainState, Any]:
        """The state at step 0 and the frozen parameters, out of a loaded `model`."""
        _, trained, frozen = split_model(model, self.config.trainable)
        return init_state(trained, self.optimizer, self.state_shardings), cast(
            nnx.as_pure(frozen), self.config.dtype
        )

    def model(self, state: TrainState, frozen: Any) -> Qwen3VL:
        """The model as it stands after a step."""
        return nnx.merge(self.graphdef, state.params, frozen)

    def abstract_batch(self, bucket: Bucket, rows: int) -> Batch:
        """ShapeDtypeStructs of a batch of `rows` rows of `bucket`, with their shardings."""
        return abstract_batch(
            self.model_config, bucket, rows, self.batch_sharding, videos=self.config.data.videos
        )


def abstract_batch(
    model_config: ModelConfig, bucket: Bucket, rows: int, sharding: NamedSharding, *, videos: bool
) -> Batch:
    """ShapeDtypeStructs of `rows` rows of `bucket`, each leaf with this sharding; `videos`: as of
    `Batch.empty`."""
    row = Batch.empty(
        model_config, rows=1, length=bucket.tokens, patches=bucket.patches, videos=videos
    )

    def abstract(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding)

    return jax.tree.map(abstract, row)


def rows_per_shard(
    rows: int, parts: int, mesh: Mesh, *, name: str = "batch_size", parts_name: str = "accumulation"
) -> int:
    """Rows of a batch of `rows` that a device (a group of `tensor` devices) computes at the same
    time, in one of its `parts`.

    Args:
        name, parts_name: what the config calls them.

    Raises:
        ValueError: if they do not divide evenly.
    """
    shards, at_once = mesh.shape["data"] * mesh.shape["fsdp"], rows // parts
    if at_once % shards:
        most, rest = divmod(rows, shards)
        remedy = (
            f"{name} must be a multiple of {shards}" if rest else f"{parts_name} must divide {most}"
        )
        raise ValueError(
            f"{name} / {parts_name} = {at_once} rows do not divide over the mesh's data x fsdp ="
            f" {shards}: {remedy}"
        )
    return at_once // shards


def step_costs(config: RunConfig, model_config: ModelConfig) -> Work:
    """FLOPs of a step by what causes them: of the model's own products, not of those that remat
    repeats or a kernel pads."""
    plain = replace(model_config, dtype=config.dtype, remat="none", attention="xla")
    return _costs(plain, config.trainable)


@cache
def _costs(plain: ModelConfig, trainable: Trainable) -> Work:
    """Seconds of tracing, whatever the shape of the rows."""
    graphdef, trained, frozen = split_model(abstract_model(plain), trainable)
    return count_costs(graphdef, nnx.as_pure(trained), nnx.as_pure(frozen))


def placed(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs like `tree`'s, with these shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
