"""What a report is about: the models that are compared, and what they are measured on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pvm_jax.data.example import Example
from pvm_jax.data.processor import Processor
from pvm_jax.measure.accuracy import Scorer, WrittenAnswers, answered, write
from pvm_jax.measure.decision import FinalAnswer
from pvm_jax.measure.reading import find_answers
from pvm_jax.model.qwen3_vl import Qwen3VL

WITH, WITHOUT = "with the branch", "without"
"""Names of a model and of the same weights with every gate at 0."""

Models = Mapping[str, Qwen3VL]
"""What is compared, by name; the first is the one that is looked into."""


@dataclass(frozen=True)
class Task:
    """What is measured on, and what counts in it.

    Attributes:
        examples: encoded conversations with their answers.
        processor: that encoded them.
        stop_tokens: that end an answer which a model writes.
        max_new_tokens: of such an answer.
        counted: what the tokens that count are called, in the report's words.
        counts: which tokens of an answer count for accuracy and for the lens: its ids [answer] ->
            [answer] bool; None: all of them.
        fillers: the conversations with filler text between image and question, by its tokens.
        ahead: with the same text before the image instead.
        grade, exactness: how a written answer is scored (`accuracy.write`), and what that means in
            the report's words.
        final, final_is: finds the final answer in a written answer's ids [length], and what it is
            in the report's words.
        looks: tokens whose attention is drawn, each by (number of the conversation, which token of
            what the model writes as its last answer, from 0); None: as far into that as the look
            stands in `looks`, so that they are spread. Where the model stops before, its last
            token.
        rows, chunk: conversations, and columns of them, that are computed together.

    What the models write themselves is kept (`written`): make a fresh task (`replace`) for other
    models.
    """

    examples: Sequence[Example]
    stop_tokens: Sequence[int]
    max_new_tokens: int
    processor: Processor
    counted: str = "tokens"
    counts: Callable[[np.ndarray], np.ndarray] | None = None
    fillers: Mapping[int, Sequence[Example]] = field(default_factory=dict)
    ahead: Mapping[int, Sequence[Example]] = field(default_factory=dict)
    grade: Scorer | None = None
    exactness: str = "answers that are the reference's, token by token, so far"
    final: Callable[[np.ndarray], FinalAnswer | None] = lambda ids: None
    final_is: str = "a final answer"
    looks: Sequence[tuple[int, int | None]] = ()
    rows: int = 4
    chunk: int = 256
    _written: dict[str, WrittenAnswers] = field(default_factory=dict, init=False, repr=False)

    def counting(self, values: np.ndarray, examples: Sequence[Example] | None = None) -> np.ndarray:
        """`values` [conversations, ..., answer] by answer token, NaN where a token does not
        count."""
        if self.counts is None:
            return values
        examples = self.examples if examples is None else examples
        columns, real = find_answers(examples)
        kept = (
            np.stack([self.counts(e.input_ids[c]) for e, c in zip(examples, columns, strict=True)])
            & real
        )
        return np.where(kept.reshape(len(kept), *(1,) * (values.ndim - 2), -1), values, np.nan)


def written(name: str, model: Qwen3VL, task: Task) -> WrittenAnswers:
    """What `model` writes itself in the place of the last answers of the task's conversations,
    graded: once for all measurements that ask this task under this name."""
    kept = task._written
    if name not in kept:
        kept[name] = write(
            model,
            task.examples,
            stop_tokens=task.stop_tokens,
            max_new_tokens=task.max_new_tokens,
            grade=task.grade,
            rows=task.rows,
        )
    return kept[name]


def own_answers(name: str, model: Qwen3VL, task: Task) -> list[Example]:
    """The task's conversations, each with what the model writes itself in place of its last
    answer."""
    return answered(task.examples, written(name, model, task).tokens)
