"""How well the answer is predicted (teacher-forced) and written (free-running), token by token."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pvm_jax.data.batch import Batch, hide_images
from pvm_jax.data.example import Example
from pvm_jax.generation import generate
from pvm_jax.measure.reading import (
    at_predicting,
    columns_of,
    find_answers,
    only_if,
    predicts_an_answer,
    read,
)
from pvm_jax.model.decoder import Inner
from pvm_jax.model.pieces import Piece, inspect
from pvm_jax.model.qwen3_vl import Qwen3VL

Scorer = Callable[[int, np.ndarray], np.ndarray]
"""(number of the conversation, written token ids [tokens]) -> a score in [0, 1] for each of at most
that many, NaN where none is due."""


class TeacherForced(NamedTuple):
    """By answer token, of all conversations with `answer` tokens at most (NaN beyond an answer's
    end), all before it being the truth.

    Attributes:
        correct: [conversations, answer], 1 where the likeliest token is the true one, else 0.
        loss: [conversations, answer], -log p(true token), in nats.
    """

    correct: np.ndarray
    loss: np.ndarray


def teacher_forced(
    model: Qwen3VL,
    examples: Sequence[Example],
    *,
    rows: int = 4,
    chunk: int = 256,
    hide: bool = False,
) -> TeacherForced:
    """Measures `examples`, encoded conversations; see `reading.read`.

    Raises:
        ValueError: for a conversation without answer or image.
    """
    answers = find_answers(examples)
    found = read(
        model, examples, program, columns=answers.columns, rows=rows, chunk=chunk, hide=hide
    )
    return TeacherForced(*(answers.where_real(values) for values in found))


def program(model: Qwen3VL, batch: Batch, columns: jax.Array, chunk: int) -> list[jax.Array]:
    """A `reading.Program`: whether each token of the answers is the likeliest, and its loss, [B,
    answer] each."""
    following = jnp.pad(jnp.asarray(batch.tokens)[:, 1:], ((0, 0), (0, 1)))
    wanted = predicts_an_answer(batch)

    def look(piece: Piece, inner: Inner) -> None:
        return None

    def conclude(piece: Piece, hidden: jax.Array, layers: list) -> tuple[jax.Array, jax.Array]:
        def compare() -> tuple[jax.Array, jax.Array]:
            logprobs, true = jax.nn.log_softmax(model.logits(hidden)), columns_of(following, piece)
            loss = -jnp.take_along_axis(logprobs, true[..., None], -1)[..., 0]
            return jnp.argmax(logprobs, -1) == true, loss

        return only_if(columns_of(wanted, piece).any(), compare)

    return [at_predicting(x, columns) for x in inspect(model, batch, look, conclude, chunk=chunk)]


class WrittenAnswers(NamedTuple):
    """What a model wrote itself, greedily, in the place of each conversation's last answer.

    Attributes:
        score: [conversations, tokens], by position in the answer, as graded; NaN where no score is
            due.
        lengths: [conversations], tokens written, the stop token included.
        tokens: by conversation, the ids [length].
    """

    score: np.ndarray
    lengths: np.ndarray
    tokens: list[np.ndarray]


def write(
    model: Qwen3VL,
    examples: Sequence[Example],
    *,
    stop_tokens: Sequence[int],
    max_new_tokens: int,
    grade: Scorer | None = None,
    rows: int = 4,
) -> WrittenAnswers:
    """Lets the model write each conversation's last answer.

    Args:
        grade: scores what was written; None: a position scores 1 while all tokens up to it are the
            reference's, up to the reference's end or `max_new_tokens`, so that the mean over
            conversations is the share still exact.

    Raises:
        ValueError: for a conversation without answer or image.
    """
    find_answers(examples)  # refuses by number
    cut = [prompt_of(example) for example in examples]
    references = [reference for _, reference in cut]
    prompts = [prompt for prompt, _ in cut]
    tokens = go_on(
        model, prompts, stop_tokens=stop_tokens, max_new_tokens=max_new_tokens, rows=rows
    )
    grade = grade or (
        lambda number, written: exact_so_far(written, references[number][:max_new_tokens])
    )
    scores = [
        np.asarray(grade(number, written), np.float32) for number, written in enumerate(tokens)
    ]
    longest = max(map(len, scores))
    padded = [np.pad(score, (0, longest - len(score)), constant_values=np.nan) for score in scores]
    return WrittenAnswers(np.stack(padded), np.array([len(written) for written in tokens]), tokens)


def go_on(
    model: Qwen3VL,
    prompts: Sequence[Example],
    *,
    stop_tokens: Sequence[int],
    max_new_tokens: int,
    rows: int = 4,
    hide: bool = False,
    among: Sequence[Example] | None = None,
) -> list[np.ndarray]:
    """What the model writes behind each prompt, greedily: ids [length], the stop token included.

    Args:
        hide: the decoder does not see the images, the branch alone does (`hide_images`).
        among: what the batches have room for (default: `prompts`): calls with the same room share
            compiled programs.
    """
    rows, tokens = min(rows, len(prompts)), []
    for start in range(0, len(prompts), rows):
        members = [prompts[i % len(prompts)] for i in range(start, start + rows)]
        batch = Batch.from_examples(members, model.config, among=among or prompts)
        got = generate(
            model,
            hide_images(batch, [hide] * rows),
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            stop_tokens=tuple(stop_tokens),
        )
        ids, lengths = np.asarray(got.tokens), np.asarray(got.lengths)
        tokens += [row[:length] for row, length in zip(ids, lengths, strict=True)]
    return tokens[: len(prompts)]


def answered(examples: Sequence[Example], written: Sequence[np.ndarray]) -> list[Example]:
    """The conversations up to their last answers, with `written` in place of these: by
    conversation, ids [length]. They alone are the answers (`find_answers`)."""
    found = []
    for example, tokens in zip(examples, written, strict=True):
        prompt = prompt_of(example)[0].input_ids
        ids = np.concatenate([prompt, tokens])
        mask = np.arange(len(ids)) >= len(prompt)
        found.append(replace(example, input_ids=ids, loss_mask=mask))
    return found


def exact_so_far(written: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """[len(reference)]: 1 where all tokens up to this one are the reference's, else 0."""
    agree = np.zeros(len(reference), bool)
    common = min(len(written), len(reference))
    agree[:common] = written[:common] == reference[:common]
    return np.logical_and.accumulate(agree).astype(np.float32)


def prompt_of(example: Example) -> tuple[Example, np.ndarray]:
    """The conversation up to its last answer, and that answer's token ids [answer]."""
    learned = find_answers([example]).columns[0]
    start = learned[np.flatnonzero(np.diff(learned, prepend=-2) > 1)[-1]]
    return replace(example, input_ids=example.input_ids[:start], loss_mask=None), example.input_ids[
        learned[learned >= start]
    ]
