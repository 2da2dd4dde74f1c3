"""Does what the model goes on to write follow the image, where that is exchanged or taken away in
the middle of its own answer?

TVC (arXiv 2503.13360) removes the image midway, VisualSwap (arXiv 2605.15864) exchanges it; both
grade the final answer. Here no question needs an answer that can be graded: what the model goes on
to write is compared with what it writes about either image when it is shown that one from the
beginning.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from pvm_jax.data.example import Example
from pvm_jax.measure.ablations import silence
from pvm_jax.measure.accuracy import go_on, prompt_of, teacher_forced
from pvm_jax.measure.pictures import exchanged
from pvm_jax.model.qwen3_vl import Qwen3VL

FRACTIONS = (0.0, 0.25, 0.5, 0.75)


class Midway(NamedTuple):
    """By answer token (at its position in the whole answer), of what is written after the cut; NaN
    before it and beyond the end.

    Attributes:
        follows: [fractions, conversations, answer], 1 where the token is the one that stands there
            in the answer about the new image, else 0; NaN also where the answers about both images
            have the same token.
        stays: the same for the answer about the image that was there first.
        evidence: [fractions, conversations, answer], log p(token | new image) - log p(token | the
            first one), in nats, all text before it being the same.
        removed: [fractions, conversations, answer], 1 where the token is the one that stands there
            in the answer about the image that was there first, else 0, the image being hidden from
            the decoder and the branch after the cut.
        written: by fraction and conversation, the whole answer with the image exchanged, ids.
    """

    follows: np.ndarray
    stays: np.ndarray
    evidence: np.ndarray
    removed: np.ndarray
    written: list[list[np.ndarray]]


def midway(
    model: Qwen3VL,
    examples: Sequence[Example],
    *,
    stop_tokens: Sequence[int],
    max_new_tokens: int,
    fractions: Sequence[float] = FRACTIONS,
    rows: int = 4,
    chunk: int = 256,
) -> Midway:
    """Lets the model write each conversation's last answer, keeps a fraction of it, exchanges the
    images for its partner's (`pictures.exchanged`) or hides them, and lets it go on, greedily.

    What was kept is read again beside the new image: of the first one nothing is left but the
    words.

    Args:
        fractions: of the answer's tokens that are kept, rounded down; the first is 0, the answer
            about the new image.

    Raises:
        ValueError: if the first fraction is not 0 or one is not below 1; for a conversation without
            answer, image or partner.
    """
    if not fractions or fractions[0] != 0 or not all(0 <= one < 1 for one in fractions):
        raise ValueError(f"fractions begin with 0 and are below 1, got {[*fractions]}")
    prompts = [prompt_of(example)[0] for example in examples]
    write = partial(
        go_on,
        stop_tokens=stop_tokens,
        max_new_tokens=max_new_tokens,
        rows=rows,
        among=[_behind(prompt, np.zeros(max_new_tokens, int)) for prompt in prompts],
    )
    first = write(model, prompts)
    kept = [[own[: int(one * len(own))] for own in first] for one in fractions]
    begun = [own for of_fraction in kept for own in of_fraction]
    shown = exchanged(prompts, model.config.vision) * len(fractions)
    shown, before = (
        [_behind(prompt, own) for prompt, own in zip(those, begun, strict=True)]
        for those in (shown, prompts * len(fractions))
    )
    blind = silence(model, [*map(int, model.pvm)])
    room = [max_new_tokens - len(own) for own in begun]
    after, unseen = (
        [more[:left] for more, left in zip(those, room, strict=True)]
        for those in (write(model, shown), write(blind, before, hide=True))
    )

    new, old = (
        teacher_forced(
            model,
            [_behind(p, more, learned=True) for p, more in zip(those, after, strict=True)],
            rows=rows,
            chunk=chunk,
        ).loss
        for those in (shown, before)
    )
    return _compared(first, begun, after, unseen, old - new, len(fractions))


def _compared(
    first: Sequence[np.ndarray],
    begun: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    unseen: Sequence[np.ndarray],
    evidence: np.ndarray,
    fractions: int,
) -> Midway:
    """The arrays of Midway.

    Args:
        first: by conversation, the answer about the first image.
        begun, after, unseen: by fraction and conversation, what was kept, and what follows it with
            the image exchanged, and hidden.
        evidence: [fractions * conversations, tokens after the cut].
    """
    count = len(first)
    longest = max(
        max(len(one), len(own) + len(more), len(own) + len(blind))
        for one, own, more, blind in zip([*first] * fractions, begun, after, unseen, strict=True)
    )
    old, new = (_padded(texts, longest) for texts in (first, after[:count]))
    found = np.full((4, len(begun), longest), np.nan, np.float32)
    for place, (own, more, blind) in enumerate(zip(begun, after, unseen, strict=True)):
        number, cut = place % count, len(own)
        there, gone = (slice(cut, cut + len(tokens)) for tokens in (more, blind))
        differ = old[number, there] != new[number, there]
        for row, answers in ((0, new), (1, old)):
            found[row, place, there] = np.where(differ, more == answers[number, there], np.nan)
        found[2, place, there] = evidence[place, : len(more)]
        found[3, place, gone] = blind == old[number, gone]
    texts = [np.concatenate(parts) for parts in zip(begun, after, strict=True)]
    written = [texts[start : start + count] for start in range(0, len(texts), count)]
    follows, stays, told, removed = found.reshape(4, fractions, count, longest)
    return Midway(follows, stays, told, removed, written)


def _padded(texts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """[texts, length], -1 beyond each one's end."""
    return np.stack([np.pad(ids, (0, length - len(ids)), constant_values=-1) for ids in texts])


def _behind(prompt: Example, tokens: np.ndarray, *, learned: bool = False) -> Example:
    """The prompt with `tokens` behind it; `learned`: they are its answer."""
    ids = np.concatenate([prompt.input_ids, tokens])
    mask = np.arange(len(ids)) >= len(prompt.input_ids) if learned else None
    return replace(prompt, input_ids=ids, loss_mask=mask)
