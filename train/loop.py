"""A fine-tuning run from checkpoint to result: load, iterate, log, save, and go on after an interruption."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh, NamedSharding

from pvm_jax.batch import Batch
from pvm_jax.checkpoint import TrainCheckpoints, backbone_identity, load, save, save_branch
from pvm_jax.model import Qwen3VL
from pvm_jax.processing import Processor
from pvm_jax.sharding import batch_sharding, make_mesh
from train.config import SFTConfig
from train.data import load_training_data
from train.distributed import stop_requests
from train.flops import devices_peak_flops
from train.log import RunLog
from train.program import Program, make_program
from train.step import TrainState, split_model

# What may change between a run and its continuation: none of it changes what is computed.
_FREE_KEYS = {
    "accumulation",
    "attention",
    "checkpoint_every",
    "distributed",
    "keep",
    "log_every",
    "loss_chunk",
    "mesh",
    "remat",
}


def run(config: SFTConfig) -> None:
    """Trains as `config` says, from the last step checkpoint in `run_dir` if there is one.

    Raises:
        ValueError: if the batch does not divide over the mesh, or `run_dir` holds a run with another config.
        FloatingPointError: if the loss stops being finite.
    """
    mesh = make_mesh(**asdict(config.mesh))
    shards, rows = mesh.shape["data"] * mesh.shape["fsdp"], config.batch_size // config.accumulation
    if rows % shards:
        raise ValueError(f"batch_size / accumulation = {rows} rows do not divide over the mesh's data x fsdp = {shards}")
    run_dir = Path(config.run_dir).absolute()
    result = run_dir / ("branch" if config.trainable == "pvm" else "model")
    _claim(run_dir, config)
    if result.exists():
        raise FileExistsError(f"{result} exists: this run is finished; give another --run_dir to train again")
    with jax.set_mesh(mesh):
        model = load(config.checkpoint, mesh=mesh, branch=config.branch)
        data = load_training_data(
            config,
            Processor.from_pretrained(config.checkpoint),
            model.config,
            rows=local_rows(batch_sharding(mesh), config.batch_size),
            sizes_file=run_dir / "sizes.npy",
        )
        total = len(data.batches)
        identity = backbone_identity(nnx.state(model))
        program = make_program(config, model.config, total, mesh)
        state, frozen = program.begin(model)
        model_config = model.config
        del model  # its arrays live on in `state` and `frozen`, in their training dtypes
        with (
            stop_requests(mesh) as stop_requested,  # until the last checkpoint is written
            TrainCheckpoints(run_dir / "steps", model_config, identity, keep=config.keep) as checkpoints,
        ):
            if checkpoints.latest is not None:
                del state
                state = checkpoints.restore(program.state)
            batches = data.iterator(int(state.step), config.data.threads, config.data.prefetch)
            log = RunLog(run_dir / "log", start=int(state.step), total=total, every=config.log_every, peak=devices_peak_flops())
            with log:
                log.print(data.report)
                state = train(config, program, state, frozen, batches, total, checkpoints, log, stop_requested)
        if int(state.step) < total:
            log.print(f"stopped after step {int(state.step)}; the same command continues")
            return
        export(config, mesh, program.model(state, frozen), result)
        log.print(f"written: {result}")


def train(
    config: SFTConfig,
    program: Program,
    state: TrainState,
    frozen: Any,
    batches: Iterator[Batch],
    total: int,
    checkpoints: TrainCheckpoints,
    log: RunLog,
    stop_requested: Callable[[], bool],
) -> TrainState:
    """Steps from `state.step` to `total`, or until `stop_requested`, with a step checkpoint at the end of either."""
    flops: dict[tuple[int, int], int] = {}
    last: jax.Array | None = None
    for number in range(int(state.step), total):
        batch = to_devices(next(batches), program.batch_sharding, config.batch_size)
        shape = (batch.tokens.shape[1], batch.patches.shape[1])
        if new_shape := shape not in flops:
            log.flush()
            flops[shape] = program.flops(batch)
        start = time.perf_counter()
        state, metrics = program.step(state, frozen, batch)
        jax.block_until_ready(last)  # one step ahead of the devices, no more: batches in flight take memory
        last = metrics["loss"]
        log.add(number, metrics, flops[shape])
        if new_shape:
            log.flush(timed=False)
            log.print(f"compiled rows of {shape[0]} tokens, {shape[1]} patches: {time.perf_counter() - start:.1f} s")
        stopping = stop_requested()
        if stopping or number + 1 == total or (number + 1) % config.checkpoint_every == 0:
            log.flush()  # raises before a checkpoint could keep parameters that are not finite
            checkpoints.save(number + 1, state)
            log.restart_clock()
        if stopping:
            break
    return state


def local_rows(sharding: NamedSharding, batch_size: int) -> slice:
    """The rows of a batch that this process's devices hold."""
    parts = [
        index[0].indices(batch_size) for index in sharding.addressable_devices_indices_map((batch_size,)).values() if index
    ]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def to_devices(batch: Batch, sharding: NamedSharding, batch_size: int) -> Batch:
    """The global batch of which `batch` holds this process's rows."""

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))

    return jax.tree.map(place, batch)


def export(config: SFTConfig, mesh: Mesh, model: Qwen3VL, path: Path) -> None:
    """Writes what was trained: the branch alone (float32), or the whole model in the dtype of the checkpoint it came from."""
    if config.trainable == "pvm":
        save_branch(path, model)
        return
    # What did not train is read again: the run may have held it in fewer bits.
    graphdef, stored, frozen = split_model(load(config.checkpoint, mesh=mesh, branch=config.branch), config.trainable)
    _, trained, _ = split_model(model, config.trainable)
    params = jax.tree.map(lambda x, stored: x.astype(stored.dtype), nnx.as_pure(trained), nnx.as_pure(stored))
    save(path, nnx.merge(graphdef, params, nnx.as_pure(frozen)), assets=config.checkpoint)


def _claim(run_dir: Path, config: SFTConfig) -> None:
    """Notes in `run_dir` what the run computes; refuses to go on with another run that was noted there.

    Raises:
        OSError: if `run_dir` cannot be written, or is not the same directory for all processes.
        ValueError: if another run was noted there.
    """
    mine = {key: value for key, value in asdict(config).items() if key not in _FREE_KEYS}
    mine["data"] = {key: mine["data"][key] for key in ("path", "buckets", "too_long")}
    mine["data"]["bytes"] = Path(config.data.path).stat().st_size
    note, aside = run_dir / "run.json", run_dir / ".run.json.partial"
    if jax.process_index() == 0 and not note.exists():
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(mine, indent=2) + "\n")
            os.replace(aside, note)
        except OSError as error:
            raise OSError(f"run_dir {run_dir} cannot be written ({error}): give another --run_dir, or free space") from error
    sync_global_devices(f"claimed {run_dir}")
    if not note.exists():
        raise FileNotFoundError(
            f"{note}: process 0 wrote it, process {jax.process_index()} does not see it: run_dir must be on a file system that "
            "all hosts share"
        )
    other = json.loads(note.read_text())
    if changed := [key for key in mine if mine[key] != other.get(key)]:
        raise ValueError(
            f"{run_dir} holds a run with another {', '.join(changed)} (see {note}): continue it with the same values, "
            "or give another --run_dir"
        )
