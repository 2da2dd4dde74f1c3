"""What the model still sees of the image over a long answer, with and without the branch:
`pvm_jax.measure` on the demo's task.

The values alone count: a line's value can be known only from the image. A line that the model
writes itself is exact if it names a pair of the grid that it has not listed before, with the
scene's value. Scenes are made of digit images that were held out from training; every distance has
the same scenes and the same lines.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from demo.task import VALUES, GridExample, Mixture, draw, make_example
from pvm_jax.checkpoint.store import load
from pvm_jax.data.example import Example as Encoded
from pvm_jax.data.processor import Processor
from pvm_jax.data.side_files import read_stop_tokens
from pvm_jax.measure.accuracy import teacher_forced
from pvm_jax.measure.reading import find_answers
from pvm_jax.measure.report.command import compared, report_on
from pvm_jax.measure.report.task import Task
from pvm_jax.model.qwen3_vl import Qwen3VL, without_pvm
from pvm_jax.options import run_as_command

TOKENS_PER_LINE = 3
LORA_ALONE = "LoRA alone"
TITLE = "What the demo's model sees over a long answer"
MEASURED = ("dilution", "accuracy", "samples", "ablations", "looked", "lens", "cost", "dependency")
"""What fits the demo's minutes. Its answers have no final answer, its pictures no boxes."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
        distances: filler words between image and question, for accuracy by distance.
        ahead: filler words ahead of the image.
        scenes: scenes for these two, the same ones at every number of words.
        lines: lines of each of their true answers.
        size: side G of the grids.
        long_scenes: scenes for everything else: answers of `shortest` to `lines` lines, `distance`
            filler words.
        shortest, distance: of these.
        looks: values whose attention is drawn.
        batch_size: conversations that are computed together.
        seed: of the scenes.
    """

    distances: tuple[int, ...] = (0, 200, 400, 800, 1600)
    ahead: tuple[int, ...] = (0, 800)
    scenes: int = 32
    lines: int = 48
    size: int = 4
    long_scenes: int = 16
    shortest: int = 8
    distance: int = 400
    looks: int = 6
    batch_size: int = 8
    seed: int = 10_000

    def examples(
        self, distance: int, count: int, shortest: int | None = None, ahead: int = 0
    ) -> list[GridExample]:
        """The first `count` scenes, `distance` filler words from the question, `ahead` before the
        image; `shortest`: fewest lines, if not all."""
        mixture = Mixture(
            sizes=(self.size,),
            lines=(shortest or self.lines, self.lines),
            filler=(distance, distance),
            ahead=(ahead, ahead),
            digits="heldout",
            seed=self.seed,
        )
        return [make_example(mixture, index) for index in range(count)]


def encode(examples: Sequence[GridExample], processor: Processor) -> list[Encoded]:
    """The conversations, true answers included, with their images drawn."""
    return [processor.encode(example.messages(draw(example.scene))) for example in examples]


def sees(
    model: Qwen3VL,
    examples: Sequence[Encoded],
    settings: EvaluationSettings,
    *,
    hide: bool = False,
) -> np.ndarray:
    """Whether the likeliest token at each line's value is the value: [scenes, lines] bool; `hide`:
    with the image hidden from the decoder."""
    places = np.stack([value_places(example, settings.lines) for example in examples])
    correct = teacher_forced(model, examples, rows=settings.batch_size, hide=hide).correct
    return np.take_along_axis(correct, places, axis=1) > 0


def value_places(example: Encoded, lines: int) -> np.ndarray:
    """Which of the answer's tokens are its values [lines]: the last one of each line; the answer
    ends with the turn's end."""
    length = int(find_answers([example]).lengths[0])
    if length != lines * TOKENS_PER_LINE + 1:
        raise ValueError(
            f"an answer of {lines} lines has {length} tokens, not {TOKENS_PER_LINE} a line and an"
            " end: the checkpoint's tokenizer is not the demo's (python -m demo.checkpoint)"
        )
    return np.arange(TOKENS_PER_LINE - 1, length - 1, TOKENS_PER_LINE)


def make_task(checkpoint: Path, processor: Processor, settings: EvaluationSettings) -> Task:
    """The demo's task as the measurements take it."""
    long = settings.examples(settings.distance, settings.long_scenes, settings.shortest)
    values = _ids(processor, [f" {value}\n" for values in VALUES.values() for value in values])
    encoded = encode(long, processor)
    looks = np.linspace(0, len(long) - 1, settings.looks).round().astype(int)
    shares = np.linspace(0, 0.95, settings.looks)
    return Task(
        examples=encoded,
        processor=processor,
        stop_tokens=read_stop_tokens(checkpoint),
        max_new_tokens=settings.lines * TOKENS_PER_LINE + 1,
        counted="values",
        counts=lambda ids: np.isin(ids, values),
        fillers={
            distance: encode(settings.examples(distance, settings.scenes), processor)
            for distance in settings.distances
        },
        ahead={
            words: encode(settings.examples(0, settings.scenes, ahead=words), processor)
            for words in settings.ahead
        },
        grade=lambda number, ids: grade(ids, long[number], processor),
        exactness=(
            "lines that name a pair of the grid not listed before, with the value that it has"
        ),
        looks=[
            (
                int(number),
                int(
                    value_places(encoded[number], len(long[number].lines))[
                        int(share * len(long[number].lines))
                    ]
                ),
            )
            for number, share in zip(looks, shares, strict=True)
        ],
        rows=settings.batch_size,
    )


def grade(
    ids: np.ndarray, example: GridExample, processor: Processor, *, again: bool = False
) -> np.ndarray:
    """[tokens]: at the token that ends a written line, 1 if the line is right, else 0; NaN at all
    others.

    Right is a pair of this grid that was not listed before (unless `again`), with the value that
    the scene has.
    """
    scores, seen, words = np.full(len(ids), np.nan), set(), ""
    for place, token in enumerate(ids):
        words += processor.decode([token])
        if words.endswith("\n"):
            cell, name, value = (*words[:-1].split(" "), None, None, None)[:3]
            known = (
                words.count(" ") == 2 and cell in example.scene.cells and name in example.attributes
            )
            right = (
                known
                and (again or (cell, name) not in seen)
                and example.scene.value(str(cell), str(name)) == value
            )
            scores[place] = right
            seen.add((cell, name))
            words = ""
    return scores


def _ids(processor: Processor, words: Sequence[str]) -> list[int]:
    """One id a word."""
    tokens = [processor.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    if any(len(ids) != 1 for ids in tokens):
        raise ValueError(
            "a value is more than one token: the tokenizer is not the demo's (python -m"
            " demo.checkpoint)"
        )
    return [ids[0] for ids in tokens]


def main(
    out: Path,
    checkpoint: Path,
    branch: Path | None = None,
    lora: Path | None = None,
    settings: EvaluationSettings = EvaluationSettings(),
) -> None:
    """Measures a checkpoint with and without its branch, and with LoRA in its place; writes
    report.html, report.json and figures/ to `out`.

    Example: python -m demo.evaluate out/demo/report out/demo/checkpoint --branch
        out/demo/run/branch

    Args:
        out: folder for the report.
        checkpoint: the base model (Orbax).
        branch: a branch that was trained on it; without one, the checkpoint's own.
        lora: an adapter that was trained on the same base without a branch, to compare with.
        settings: what is measured.
    """
    processor = Processor.from_pretrained(checkpoint)
    about = [
        (
            f"A model of two million parameters lists what is in grids of {settings.size} x"
            f" {settings.size} real handwritten digits, a value a line (B3 ground navy):"
            f" {settings.long_scenes} held-out scenes, answers of {settings.shortest} to"
            f" {settings.lines} lines, {settings.distance} words between image and question"
            f" (accuracy by distance: {settings.scenes} scenes, {settings.lines} lines). Only"
            " values count, since they can be known from the image alone."
        ),
        "Intervals are 95%, by resampling scenes.",
    ]
    models = compared(load(checkpoint, branch=branch), {})
    if lora:
        models[LORA_ALONE] = without_pvm(load(checkpoint, lora=lora))
    report_on(
        models,
        make_task(checkpoint, processor, settings),
        out,
        only=MEASURED,
        title=TITLE,
        about=about,
        settings=asdict(settings)
        | {"checkpoint": str(checkpoint), "branch": str(branch), "lora": str(lora)},
    )


if __name__ == "__main__":
    run_as_command(main)
