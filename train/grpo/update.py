"""A graded rollout -> optimizer updates; rows are sorted by length into parts, so that short ones
do not pay for long ones."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.sharding import local_rows, place_rows
from train.config import Bucket
from train.grpo.config import GRPOConfig
from train.grpo.objective import group_advantages, token_weights
from train.grpo.program import Fixed, GRPOProgram, PolicyRows
from train.grpo.prompts import PromptBatch
from train.grpo.rollout import Completions
from train.step.state import TrainState


class Graded(NamedTuple):
    """A rollout and what the loss makes of its rewards; N completions of P prompts, as in
    `Completions`.

    Attributes:
        advantages: [completions] float32.
        weights: [completions, tokens] float32, of each token in the loss.
    """

    batch: PromptBatch
    completions: Completions
    advantages: np.ndarray
    weights: np.ndarray


class Part(NamedTuple):
    """Completions that are computed together, and the shape of their rows."""

    completions: np.ndarray
    shape: Bucket


def weigh(
    config: GRPOConfig, batch: PromptBatch, completions: Completions, rewards: np.ndarray
) -> Graded:
    """Advantages within each group, and the tokens' weights over the whole rollout; `rewards`
    [completions]."""
    advantages = group_advantages(
        rewards.reshape(-1, config.group_size), scale=config.scale_rewards
    )
    weights = token_weights(
        completions.mask,
        config.loss,
        max_completion_tokens=config.max_completion_tokens,
        left_out=completions.truncated if config.mask_truncated else None,
    )
    return Graded(batch, completions, advantages.reshape(-1), weights)


def parts_of(config: GRPOConfig, graded: Graded) -> list[Part]:
    """The completions in `config.accumulation` parts of equal size, shortest first, each in rows as
    short as it allows."""
    lengths = graded.completions.lengths
    parts = np.split(np.argsort(lengths, kind="stable"), config.accumulation)
    bucket = graded.batch.bucket

    def shape(part: np.ndarray) -> Bucket:
        room = next(room for room in config.completion_lengths if room >= lengths[part].max())
        return Bucket(bucket.tokens + room, bucket.patches)

    return [Part(part, shape(part)) for part in parts]


def rows_of(
    graded: Graded,
    completions: np.ndarray,
    shape: Bucket,
    model_config: ModelConfig,
    *,
    videos: bool,
) -> PolicyRows:
    """A row for each of `completions` [rows], numbers of completions, behind its prompt; NumPy
    leaves. `videos`: as of `Batch.from_rows`."""
    group = len(graded.completions.tokens) // len(graded.batch.prompts)
    prompts = [graded.batch.prompts[number // group].example for number in completions]
    examples = []
    for number, prompt in zip(completions, prompts, strict=True):
        written = graded.completions.tokens[number, : graded.completions.lengths[number]]
        examples.append(
            [replace(prompt, input_ids=np.append(prompt.input_ids, written), loss_mask=None)]
        )
    batch = Batch.from_rows(
        examples, model_config, length=shape.tokens, patches=shape.patches, videos=videos
    )
    old_logprobs, advantages = (np.zeros(batch.tokens.shape, np.float32) for _ in range(2))
    for row, (number, prompt) in enumerate(zip(completions, prompts, strict=True)):
        start, length = len(prompt.input_ids), graded.completions.lengths[number]
        columns = slice(start, start + length)
        batch.loss_weights[row, columns] = graded.weights[number, :length]
        old_logprobs[row, columns] = graded.completions.logprobs[number, :length]
        advantages[row, columns] = graded.advantages[number]
    return PolicyRows(batch, old_logprobs, advantages)


def train_on(
    program: GRPOProgram, state: TrainState, fixed: Fixed, graded: Graded
) -> tuple[TrainState, dict[str, float]]:
    """All updates on a rollout, one for each of `num_iterations`.

    Returns:
        The state, and the metrics of `GRPOProgram.update`: counts added up, others averaged over
        the updates; but policy/gap and policy/largest_gap are of the first, before which nothing
        was learned: how far trainer and sampler are apart.
    """
    config, updates = program.config, []
    for _ in range(config.num_iterations):
        totals = program.zeros()
        for completions, shape in parts_of(config, graded):
            mine = completions[local_rows(program.batch_sharding, len(completions))]
            rows = rows_of(graded, mine, shape, program.model_config, videos=config.data.videos)
            placed = place_rows(rows, program.batch_sharding, len(completions))
            jax.block_until_ready(
                totals.loss
            )  # one part ahead of the devices, no more: parts in flight take memory
            totals = program.accumulate(totals, state.params, fixed, placed)
        state, metrics = program.update(state, totals)
        updates.append(jax.device_get(metrics))
    return state, {
        name: _over_updates(name, [update[name] for update in updates]) for name in updates[0]
    }


def _over_updates(name: str, values: Sequence[Any]) -> float:
    if name in ("policy/gap", "policy/largest_gap"):
        return float(values[0])
    return float(
        np.sum(values) if name in ("tokens", "patches", "loss_tokens", "flops") else np.mean(values)
    )
