"""GRPO: what a run of it is made of, and its steps: prompts, a rollout, rewards, updates."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from pvm_jax.data.processor import Processor
from pvm_jax.data.stored import Conversations
from train.config import Bucket
from train.grpo.config import EvaluationConfig, GRPOConfig
from train.grpo.grading import RolloutGrader, completion_values, grading, reward_values, sample_of
from train.grpo.held_out import Evaluation
from train.grpo.program import Fixed, GRPOProgram
from train.grpo.prompts import PromptBatch, PromptData, load_prompts
from train.grpo.reward_watch import RewardWatch
from train.grpo.rollout import Completions, Sampler, check_prompts, rollout_mesh
from train.grpo.update import Graded, parts_of, train_on, weigh
from train.run import lifecycle
from train.run.dry_run import STEPS as DRY_STEPS
from train.run.dry_run import memory_of, shardings_table
from train.run.lifecycle import Prepared, Recipe, RunResult, StepDone, load_model
from train.run.log import HEADLINE, RunLog
from train.step.program import rows_per_shard
from train.step.state import TrainState, cast, split_model

TRAINING_STREAM, _HELD_OUT_STREAM = range(2)


@dataclass(frozen=True)
class PreparedGRPO(Prepared):
    """What a run of GRPO is made of. `reference`: the trained parameters as they were at the start,
    with beta > 0."""

    config: GRPOConfig
    data: PromptData
    program: GRPOProgram
    reference: Any = None


def prepare(
    config: GRPOConfig,
    mesh: Mesh,
    *,
    sources: Sequence[Conversations] | None = None,
    sizes_file: Path | None = None,
) -> PreparedGRPO:
    """Loads the model onto `mesh`, measures the prompts and builds the program; writes nothing but
    `sizes_file`. The `sources` of the data, where they are open, are not opened again.

    Raises:
        ValueError: if prompts or rows do not divide over their meshes, the data gives no batch, or
            nothing ends a completion.
        FileNotFoundError, CheckpointError: for the checkpoint, as `pvm_jax.load`.
    """
    rows_per_shard(config.rows, config.accumulation, mesh, name="prompts_per_step x group_size")
    check_prompts(config, rollout_mesh(config.rollout_mesh, mesh))
    model = load_model(config, mesh)
    if not model.config.stop_tokens:
        raise ValueError(
            f"{config.checkpoint} names no eos_token_id (generation_config.json): no completion"
            " would ever end"
        )
    processor = Processor.from_pretrained(config.checkpoint, tags_as_text=config.tags_as_text)
    data = load_prompts(
        config.data,
        processor,
        batch_size=config.prompts_per_step,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        sources=sources,
        sizes_file=sizes_file,
    )
    program = GRPOProgram.of(config, model.config, len(data.plan) * config.num_iterations, mesh)
    # Read from the checkpoint at every start, so that a run that goes on has the reference that it
    # began with.
    reference = (
        cast(nnx.as_pure(split_model(model, config.trainable)[1]), config.dtype)
        if config.beta
        else None
    )
    return PreparedGRPO.begin(
        model,
        config=config,
        mesh=mesh,
        processor=processor,
        data=data,
        program=program,
        updates=config.num_iterations,
        reference=reference,
    )


def train(work: PreparedGRPO, log: RunLog, step_done: StepDone) -> TrainState:
    """Steps from the state's step to the last, or until `step_done` says to stop."""
    config, program, state, frozen, total = (
        work.config,
        work.program,
        work.state,
        work.frozen,
        work.total,
    )
    sampler, fixed = Sampler(config, program, work.mesh), Fixed(frozen, work.reference)
    batches = work.data.iterator(work.done, config.data.threads, config.data.prefetch)
    seen: set[Bucket] = set()
    watch = RewardWatch(work.processor, log.print)
    with grading(config, work.processor, log.print) as grade:
        held_out = evaluation(work, config.held_out, sampler, grade) if config.held_out else None
        for number in range(work.done, total):
            if held_out and number % held_out.config.every == 0:
                log.flush()
                held_out.write(log, number, sampler.model(state, frozen))
            with log.phase("data"):
                batch = next(batches)
            start = time.perf_counter()
            with log.phase("rollout"):
                completions = roll_out(work, sampler, state, batch, number)
                rollout_seconds = time.perf_counter() - start
            with log.phase("rewards"):
                rewards, table = grade(completions, batch.prompts)
                watch(table, completions)
            graded = weigh(config, batch, completions, rewards)
            shapes = {part.shape for part in parts_of(config, graded)}
            if new_shape := not shapes <= seen:
                log.flush()
                seen |= shapes
            state, metrics = train_on(program, state, fixed, graded)
            metrics |= describe(graded, rewards, config.group_size) | reward_values("reward", table)
            if not new_shape:
                metrics["rollout/tokens_per_second"] = float(
                    completions.lengths.sum() / rollout_seconds
                )
            log.add(number, metrics, timed=not new_shape)
            if new_shape:
                rows = ", ".join(
                    f"{shape.tokens} tokens"
                    for shape in sorted(shapes, key=lambda shape: shape.tokens)
                )
                log.print(
                    f"compiled rows of {rows}, {batch.bucket.patches} patches:"
                    f" {time.perf_counter() - start:.1f} s"
                )
            if (number + 1) % config.log_every == 0:
                text = work.processor.decode(completions.tokens[0, : completions.lengths[0]])
                sample = sample_of(batch.prompts[0], text, rewards[0])
                log.sample(number, "rollout/sample", sample.markdown, sample.image)
            if step_done(number, state):
                return state
        if held_out:
            held_out.write(log, total, sampler.model(state, frozen))
    return state


def evaluation(
    work: PreparedGRPO, held_out: EvaluationConfig, sampler: Sampler, grade: RolloutGrader
) -> Evaluation:
    """Of the held-out prompts, drawing alike at every step."""
    return Evaluation(
        work.config,
        held_out,
        work.processor,
        sampler,
        grade,
        draw=(work.config.seed, _HELD_OUT_STREAM),
    )


def roll_out(
    work: PreparedGRPO, sampler: Sampler, state: TrainState, batch: PromptBatch, number: int
) -> Completions:
    """The completions of step `number`: what is drawn depends on the seed and the number alone."""
    return sampler(
        sampler.model(state, work.frozen),
        batch,
        draw=(work.config.seed, TRAINING_STREAM, number),
        seeds=range(len(batch.prompts)),
        samples=work.config.group_size,
        temperature=work.config.temperature,
    )


def dry_steps(work: PreparedGRPO, console: Console) -> None:
    """Whole steps for `train.run.dry_run`: rollout, rewards, updates."""
    config, program, state = work.config, work.program, work.state
    sampler, fixed = Sampler(config, program, work.mesh), Fixed(work.frozen, work.reference)
    console.print(shardings_table("weights that generate", sampler.abstract_weights))
    batches = work.data.iterator(0, config.data.threads, config.data.prefetch)
    seen: set[Bucket] = set()
    with grading(config, work.processor, partial(console.print, markup=False)) as grade:
        if config.held_out:
            evaluation(work, config.held_out, sampler, grade)  # refuses what a run would
        for number in range(min(DRY_STEPS, work.total)):
            batch = next(batches)
            start = time.perf_counter()
            completions = roll_out(work, sampler, state, batch, number)
            console.print(
                f"step {number}: {len(completions.tokens)} completions of {len(batch.prompts)}"
                f" prompts of at most {batch.bucket.tokens:,} tokens and {batch.bucket.patches:,}"
                f" patches, {completions.lengths.mean():.0f} tokens long on average,"
                f" {completions.truncated.mean():.0%} truncated,"
                f" {time.perf_counter() - start:.2f} s"
            )
            rewards, _ = grade(completions, batch.prompts)
            graded = weigh(config, batch, completions, rewards)
            for shape in dict.fromkeys(part.shape for part in parts_of(config, graded)):
                if shape not in seen:
                    seen.add(shape)
                    rows = program.abstract_rows(shape, config.rows // config.accumulation)
                    console.print(shardings_table("rows that train", rows))
                    start = time.perf_counter()
                    compiled = program.accumulate.lower(
                        program.abstract_totals, program.state.params, program.fixed, rows
                    ).compile()
                    console.print(
                        f"compiled in {time.perf_counter() - start:.1f} s; {memory_of(compiled)}",
                        markup=False,
                    )
            start = time.perf_counter()
            state, metrics = train_on(program, state, fixed, graded)
            console.print(
                f"step {number}: reward {rewards.mean():.3f}, loss {metrics['loss']:.4f}, largest"
                f" gap between trainer and sampler {metrics['policy/largest_gap']:.1e},"
                f" {time.perf_counter() - start:.2f} s"
            )


def describe(graded: Graded, rewards: np.ndarray, group_size: int) -> dict[str, float]:
    """Scalars for the log: the completions' lengths, and the share of groups whose `rewards` [N]
    are all equal, so that they teach nothing."""
    groups = rewards.reshape(-1, group_size)
    alike = np.ptp(groups, axis=1) == 0
    return completion_values("completion", graded.completions) | {
        "reward/zero_spread": alike.mean()
    }


_HEADLINE = {
    "reward/mean": "reward {:.3f}",
    "completion/length": "length {:.0f}",
    "policy/entropy": "entropy {:.2f}",
}
RECIPE = Recipe(
    "GRPO",
    prepare,
    train,
    dry_steps,
    {"headline": _HEADLINE | HEADLINE, "apart": ("data", "rollout", "rewards")},
    every_column=True,
)


def run(config: GRPOConfig) -> RunResult:
    """Trains as `config` says, as `python -m train.grpo` does: `train.run.lifecycle.run`."""
    return lifecycle.run(config, RECIPE)
