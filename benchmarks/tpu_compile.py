"""Does the SFT step fit a TPU slice? Compiles the real step for a topology, with the real sharding and no TPU.

pip install libtpu   # in the version that belongs to the installed jax, see `pip install --dry-run 'jax[tpu]'`
python -m benchmarks.tpu_compile 8b v5e:4x4
python -m benchmarks.tpu_compile 8b v5p:2x2x1 --length 8192 --trainable decoder
"""

import os
import time

# No TPU is looked for: libtpu only compiles.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from pvm_jax import Batch, ModelConfig, abstract_model
from pvm_jax.sharding import MESH_AXES, batch_sharding, param_shardings
from train.config import OptimizerConfig, Trainable
from train.optimizer import make_optimizer, make_schedule
from train.step import TrainState, make_loss, make_step, split_model, state_shardings

GIB = 2**30


def main(
    preset: str,
    topology: str,
    length: int = 8192,
    patches: int = 4096,
    rows: int = 1,
    tensor: int = 1,
    trainable: Trainable = "pvm",
    memory: float | None = None,
) -> None:
    """Prints bytes a chip and the compile time of one SFT step.

    Args:
        preset: model size: 2b, 4b, 8b, 32b.
        topology: TPU slice by generation and chips, as in v5e:4x4, v5p:2x2x1 (a v5p-8), v6e:2x4.
        length: tokens of a row.
        patches: image patches of a row; four make a visual token.
        rows: rows of a chip.
        tensor: chips that share every matrix product; the others are fsdp.
        trainable: what trains.
        memory: GiB of a chip, to say whether the step fits (default: by generation).
    """
    chips = np.array(topologies.get_topology_desc(topology, platform="tpu").devices)
    mesh = Mesh(chips.reshape(1, -1, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    memory = memory or {"v5e": 16, "v5p": 95, "v6e": 32, "v4": 32}[topology.split(":")[0]]
    config = ModelConfig.preset(preset, dtype="bfloat16", param_dtype="bfloat16", remat="full", attention="splash")
    graphdef, trained, frozen = split_model(abstract_model(config), trainable)
    schedule = make_schedule(OptimizerConfig(), 1000)
    optimizer = make_optimizer(OptimizerConfig(), schedule)
    shardings = state_shardings(trained, optimizer, mesh)

    def init(params: nnx.State) -> TrainState:
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    state = placed(jax.eval_shape(init, nnx.as_pure(trained)), shardings)
    weights = placed(nnx.as_pure(frozen), param_shardings(frozen, mesh))
    empty = Batch.empty(config, rows=rows * chips.size // tensor, length=length, patches=patches)
    batch = placed(empty, jax.tree.map(lambda _: batch_sharding(mesh), empty))
    step = make_step(make_loss(graphdef, chunk=512), optimizer, schedule)
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, weights, batch)
        traced = time.perf_counter() - start
        compiled = lowered.compile()
        seconds = time.perf_counter() - start - traced
    bytes_of = compiled.memory_analysis()
    assert bytes_of is not None
    total = (
        bytes_of.argument_size_in_bytes
        + bytes_of.output_size_in_bytes
        - bytes_of.alias_size_in_bytes
        + bytes_of.temp_size_in_bytes
    )
    table = Table(title=f"{preset} SFT step ({trainable}), {topology}, rows of {length:,} tokens and {patches:,} patches")
    for column in ("trace s", "compile s", "weights", "trained + optimizer", "batch", "temporary", "total a chip", "fits"):
        table.add_column(column)
    table.add_row(
        f"{traced:.1f}",
        f"{seconds:.1f}",
        *(f"{size / GIB:.2f} GiB" for size in (*map(local_bytes, (weights, state, batch)), bytes_of.temp_size_in_bytes, total)),
        f"{'yes' if total / GIB < memory else 'NO'} ({memory:g} GiB)",
    )
    Console(width=140).print(table)


def placed(tree, shardings):
    """Abstract arrays in their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def local_bytes(tree) -> int:
    """Bytes of one device's part."""

    def part(x: jax.ShapeDtypeStruct) -> int:
        assert isinstance(x.sharding, NamedSharding)
        return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize

    return sum(map(part, jax.tree.leaves(tree)))


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
