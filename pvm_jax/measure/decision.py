"""How early the final answer is decided: from which share of the text before it on it no longer
changes.

The protocol of early answering (Lanham et al., arXiv 2307.13702): the model's own text is cut
short, and the final answer asked for at once. What is decided early does not rest on what is
written, nor on what is seen, after that.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pvm_jax.data.example import Example
from pvm_jax.measure.accuracy import prompt_of, teacher_forced
from pvm_jax.model.qwen3_vl import Qwen3VL

SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


class FinalAnswer(NamedTuple):
    """Where an answer's last part stands: its token `cue`, from 0, begins what leads to it (as
    "<answer>"), its token `start` is the first of the final answer."""

    cue: int
    start: int


class Decision(NamedTuple):
    """By share of the text before the final answer.

    Attributes:
        same: [shares, conversations], 1 where the model, going on greedily, writes this very final
            answer, else 0.
        logprob: [shares, conversations], log p(final answer), in nats, all its tokens together.
        decided: [conversations], the least share from which on `same` stays 1; NaN where it is not
            even with all of the text (another model's answer).
    """

    same: np.ndarray
    logprob: np.ndarray
    decided: np.ndarray


def decision(
    model: Qwen3VL,
    examples: Sequence[Example],
    finals: Sequence[FinalAnswer],
    *,
    shares: Sequence[float] = SHARES,
    rows: int = 4,
    chunk: int = 256,
) -> Decision:
    """Measures `examples`, conversations with the model's own answers (`accuracy.answered`).

    Nothing is written for it: a greedy answer is this one if each of its tokens is the likeliest
    behind those before it.

    Args:
        finals: of each conversation's last answer.
        shares: of the tokens before the cue that are kept, ascending, from the front.

    Raises:
        ValueError: for a conversation without answer or image, or whose final answer is empty.
    """
    cut = [
        _shortened(example, final, share)
        for share in shares
        for example, final in zip(examples, finals, strict=True)
    ]
    found = teacher_forced(model, cut, rows=rows, chunk=chunk)
    shape = (len(shares), len(examples))
    same = np.nanmin(found.correct, axis=1).reshape(shape)
    logprob = -np.nansum(found.loss, axis=1).reshape(shape)
    return Decision(same, logprob, for_good(same, shares))


def for_good(same: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """[conversations], the least of the ascending `shares` from which on `same` [shares,
    conversations] stays 1; NaN where the last is 0."""
    stays = np.logical_and.accumulate(same[::-1] > 0, axis=0)
    return np.append(np.asarray(shares, float), np.nan)[len(shares) - stays.sum(0)]


def _shortened(example: Example, final: FinalAnswer, share: float) -> Example:
    """The prompt, `share` of the text before the cue, the cue and the final answer, which alone is
    the answer."""
    prompt, answer = prompt_of(example)
    if not 0 <= final.cue <= final.start < len(answer):
        raise ValueError(f"{final} is not inside an answer of {len(answer)} tokens")
    kept = answer[: round(share * final.cue)]
    ids = np.concatenate([prompt.input_ids, kept, answer[final.cue :]])
    learned = np.arange(len(ids)) >= len(ids) - (len(answer) - final.start)
    return replace(prompt, input_ids=ids, loss_mask=learned)


def final_after(
    ids: np.ndarray, marker: str, decode: Callable[[Sequence[int]], str]
) -> FinalAnswer | None:
    """The final answer of an answer's `ids` [length]: what follows the last `marker` in its text;
    None where there is no marker, or nothing behind it.

    Args:
        decode: token ids -> their text.
    """
    words = [decode([token]) for token in ids.tolist()]
    place = "".join(words).rfind(marker)
    if place < 0:
        return None
    ends = np.cumsum([len(word) for word in words])
    cue = int(np.searchsorted(ends, place, side="right"))
    start = int(np.searchsorted(ends, place + len(marker) - 1, side="right")) + 1
    return FinalAnswer(cue, start) if start < len(ids) else None
