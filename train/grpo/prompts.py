"""Prompts with their solutions, in an order that the seed alone decides: what each step of a GRPO
run asks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from pvm_jax.data.example import Example
from pvm_jax.data.messages import Messages, asked
from pvm_jax.data.processor import Processor
from pvm_jax.data.stored import Conversations
from train.config import Bucket, ExamplesConfig
from train.data.loading import (
    PlannedExamples,
    open_sources,
    place_of,
    plan_examples,
    read_ahead,
)
from train.data.sizes import measure
from train.run.samples import text_of


class Prompt(NamedTuple):
    """What is asked, and what the reward functions know about it.

    Attributes:
        messages: the conversation, without the answer.
        example: the same, encoded up to the beginning of the answer.
        columns: the record's other columns; `solution` is always among them.
    """

    messages: Messages
    example: Example
    columns: Mapping[str, Any]


class PromptBatch(NamedTuple):
    """Prompts of a step, all of which `bucket` holds."""

    bucket: Bucket
    prompts: list[Prompt]


@dataclass(frozen=True)
class PromptData(PlannedExamples):
    """The prompts of a run. Element i of `steps` is step i's, the same on every host."""

    steps: grain.MapDataset[PromptBatch]

    def iterator(self, start: int, threads: int, prefetch: int) -> Iterator[PromptBatch]:
        """The prompts from step `start` on, read ahead in `threads` threads."""
        return read_ahead(self.steps, start, threads, prefetch)


def load_prompts(
    data: ExamplesConfig,
    processor: Processor,
    *,
    batch_size: int,
    epochs: int = 1,
    max_steps: int | None = None,
    seed: int = 0,
    sources: Sequence[Conversations] | None = None,
    sizes_file: Path | None = None,
    all_of_them: bool = False,
) -> PromptData:
    """Measures every prompt and lays out the steps of the run, `batch_size` prompts of one bucket
    each.

    Args:
        sources: those of `data`, where they are open, with every column.
        all_of_them: the last step of each bucket may have fewer prompts, so that none is left over.

    Raises:
        FileNotFoundError, ValueError: as `load_training_data`, and for a record that is no prompt
            with a solution.
    """
    opened = open_sources(data, every_column=True) if sources is None else sources

    def asks(source: Conversations, index: int) -> Messages:
        return read_record(source, index)[0]

    def measure_all() -> np.ndarray:
        count = partial(processor.count, add_generation_prompt=True)
        return np.concatenate(
            [
                measure(source, count, data.threads, read=asks, videos=data.videos)
                for source in opened
            ]
        )

    planned = plan_examples(
        data,
        opened,
        measure_all,
        batch_size=batch_size,
        packing=False,
        epochs=epochs,
        max_steps=max_steps,
        seed=seed,
        sizes_file=sizes_file,
        fill_last=all_of_them,
    )

    def read(step: int) -> PromptBatch:
        examples = [example for row in planned.plan.rows(step) for example in row]
        prompts = [read_prompt(*place_of(opened, example), processor) for example in examples]
        for example, prompt in zip(examples, prompts, strict=True):
            planned.check(example, prompt.example)
        return PromptBatch(planned.buckets[planned.plan.bucket(step)], prompts)

    return PromptData(**vars(planned), steps=grain.MapDataset.range(len(planned.plan)).map(read))


def read_prompt(source: Conversations, index: int, processor: Processor) -> Prompt:
    """The prompt that is conversation `index` of `source`.

    Raises:
        ValueError: naming the record, if it is no prompt or has no solution.
    """
    messages, columns = read_record(source, index)
    with source.naming(index):
        return Prompt(messages, processor.encode(messages, add_generation_prompt=True), columns)


def read_record(source: Conversations, index: int) -> tuple[Messages, dict[str, Any]]:
    """What conversation `index` of `source` asks, and its other columns with the solution.

    Raises:
        ValueError: naming the record, if it asks nothing, or its solution is missing or neither a
            text nor a number.
    """
    conversation, columns = source[index], source.columns(index)
    with source.naming(index):
        messages = asked(conversation)
        solution = columns.get("solution")
        if solution is None:
            if len(messages) == len(conversation):
                raise ValueError(
                    "there is no solution: give the record one, or an assistant turn at the end,"
                    " which is then it"
                )
            columns["solution"] = text_of(conversation[-1:])
            if not columns["solution"].strip():
                raise ValueError(
                    "the assistant turn at the end, which is the solution, has no text"
                )
        elif not (
            solution.strip()
            if isinstance(solution, str)
            else isinstance(solution, Real) and math.isfinite(solution)
        ):
            raise ValueError(f"the solution must be a text or a number, got {solution!r}")
        return messages, columns
