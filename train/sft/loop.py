"""Supervised fine-tuning: what a run of it is made of, and its steps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from pvm_jax.data.processor import Processor
from pvm_jax.data.stored import Conversations
from pvm_jax.sharding import batch_sharding, local_rows, place_rows
from train.data.loading import TrainingData, load_training_data
from train.run import lifecycle
from train.run.dry_run import STEPS as DRY_STEPS
from train.run.dry_run import memory_of, shardings_table
from train.run.lifecycle import Prepared, Recipe, RunResult, StepDone, load_model
from train.run.log import RunLog
from train.sft.config import SFTConfig
from train.sft.held_out import HeldOut
from train.sft.program import SFTProgram
from train.step.program import rows_per_shard
from train.step.state import TrainState


@dataclass(frozen=True)
class PreparedSFT(Prepared):
    """What a run of supervised fine-tuning is made of."""

    config: SFTConfig
    data: TrainingData
    program: SFTProgram


def prepare(
    config: SFTConfig,
    mesh: Mesh,
    *,
    sources: Sequence[Conversations] | None = None,
    sizes_file: Path | None = None,
) -> PreparedSFT:
    """Loads the model onto `mesh`, measures the data and builds the program; writes nothing but
    `sizes_file`. The `sources` of the data, where they are open, are not opened again.

    Raises:
        ValueError: if the batch does not divide over the mesh, or the data gives no batch.
        FileNotFoundError, CheckpointError: for the checkpoint, as `pvm_jax.load`.
    """
    rows_per_shard(
        config.batch_size, config.accumulation, mesh
    )  # refuses before anything is loaded
    model = load_model(config, mesh)
    processor = Processor.from_pretrained(config.checkpoint, tags_as_text=config.tags_as_text)
    data = load_training_data(
        config.data,
        processor,
        model.config,
        batch_size=config.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        rows=local_rows(batch_sharding(mesh), config.batch_size),
        sources=sources,
        sizes_file=sizes_file,
    )
    program = SFTProgram.of(config, model.config, len(data.plan), mesh)
    return PreparedSFT.begin(
        model, config=config, mesh=mesh, processor=processor, data=data, program=program
    )


def train(work: PreparedSFT, log: RunLog, step_done: StepDone) -> TrainState:
    """Steps from the state's step to the last, or until `step_done` says to stop."""
    config, program, state, frozen, total = (
        work.config,
        work.program,
        work.state,
        work.frozen,
        work.total,
    )
    held_out = (
        HeldOut(config, config.held_out, work.processor, work.model_config, program)
        if config.held_out
        else None
    )
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
        jax.block_until_ready(
            last
        )  # one step ahead of the devices, no more: batches in flight take memory
        last = metrics["loss"]
        log.add(number, metrics, timed=not new_shape)
        if new_shape:
            log.print(
                f"compiled rows of {shape[0]} tokens, {shape[1]} patches:"
                f" {time.perf_counter() - start:.1f} s"
            )
        if step_done(number, state):
            return state
    if held_out:
        held_out.write(log, total, state, frozen)
    return state


def dry_steps(work: PreparedSFT, console: Console) -> None:
    """Steps for `train.run.dry_run`: what they take of a device, and their losses."""
    config, program, state = work.config, work.program, work.state
    if config.held_out:
        values = HeldOut(
            config, config.held_out, work.processor, work.model_config, program
        ).measure(state, work.frozen)
        console.print(f"held-out loss {values['held_out/loss']:.4f}", markup=False)
    batches = work.data.iterator(0, config.data.threads, config.data.prefetch)
    compiled: dict[tuple[int, int], jax.stages.Compiled] = {}
    for number in range(min(DRY_STEPS, work.total)):
        batch = place_rows(next(batches), program.batch_sharding, config.batch_size)
        shape = (batch.tokens.shape[1], batch.patches.shape[1])
        if shape not in compiled:
            console.print(shardings_table("batch", batch))
            start = time.perf_counter()
            compiled[shape] = program.step.lower(state, work.frozen, batch).compile()
            console.print(
                f"compiled in {time.perf_counter() - start:.1f} s; {memory_of(compiled[shape])}",
                markup=False,
            )
        start = time.perf_counter()
        state, metrics = compiled[shape](state, work.frozen, batch)
        loss = float(metrics["loss"])
        console.print(
            f"step {number}: loss {loss:.4f}, {time.perf_counter() - start:.2f} s", markup=False
        )


RECIPE = Recipe("SFT", prepare, train, dry_steps)


def run(config: SFTConfig) -> RunResult:
    """Trains as `config` says, as `python -m train.sft` does: `train.run.lifecycle.run`."""
    return lifecycle.run(config, RECIPE)
