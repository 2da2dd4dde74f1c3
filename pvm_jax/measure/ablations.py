"""The same weights with one thing taken away: the branch, one of its layers, its image, or the
image altogether."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from pvm_jax.data.batch import Batch
from pvm_jax.data.example import Example
from pvm_jax.data.messages import ChatMessages, Messages, variables_of
from pvm_jax.data.processor import Processor
from pvm_jax.measure.accuracy import TeacherForced, teacher_forced
from pvm_jax.measure.pictures import blanked, exchanged, partners
from pvm_jax.model.memory import Memory
from pvm_jax.model.qwen3_vl import Qwen3VL
from pvm_jax.model.vision import Visual

AS_IT_IS = "as it is"
BRANCH_OFF = "branch off"
BRANCH_MISLED = "branch on another image"
BRANCH_ALONE = "image for the branch alone"
IMAGE_SWAPPED = "another image"
IMAGE_BLANK = "blank image"


def ablations(
    model: Qwen3VL, examples: Sequence[Example], *, rows: int = 4, chunk: int = 256
) -> dict[str, TeacherForced]:
    """Teacher-forced accuracy and loss of `examples` under each ablation, by its name.

    Of every model: as it is; the image swapped for another conversation's (chance); the image
    blank. With a branch also: the branch off; each of its layers off; the branch, and nothing else,
    shown that other conversation's image; the image hidden from the decoder, so that only the
    branch sees it. The other conversation is the partner (`pictures.partners`).

    Raises:
        ValueError: for a conversation without answer, image or partner.
    """
    layers = sorted(map(int, model.pvm))
    models = {AS_IT_IS: model}
    if layers:
        models[BRANCH_OFF] = silence(model, layers)
        if len(layers) > 1:
            models |= {f"branch of layer {layer} off": silence(model, [layer]) for layer in layers}
    shown = {
        IMAGE_SWAPPED: exchanged(examples, model.config.vision),
        IMAGE_BLANK: blanked(examples),
    }
    by_model = {
        name: teacher_forced(one, examples, rows=rows, chunk=chunk) for name, one in models.items()
    }
    if layers:
        by_model[BRANCH_MISLED] = _misled(model, examples, rows, chunk)
        by_model[BRANCH_ALONE] = teacher_forced(model, examples, rows=rows, chunk=chunk, hide=True)
    return by_model | {
        name: teacher_forced(model, others, rows=rows, chunk=chunk)
        for name, others in shown.items()
    }


def by_filler(
    models: Mapping[str, Qwen3VL],
    examples: Mapping[int, Sequence[Example]],
    *,
    guess: bool = True,
    rows: int = 4,
    chunk: int = 256,
) -> dict[str, dict[int, TeacherForced]]:
    """Teacher-forced accuracy and loss, by model and by tokens of filler (`with_filler`).

    Args:
        guess: also of the first model with the images exchanged, which is what guessing gives,
            under the name IMAGE_SWAPPED.
    """

    def measured(
        model: Qwen3VL, shown: Mapping[int, Sequence[Example]]
    ) -> dict[int, TeacherForced]:
        return {
            n: teacher_forced(model, those, rows=rows, chunk=chunk) for n, those in shown.items()
        }

    found = {name: measured(model, examples) for name, model in models.items()}
    if guess:
        first = next(iter(models.values()))
        swapped = {n: exchanged(those, first.config.vision) for n, those in examples.items()}
        found[IMAGE_SWAPPED] = measured(first, swapped)
    return found


def silence(model: Qwen3VL, layers: Sequence[int]) -> Qwen3VL:
    """`model` with the gates of these layers' branches at 0: their update is exactly 0. No new
    program needs compiling.

    Raises:
        ValueError: for a layer without a branch.
    """
    if unknown := [layer for layer in layers if str(layer) not in model.pvm]:
        raise ValueError(
            f"no branch at layers {unknown}: there is one at {sorted(map(int, model.pvm))}"
        )
    paths = {("pvm", str(layer), "gate_alpha") for layer in layers}
    graphdef, params = nnx.split(model)
    return nnx.merge(
        graphdef,
        nnx.map_state(
            lambda path, leaf: jnp.zeros_like(leaf) if _key(path) in paths else leaf, params
        ),
    )


def _key(path: tuple) -> tuple[str, ...]:
    return tuple(str(part) for part in path)


class Misled(Qwen3VL):
    """The model with one thing wrong: each row's branch reads the memory of the row before. The
    decoder sees its own image."""

    def memorize(self, visual: Visual | None, batch: Batch) -> dict[str, Memory]:
        return jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), super().memorize(visual, batch))


def mislead(model: Qwen3VL) -> Qwen3VL:
    """`model` as a Misled: if the branch recalls the image, it answers worse."""
    return nnx.merge(nnx.graphdef(Misled(model.config, rngs=None)), nnx.state(model))


def _misled(model: Qwen3VL, examples: Sequence[Example], rows: int, chunk: int) -> TeacherForced:
    """`teacher_forced` of `mislead`, each conversation in the row after its partner: an even number
    of rows parts no pair."""
    pairs = zip([examples[number] for number in partners(examples)], examples, strict=True)
    in_turn = [example for pair in pairs for example in pair]
    found = teacher_forced(mislead(model), in_turn, rows=max(rows // 2 * 2, 2), chunk=chunk)
    return TeacherForced(*(values[1::2] for values in found))


FILLER = """\
The road ran beside the river for most of the way. It had rained in the night and the fields were \
still wet. A man was mending a fence and did not look up. Further on there was a mill that no \
longer worked, and behind it a row of poplars. Nobody spoke. After an hour they came to a village \
where it was market day, and stopped to let the horses drink. """


def with_filler(
    messages: Messages,
    tokens: int,
    processor: Processor,
    text: str = FILLER,
    *,
    ahead: bool = False,
) -> Messages:
    """The conversation with `tokens` tokens of `text`, repeated, between its first turn's images
    and what follows them, or, with `ahead`, before these images: as much text, and no distance.

    Whole words and the line break that ends them; if no word of `text` is a single token, they can
    be a little more.

    Raises:
        ValueError: if no user turn shows an image.
    """
    if not tokens:
        return messages
    for number, message in enumerate(messages):
        content = message.get("content")
        parts = (
            [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
        )
        visual = [
            place for place, part in enumerate(parts) if part.get("type") in ("image", "video")
        ]
        if message.get("role") == "user" and visual:
            place = visual[0] if ahead else visual[-1] + 1
            parts.insert(place, {"type": "text", "text": _words(tokens, processor, text)})
            filled = [*messages]
            filled[number] = dict(message) | {"content": parts}
            return ChatMessages(filled, variables_of(messages))
    raise ValueError("no user turn shows an image: there is nowhere to put filler text")


def _words(tokens: int, processor: Processor, text: str) -> str:
    words = text.split()

    def write(words: Sequence[str]) -> str:
        return " ".join(words) + "\n"

    def count(words: Sequence[str]) -> int:
        return len(processor.tokenizer(write(words), add_special_tokens=False)["input_ids"])

    taken = [words[i % len(words)] for i in range(tokens)]  # a word is at least one token
    low, high = 0, len(taken)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(taken[:middle]) <= tokens else (low, middle - 1)
    taken = taken[:low]
    short = min(words, key=lambda word: count([words[0], word]))
    while count(taken) < tokens:  # where the next word is too long
        taken.append(short)
    return write(taken)
