"""Rewards of completions as a run needs them: process 0 grades, all others are told; and what the
log shows of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from pvm_jax.data.processor import Processor
from train.grpo.config import GRPOConfig
from train.grpo.prompts import Prompt
from train.grpo.rollout import Completions
from train.rewards.pool import Rewards, RewardTable
from train.run.samples import Sample, images_of, text_of


class RolloutGrader:
    """(completions, prompts) -> the completions' rewards [completions] float32, the same on every
    process, and process 0's table.

    A limit of time that one process's grader keeps and another's misses would part the processes
    for good: one grades for all.
    """

    def __init__(self, rewards: Rewards | None, processor: Processor, say: Callable[[str], None]):
        """Args:
        rewards: None on every process but the first.
        say: takes a line about rewards that failed.
        """
        self._rewards, self._processor, self._say = rewards, processor, say

    def __call__(
        self, completions: Completions, prompts: Sequence[Prompt]
    ) -> tuple[np.ndarray, RewardTable | None]:
        count = len(completions.tokens)
        totals, table = np.zeros(count, np.float32), None
        if self._rewards is not None:
            examples = [prompts[number * len(prompts) // count].columns for number in range(count)]
            table = self._rewards(texts_of(completions, self._processor), examples)
            for name, error in table.errors.items():
                self._say(
                    f"reward {name} failed on {table.failures[name]} of {count} completions, which"
                    f" get 0: {error}"
                )
            totals = table.totals.astype(np.float32)
        if jax.process_count() > 1:
            totals = multihost_utils.broadcast_one_to_all(totals)
        return totals, table


@contextmanager
def grading(
    config: GRPOConfig, processor: Processor, say: Callable[[str], None]
) -> Iterator[RolloutGrader]:
    """A grader with its worker processes.

    Raises:
        ValueError: for a reward function that cannot be imported.
    """
    if jax.process_index() != 0:
        yield RolloutGrader(None, processor, say)
        return
    with Rewards(
        config.rewards,
        time_limit=config.reward_time_limit,
        memory=config.reward_memory,
        workers=config.reward_workers,
    ) as rewards:
        yield RolloutGrader(rewards, processor, say)


def texts_of(completions: Completions, processor: Processor) -> list[str]:
    """What was written, without special tokens."""
    rows = zip(completions.tokens, completions.lengths, strict=True)
    return [processor.decode(tokens[:length]) for tokens, length in rows]


def reward_values(prefix: str, table: RewardTable | None) -> dict[str, float]:
    """Scalars for the log: mean and std of the sum, each function's mean and failures. Nothing
    without a table."""
    if table is None:
        return {}
    values = {f"{prefix}/mean": table.totals.mean(), f"{prefix}/std": table.totals.std()}
    for name, column in zip(table.names, table.values.T, strict=True):
        values |= {
            f"{prefix}/{name}": column.mean(),
            f"{prefix}/{name}/failures": table.failures[name],
        }
    return values


def completion_values(prefix: str, completions: Completions) -> dict[str, float]:
    """Scalars for the log: mean and longest length in tokens, share of truncated completions."""
    lengths = completions.lengths
    return {
        f"{prefix}/length": lengths.mean(),
        f"{prefix}/longest": lengths.max(),
        f"{prefix}/truncated": completions.truncated.mean(),
    }


def sample_of(prompt: Prompt, completion: str, reward: float) -> Sample:
    """A completion for the log, with its reward and the solution."""
    truth = f"{prompt.columns['solution']}\n\nreward {reward:.3f}"
    return Sample(text_of(prompt.messages), images_of(prompt.messages), completion, truth)
