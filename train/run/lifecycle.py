"""A training run from checkpoint to result, whatever its steps are: claim the directory, load, go
on after an interruption, train, write the result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import jax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from pvm_jax.checkpoint.directory import copy_assets
from pvm_jax.checkpoint.identity import backbone_identity
from pvm_jax.checkpoint.store import load, save, save_branch, save_lora
from pvm_jax.config import ModelConfig
from pvm_jax.data.processor import Processor
from pvm_jax.data.stored import Conversations
from pvm_jax.files.paths import any_path
from pvm_jax.files.writing import copy_file
from pvm_jax.model.qwen3_vl import Qwen3VL, add_lora
from pvm_jax.sharding import make_mesh
from train.config import RunConfig, Trainable
from train.data.loading import PlannedExamples
from train.run.checkpoints import TrainCheckpoints
from train.run.claim import SIZES, claimed, run_id
from train.run.events import EventWriter
from train.run.log import RunLog
from train.run.preemption import stop_requests
from train.run.trackers import Tracker, check_installed, opened_trackers
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

_LEARNS: dict[Trainable, str] = {
    "pvm": "the branch",
    "lora": "a LoRA adapter",
    "decoder": "decoder, head and branch",
    "all": "the whole model",
}

STEPS = "steps"
"""A run's step checkpoints, in its directory."""


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

    @classmethod
    def begin(
        cls,
        model: Qwen3VL,
        *,
        config: RunConfig,
        mesh: Mesh,
        processor: Processor,
        data: PlannedExamples,
        program: Program,
        **more: Any,
    ) -> Self:
        """A run from `model` on; `more` are a recipe's own fields."""
        state, frozen = program.begin(model)
        return cls(
            config=config,
            mesh=mesh,
            processor=processor,
            model_config=model.config,
            identity=backbone_identity(nnx.state(model)),
            data=data,
            program=program,
            state=state,
            frozen=frozen,
            **more,
        )

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
        name: what it is called on the console.
        prepare: (config, mesh, sources=the data's, opened, sizes_file=a path in `run_dir`) ->
            Prepared; runs before any step.
        train: (prepared, log, step_done) -> the state after the last step, or where the run was
            stopped.
        dry_steps: (prepared, console): a few steps, and prints what they took and gave.
        log_options: further arguments of `RunLog`.
        every_column: whether the data are opened with it (`open_conversations`).
    """

    name: str
    prepare: Callable[..., Prepared]
    train: Callable[[Any, RunLog, StepDone], TrainState]
    dry_steps: Callable[[Any, Console], None]
    log_options: Mapping[str, Any] = field(default_factory=dict)
    every_column: bool = False


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        steps: that are done.
        total: steps of the whole run.
        written: the branch, the adapter or the model that was trained; None where the run was told
            to stop before its last step: the same call goes on.
        log: TensorBoard's directory; `train.run.events.read_values` reads it. Empty unless
            config.log.to names tensorboard.
    """

    steps: int
    total: int
    written: Path | None
    log: Path


def run(config: RunConfig, recipe: Recipe) -> RunResult:
    """Trains as `config` says, from the last step checkpoint in `run_dir` if there is one.

    Several processes must have joined before (`train.run.distributed.join`); a lone one need not.

    Raises:
        OSError: if another process trains in `run_dir`, or it cannot be written.
        ImportError, RuntimeError: for a tracker of `config.log` that is not installed, or cannot be
            opened.
        ValueError: as `recipe.prepare`, or if `run_dir` holds a run with another config or other
            data.
        FileExistsError: if the run in `run_dir` is finished.
        FloatingPointError: if the loss stops being finite (see RunConfig.not_finite).
    """
    result = any_path(config.run_dir) / RESULTS[config.trainable]
    announce(
        f"{purpose(config, recipe)}, into {result}. How long it takes is told after the first steps"
    )
    check_installed(config.log)
    mesh = make_mesh(**asdict(config.mesh))
    run_dir = any_path(config.run_dir).absolute()
    with claimed(config, run_dir, run_dir / STEPS, every_column=recipe.every_column) as sources:
        result = run_dir / RESULTS[config.trainable]
        if result.exists():
            raise FileExistsError(
                f"{result} exists: this run is finished; give another --run_dir to train again"
            )
        with (
            jax.set_mesh(mesh),
            opened_trackers(config, run_id(run_dir)) as trackers,
        ):
            return _train(config, recipe, mesh, result, sources, trackers)


def purpose(config: RunConfig, recipe: Recipe) -> str:
    """What a run does, in words."""
    sources = [source.path for source in config.data.mixture]
    return (
        f"{recipe.name}: {_LEARNS[config.trainable]} of {config.checkpoint} learns from"
        f" {sources[0] if len(sources) == 1 else f'{len(sources)} sources'}"
        + ("" if config.max_steps is None else f", {config.max_steps:,} steps at most")
    )


def announce(line: str) -> None:
    """The first line of every run, in process 0: what comes, before anything is loaded."""
    console = Console(quiet=jax.process_index() != 0, highlight=False)
    console.print(line, markup=False, soft_wrap=not console.is_terminal)


def _train(
    config: RunConfig,
    recipe: Recipe,
    mesh: Mesh,
    result: Path,
    sources: Sequence[Conversations],
    trackers: list[Tracker],
) -> RunResult:
    """The run in the directory of `result`, which this process has claimed."""
    run_dir, log_dir = result.parent, result.parent / "log"
    work = recipe.prepare(config, mesh, sources=sources, sizes_file=run_dir / SIZES)
    with (
        stop_requests(mesh) as stop_requested,  # until the last checkpoint is written
        TrainCheckpoints(
            run_dir / STEPS, work.model_config, work.identity, keep=config.keep
        ) as checkpoints,
    ):
        if checkpoints.latest is not None:
            work = replace(work, state=None)  # gives its memory back
            work = replace(work, state=checkpoints.restore(work.program.state))
        if work.done > work.total:
            raise ValueError(
                f"the run in {run_dir} has {work.done} steps behind it, and its data as they are"
                f" now give {work.total}: give another --run_dir"
            )
        if "tensorboard" in config.log.to and jax.process_index() == 0:
            trackers.append(EventWriter(log_dir, start=work.done))
        with RunLog(
            trackers,
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
                if stopping or step + 1 == work.total or (step + 1) % config.checkpoint_every == 0:
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
    with assets_of(config) as assets:
        save(path, nnx.merge(graphdef, params, nnx.as_pure(frozen)), assets=assets)


@contextmanager
def assets_of(config: RunConfig) -> Iterator[str]:
    """The directory whose files go with the model: the checkpoint, or a copy that forgets the tags
    which the model has learned as text."""
    if not config.tags_as_text:
        yield config.checkpoint
        return
    with TemporaryDirectory() as folder:
        copy_file(any_path(config.checkpoint) / "config.json", Path(folder) / "config.json")
        copy_assets(config.checkpoint, Path(folder))
        processor = Processor.from_pretrained(config.checkpoint, tags_as_text=config.tags_as_text)
        processor.tokenizer.save_pretrained(folder)
        (Path(folder) / "added_tokens.json").unlink(missing_ok=True)
        yield folder
