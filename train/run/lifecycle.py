"""A training run from checkpoint to result, whatever its steps are: claim the directory, load, go
on after an interruption, train, write the result."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh
from rich.console import Console

from pvm_jax.checkpoint.store import load, save, save_branch, save_lora
from pvm_jax.config import ModelConfig
from pvm_jax.data.conversations import stored_bytes
from pvm_jax.data.processor import Processor
from pvm_jax.model.qwen3_vl import Qwen3VL, add_lora
from pvm_jax.sharding import make_mesh
from train.config import RunConfig, Trainable
from train.data.loading import PlannedExamples
from train.run.checkpoints import TrainCheckpoints
from train.run.log import RunLog
from train.run.preemption import stop_requests
from train.step.flops import devices_peak_flops
from train.step.program import Program
from train.step.state import TrainState, split_model

# What a run writes, by what trains.
RESULTS: dict[Trainable, str] = {
    "pvm": "branch",
    "lora": "lora",
    "decoder": "model",
    "all": "model",
}

SIZES = "sizes.npy"
"""The lengths of the run's examples, in its directory."""

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
    "reward_time_limit",
    "reward_workers",
    "rollout_mesh",
    "rollout_parts",
    "run_dir",
}


@dataclass(frozen=True)
class Prepared:
    """What a run is made of, before its first step.

    Attributes:
        model_config: of the checkpoint.
        identity: of the backbone that the run starts from.
        state, frozen: `Program.begin`; state is None while a checkpoint is read in its place.
        updates: optimizer updates of one step of the run.
    """

    config: RunConfig
    mesh: Mesh
    processor: Processor
    model_config: ModelConfig
    identity: str
    data: PlannedExamples
    program: Program
    state: Any
    frozen: Any
    updates: int = 1

    @property
    def done(self) -> int:
        """Steps of the run that the state has behind it."""
        return int(self.state.step) // self.updates

    @property
    def total(self) -> int:
        """Steps of the run."""
        return len(self.data.plan)


StepDone = Callable[[int, TrainState], bool]
"""(step, state after it) -> whether the run stops here. Every step ends with it; it writes the step
checkpoints."""


@dataclass(frozen=True)
class Recipe:
    """What sets one kind of run apart from the others.

    Attributes:
        prepare: (config, mesh, sizes_file=a path in `run_dir`) -> Prepared; runs before any step.
        train: (prepared, log, step_done) -> the state after the last step, or where the run was
            stopped.
        dry_steps: (prepared, console): a few steps, and prints what they took and gave.
        log_options: further arguments of `RunLog`.
    """

    prepare: Callable[..., Prepared]
    train: Callable[[Any, RunLog, StepDone], TrainState]
    dry_steps: Callable[[Any, Console], None]
    log_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        steps: that are done.
        total: steps of the whole run.
        written: the branch, the adapter or the model that was trained; None where the run was told
            to stop before its last step: the same call goes on.
        log: TensorBoard's directory; `train.run.events.read_values` reads it.
    """

    steps: int
    total: int
    written: Path | None
    log: Path


def run(config: RunConfig, recipe: Recipe) -> RunResult:
    """Trains as `config` says, from the last step checkpoint in `run_dir` if there is one.

    Several processes must have joined before (`train.run.distributed.join`); a lone one need not.

    Raises:
        ValueError: as `recipe.prepare`, or if `run_dir` holds a run with another config.
        FileExistsError: if the run in `run_dir` is finished.
        FloatingPointError: if the loss stops being finite (see RunConfig.not_finite).
    """
    mesh = make_mesh(**asdict(config.mesh))
    run_dir = Path(config.run_dir).absolute()
    log_dir = run_dir / "log"
    result = run_dir / RESULTS[config.trainable]
    _claim(run_dir, config)
    if result.exists():
        raise FileExistsError(
            f"{result} exists: this run is finished; give another --run_dir to train again"
        )
    with jax.set_mesh(mesh):
        work = recipe.prepare(config, mesh, sizes_file=run_dir / SIZES)
        with (
            stop_requests(mesh) as stop_requested,  # until the last checkpoint is written
            TrainCheckpoints(
                run_dir / "steps", work.model_config, work.identity, keep=config.keep
            ) as checkpoints,
        ):
            if checkpoints.latest is not None:
                work = replace(work, state=None)  # gives its memory back
                work = replace(work, state=checkpoints.restore(work.program.state))
            with RunLog(
                log_dir,
                start=work.done,
                total=work.total,
                every=config.log_every,
                peak=devices_peak_flops(),
                not_finite=config.not_finite,
                examples=work.data.examples,
                **recipe.log_options,
            ) as log:
                log.print(
                    f"{jax.device_count()} devices in {jax.process_count()} processes, mesh"
                    f" {dict(mesh.shape)}"
                )
                log.print(work.data.report)

                def step_done(step: int, state: TrainState) -> bool:
                    stopping = stop_requested()
                    if (
                        stopping
                        or step + 1 == work.total
                        or (step + 1) % config.checkpoint_every == 0
                    ):
                        # raises before a checkpoint could keep what comes after a step that was not
                        # finite
                        log.flush()
                        with log.phase("checkpoint", step):
                            checkpoints.save(step + 1, state)
                    return stopping

                work = replace(work, state=recipe.train(work, log, step_done))
        if work.done < work.total:
            log.print(f"stopped after step {work.done}; the same command continues")
            return RunResult(work.done, work.total, None, log_dir)
        export(config, mesh, work.program.model(work.state, work.frozen), result)
        log.print(f"written: {result}")
    return RunResult(work.done, work.total, result, log_dir)


def load_model(config: RunConfig, mesh: Mesh) -> Qwen3VL:
    """The model that the run starts from.

    Raises:
        FileNotFoundError, CheckpointError: as `pvm_jax.load`.
    """
    model = load(config.checkpoint, mesh=mesh, branch=config.branch)
    return (
        add_lora(model, config.lora, mesh=mesh, seed=config.seed)
        if config.trainable == "lora"
        else model
    )


def export(config: RunConfig, mesh: Mesh, model: Qwen3VL, path: Path) -> None:
    """Writes what was trained: branch or adapter alone (float32), or the whole model in the dtype
    of its checkpoint."""
    if config.trainable in ("pvm", "lora"):
        (save_branch if config.trainable == "pvm" else save_lora)(path, model)
        return
    # What did not train is read again: the run may have held it in fewer bits.
    graphdef, stored, frozen = split_model(
        load(config.checkpoint, mesh=mesh, branch=config.branch), config.trainable
    )
    _, trained, _ = split_model(model, config.trainable)
    params = jax.tree.map(
        lambda x, stored: x.astype(stored.dtype), nnx.as_pure(trained), nnx.as_pure(stored)
    )
    save(path, nnx.merge(graphdef, params, nnx.as_pure(frozen)), assets=config.checkpoint)


def _claim(run_dir: Path, config: Any) -> None:
    """Notes in `run_dir` what the run computes; refuses to go on with another run that got as far
    as its steps there.

    Raises:
        OSError: if `run_dir` cannot be written, or is not the same directory for all processes.
        ValueError: if it holds another run.
    """
    mine = {key: value for key, value in asdict(config).items() if key not in _FREE_KEYS}
    mine["data"] = {
        key: value for key, value in mine["data"].items() if key not in ("threads", "prefetch")
    }
    mine["data"]["bytes"] = [stored_bytes(source.path) for source in config.data.mixture]
    note, aside = run_dir / "run.json", run_dir / ".run.json.partial"

    def changed() -> list[str]:
        other = json.loads(note.read_text())
        return [key for key in mine if mine[key] != other.get(key)]

    # A start that failed, for a typo in a path say, has left nothing but its note and the sizes of
    # its data.
    if jax.process_index() == 0 and (
        not note.exists() or (not (run_dir / "steps").exists() and changed())
    ):
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / SIZES).unlink(missing_ok=True)
            aside.write_text(json.dumps(mine, indent=2) + "\n")
            os.replace(aside, note)
        except OSError as error:
            raise OSError(
                f"run_dir {run_dir} cannot be written ({error}): give another --run_dir, or free"
                " space"
            ) from error
    sync_global_devices(f"claimed {run_dir}")
    if not note.exists():
        raise FileNotFoundError(
            f"{note}: process 0 wrote it, process {jax.process_index()} does not see it: run_dir"
            " must be on a file system that all hosts share"
        )
    if other := changed():
        raise ValueError(
            f"{run_dir} holds a run with another {', '.join(other)} (see {note}): continue it with"
            " the same values, or give another --run_dir"
        )
