"""A fine-tuning run from checkpoint to result: load, iterate, log, save, and go on after an interruption."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from pvm_jax.batch import Batch
from pvm_jax.checkpoint import TrainCheckpoints, backbone_identity, load, save, save_branch
from pvm_jax.model import Qwen3VL
from pvm_jax.processing import Processor
from pvm_jax.sharding import batch_sharding, make_mesh
from train.config import SFTConfig
from train.data import load_training_data
from train.flops import devices_peak_flops
from train.log import RunLog
from train.program import Program, make_program, rows_per_shard
from train.step import TrainState, split_model

# What may change between a run and its continuation: none of it changes what is computed.
_FREE_KEYS = {"accumulation", "mesh", "remat", "attention", "loss_chunk", "log_every", "checkpoint_every", "keep"}


def run(config: SFTConfig) -> None:
    """Trains as `config` says, from the last step checkpoint in `run_dir` if there is one.

    Raises:
        ValueError: if the batch does not divide over the mesh, or `run_dir` holds a run with another config.
        FloatingPointError: if the loss stops being finite.
    """
    mesh = make_mesh(**asdict(config.mesh))
    rows_per_shard(config, mesh)  # raises now, not after loading, if the batch does not divide
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
        with TrainCheckpoints(run_dir / "steps", model_config, identity, keep=config.keep) as checkpoints:
            if checkpoints.latest is not None:
                del state
                state = checkpoints.restore(program.state)
            batches = data.iterator(int(state.step), config.data.threads, config.data.prefetch)
            log = RunLog(run_dir / "log", start=int(state.step), total=total, every=config.log_every, peak=devices_peak_flops())
            with log:
                log.print(data.report)
                state = train(config, program, state, frozen, batches, total, checkpoints, log)
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
) -> TrainState:
    """Steps from `state.step` to `total`, or to a SIGTERM, with a step checkpoint at the end of either."""
    shapes: set[tuple[int, int]] = set()
    last: jax.Array | None = None
    with _stop_requests() as stop_requested:
        for number in range(int(state.step), total):
            batch = to_devices(next(batches), program.batch_sharding, config.batch_size)
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
            stopping = stop_requested(number)
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
    """Notes in `run_dir` what the run computes; refuses to go on with another run that was noted there."""
    mine = {key: value for key, value in asdict(config).items() if key not in _FREE_KEYS}
    mine["data"] = {key: mine["data"][key] for key in ("path", "buckets", "too_long")}
    mine["data"]["bytes"] = Path(config.data.path).stat().st_size
    note = run_dir / "run.json"
    if note.exists():
        other = json.loads(note.read_text())
        if changed := [key for key in mine if mine[key] != other.get(key)]:
            raise ValueError(
                f"{run_dir} holds a run with another {', '.join(changed)} (see {note}): continue it with the same values, "
                "or give another --run_dir"
            )
    elif jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(mine, indent=2) + "\n")


@contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields step -> whether the run was asked to end (SIGTERM); all processes get True at the same step."""
    if jax.process_count() > 1:  # jax.distributed listens to the signal and agrees on the step
        yield multihost_utils.reached_preemption_sync_point
        return
    requests: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: requests.append(number))
    try:
        yield lambda _: bool(requests)
    finally:
        signal.signal(signal.SIGTERM, before)
