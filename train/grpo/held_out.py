"""What a GRPO run measures on prompts that it does not train on: rewards, lengths, sample
answers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pvm_jax.data.processor import Processor
from pvm_jax.model.qwen3_vl import Qwen3VL
from train.grpo.config import EvaluationConfig, GRPOConfig
from train.grpo.grading import RolloutGrader, completion_values, reward_values, sample_of, texts_of
from train.grpo.prompts import Prompt, load_prompts
from train.grpo.rollout import Completions, Sampler
from train.rewards.pool import RewardTable
from train.run.log import RunLog


class Evaluation:
    """Held-out prompts, answered on the rollout's mesh and graded as in training."""

    def __init__(
        self,
        config: GRPOConfig,
        held_out: EvaluationConfig,
        processor: Processor,
        sampler: Sampler,
        grade: RolloutGrader,
        draw: Sequence[int],
    ):
        """Raises ValueError as `load_prompts` does. `draw`: as `Sampler` takes it, the same at
        every measurement."""
        self.config = held_out
        self._processor, self._sampler, self._grade, self._draw = processor, sampler, grade, draw
        data = replace(config.data, sources=held_out.sources)
        self._prompts = load_prompts(
            data, processor, batch_size=config.prompts_per_step, all_of_them=True
        )
        self._threads, self._prefetch = config.data.threads, config.data.prefetch

    def write(self, log: RunLog, step: int, model: Qwen3VL) -> None:
        """Measures `model`, what `step` steps made of it: TensorBoard, and a line on the
        console."""
        with log.phase("held_out", step):
            prompts, completions, tables = self.answer(model)
            values = completion_values("held_out/completion", completions)
            if tables:  # process 0
                table = joined(tables)
                values |= reward_values("held_out/reward", table)
                log.print(
                    f"step {step}: held-out reward {table.totals.mean():.4f} of {len(prompts)}"
                    " prompts"
                )
                texts = texts_of(completions, self._processor)
                for number in range(min(self.config.shown, len(prompts))):
                    place = number * self.config.samples
                    sample = sample_of(prompts[number], texts[place], table.totals[place])
                    log.sample(step, f"sample/{number}", sample.markdown, sample.image)
            log.scalars(step, values)

    def answer(self, model: Qwen3VL) -> tuple[list[Prompt], Completions, list[RewardTable]]:
        """All prompts, their completions, and process 0's tables of rewards, one after the
        other."""
        prompts, parts, tables = [], [], []
        for batch in self._prompts.iterator(0, self._threads, self._prefetch):
            seeds = range(len(prompts), len(prompts) + len(batch.prompts))
            completions = self._sampler(
                model,
                batch,
                draw=self._draw,
                seeds=seeds,
                samples=self.config.samples,
                temperature=self.config.temperature,
            )
            _, table = self._grade(completions, batch.prompts)
            prompts += batch.prompts
            parts.append(completions)
            tables += [] if table is None else [table]
        return prompts, Completions(*map(np.concatenate, zip(*parts, strict=True))), tables


def joined(tables: Sequence[RewardTable]) -> RewardTable:
    """One table of the rows of all."""
    first = tables[0]
    return RewardTable(
        first.names,
        np.concatenate([table.values for table in tables]),
        np.concatenate([table.totals for table in tables]),
        {name: sum(table.failures[name] for table in tables) for name in first.names},
        {name: error for table in reversed(tables) for name, error in table.errors.items()},
    )
