"""A fine-tuning run from checkpoint to result: load, iterate, log, save, and go on after an interruption."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh

from pvm_jax.checkpoint import backbone_identity, load, save, save_branch, save_lora
from pvm_jax.config import ModelConfig
from pvm_jax.conversations import stored_bytes
from pvm_jax.model import Qwen3VL, add_lora
from pvm_jax.processing import Processor
from pvm_jax.sharding import batch_sharding, local_rows, make_mesh, place_rows
from pvm_jax.train_checkpoints import TrainCheckpoints
from train.config import SFTConfig, Trainable
from train.data import TrainingData, load_training_data
from train.distributed import stop_requests
from train.flops import devices_peak_flops
from train.held_out import HeldOut
from train.log import RunLog
from train.program import Program, make_program, rows_per_shard
from train.step import TrainState, split_model

# What a run writes, by what trains.
RESULTS: dict[Trainable, str] = {"pvm": "branch", "lora": "lora", "decoder": "model", "all": "model"}

# What may change between a run and its continuation: none of it changes what is computed.
_FREE_KEYS = {
    "accumulation",
    "attention",
    "checkpoint_every",
    "distributed",
    "held_out",
    "keep",
    "log_every",
    "loss_chunk",
    "mesh",
    "not_finite",
    "remat",
}


@dataclass(frozen=True)
class Prepared:
    """What a run is made of, before its first step.

    Attributes:
        model_config: of the checkpoint.
        identity: of the backbone that the run starts from.
        state, frozen: `Program.begin`; state is None while a checkpoint is read in its place.
    """

    config: SFTConfig
    mesh: Mesh
    processor: Processor
    model_config: ModelConfig
    identity: str
    data: TrainingData
    program: Program
    state: Any
    frozen: Any


def prepare(config: SFTConfig, mesh: Mesh, *, sizes_file: Path | None = None) -> Prepared:
    """Loads the model onto `mesh`, measures the data and builds the program; writes nothing but `sizes_file`.

    Raises:
        ValueError: if the batch does not divide over the mesh, or the data gives no batch.
        FileNotFoundError, CheckpointError: for the checkpoint, as `pvm_jax.load`.
    """
    rows_per_shard(config, mesh)  # refuses before anything is loaded
    model = load(config.checkpoint, mesh=mesh, branch=config.branch)
    if config.trainable == "lora":
        model = add_lora(model, config.lora, mesh=mesh, seed=config.seed)
    processor = Processor.from_pretrained(config.checkpoint)
    data = load_training_data(
        config.data,
        processor,
        model.config,
        batch_size=config.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        rows=local_rows(batch_sharding(mesh), config.batch_size),
        sizes_file=sizes_file,
    )
    program = make_program(config, model.config, len(data.batches), mesh)
    state, frozen = program.begin(model)
    identity = backbone_identity(nnx.state(model))
    return Prepared(config, mesh, processor, model.config, identity, data, program, state, frozen)


def run(config: SFTConfig) -> None:
    """Trains as `config` says, from the last step checkpoint in `run_dir` if there is one.

    Raises:
        ValueError: as `prepare`, or if `run_dir` holds a run with another config.
        FileExistsError: if the run in `run_dir` is finished.
        FloatingPointError: if the loss stops being finite (see SFTConfig.not_finite).
    """
    mesh = make_mesh(**asdict(config.mesh))
    run_dir = Path(config.run_dir).absolute()
    result = run_dir / RESULTS[config.trainable]
    _claim(run_dir, config)
    if result.exists():
        raise FileExistsError(f"{result} exists: this run is finished; give another --run_dir to train again")
    with jax.set_mesh(mesh):
        work = prepare(config, mesh, sizes_file=run_dir / "sizes.npy")
        held_out = None
        if config.held_out:
            held_out = HeldOut(config, config.held_out, work.processor, work.model_config, work.program)
        total = len(work.data.batches)
        with (
            stop_requests(mesh) as stop_requested,  # until the last checkpoint is written
            TrainCheckpoints(run_dir / "steps", work.model_config, work.identity, keep=config.keep) as checkpoints,
        ):
            if checkpoints.latest is not None:
                work = replace(work, state=None)  # gives its memory back
                work = replace(work, state=checkpoints.restore(work.program.state))
            with RunLog(
                run_dir / "log",
                start=int(work.state.step),
                total=total,
                every=config.log_every,
                peak=devices_peak_flops(),
                not_finite=config.not_finite,
                examples=work.data.examples,
            ) as log:
                log.print(f"{jax.device_count()} devices in {jax.process_count()} processes, mesh {dict(mesh.shape)}")
                log.print(work.data.report)
                work = replace(work, state=train(work, checkpoints, held_out, log, stop_requested))
        if int(work.state.step) < total:
            log.print(f"stopped after step {int(work.state.step)}; the same command continues")
            return
        export(config, mesh, work.program.model(work.state, work.frozen), result)
        log.print(f"written: {result}")


def train(
    work: Prepared,
    checkpoints: TrainCheckpoints,
    held_out: HeldOut | None,
    log: RunLog,
    stop_requested: Callable[[], bool],
) -> TrainState:
    """Steps from the state's step to the last, or until `stop_requested`, with a step checkpoint at the end of either."""
    config, program, state, frozen = work.config, work.program, work.state, work.frozen
    total = len(work.data.batches)
    batches = work.data.iterator(int(state.step), config.data.threads, config.data.prefetch)
    shapes: set[tuple[int, int]] = set()
    last: jax.Array | None = None
    for number in range(int(state.step), total):
        if held_out and number % held_out.config.every == 0:
            log.flush()
            held_out.write(log, number, state, frozen)
        with log.phase("data"):
            batch = place_rows(next(batches), program.batch_sharding, config.batch_size)
        shape = (batch.tokens.shape[1], batch.patches.shape[1])
        if new_shape := shape not in shapes:
            log.flush()
            shapes.add(shape)
        start = time.perf_counter()
        state, metrics = program.step(state, frozen, batch)
        jax.block_until_ready(last)  # one step ahead of the devices, no more: batches in flight take memory
        last = metrics["loss"]
        log.add(number, metrics)
        if new_shape:
            log.flush(timed=False)
            log.print(f"compiled rows of {shape[0]} tokens, {shape[1]} patches: {time.perf_counter() - start:.1f} s")
        stopping = stop_requested()
        if stopping or number + 1 == total or (number + 1) % config.checkpoint_every == 0:
            log.flush()  # raises before a checkpoint could keep what comes after a step that was not finite
            with log.phase("checkpoint", number):
                checkpoints.save(number + 1, state)
        if stopping:
            return state
    if held_out:
        held_out.write(log, total, state, frozen)
    return state


def export(config: SFTConfig, mesh: Mesh, model: Qwen3VL, path: Path) -> None:
    """Writes what was trained: branch or adapter alone (float32), or the whole model in the dtype of its checkpoint."""
    if config.trainable in ("pvm", "lora"):
        (save_branch if config.trainable == "pvm" else save_lora)(path, model)
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
    mine["data"] = {key: mine["data"][key] for key in ("sources", "buckets", "packing", "hide_images", "too_long")}
    mine["data"]["bytes"] = [stored_bytes(source.path) for source in config.data.mixture]
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
