"""Rewards that cannot teach: what a run says of them, and when it stops."""

from collections.abc import Callable

from pvm_jax.data.processor import Processor
from pvm_jax.data.tags import plain_tags
from train.grpo.rollout import Completions
from train.rewards.pool import RewardTable

FIRST_STEPS = 5
"""A function whose values have all been the same after so many steps is spoken of."""
MOST_FAILED_STEPS = 3
"""A function that failed on everything for so many steps in a row ends the run."""
_THOUGHTS = "<think>"


class RewardWatch:
    """Looks at every step's table of rewards; process 0 has one."""

    def __init__(self, processor: Processor, say: Callable[[str], None]):
        """Args:
        processor: with which the prompts are read.
        say: takes a line about a reward that teaches nothing.
        """
        self._tags, self._say = plain_tags(processor.tokenizer), say
        self._steps = self._completions = self._truncated = 0
        self._failed: dict[str, int] = {}
        self._values: dict[str, set[float]] = {}

    def __call__(self, table: RewardTable | None, completions: Completions) -> None:
        """Takes a step's table (None: another process's).

        Raises:
            ValueError: if a function failed on every completion of the last steps.
        """
        if table is None:
            return
        count = len(completions.lengths)
        self._steps += 1
        self._completions += count
        self._truncated += int(completions.truncated.sum())
        for name, column in zip(table.names, table.values.T, strict=True):
            failed = table.failures[name] == count
            self._failed[name] = self._failed.get(name, 0) + 1 if failed else 0
            if self._failed[name] == MOST_FAILED_STEPS:
                raise ValueError(
                    f"reward {name} failed on every completion of the last {MOST_FAILED_STEPS}"
                    f" steps: {table.errors[name]}. Mend the function: the same command then"
                    " continues from the last step checkpoint"
                )
            if self._steps <= FIRST_STEPS:
                self._values.setdefault(name, set()).update(column.tolist())
            if self._steps == FIRST_STEPS and len(self._values[name]) == 1:
                self._say(self._nothing_to_learn(name, column[0]))

    def _nothing_to_learn(self, name: str, value: float) -> str:
        text = (
            f"reward {name} was {value:g} for every one of the {self._completions} completions of"
            f" the first {FIRST_STEPS} steps: so far it teaches nothing. "
        )
        if self._truncated > self._completions / 2:
            text += (
                f"max_completion_tokens cut {self._truncated} of them off, before their end was"
                " written. "
            )
        if value == 0 and _THOUGHTS in self._tags:
            text += (
                f"{_THOUGHTS} is a token of its own in this tokenizer, and Qwen3-VL-Instruct was"
                " never trained on it: tags_as_text writes it in letters. "
            )
        return text + (
            "The prompts may not ask for what it looks at, or be too hard or too easy: see"
            " rollout/sample in TensorBoard"
        )
