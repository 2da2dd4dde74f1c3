"""What demo.compare measures of a model: accuracy by words between image and question, by words
ahead of the image, in its own answers, and of a branch where it looks."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from demo.evaluate import TOKENS_PER_LINE, EvaluationSettings, encode, grade, sees
from demo.recall import attention_on_cell
from demo.task import GridExample
from pvm_jax.data.processor import Processor
from pvm_jax.data.side_files import read_stop_tokens
from pvm_jax.measure.ablations import mislead
from pvm_jax.measure.accuracy import write
from pvm_jax.measure.pictures import exchanged
from pvm_jax.model.qwen3_vl import Qwen3VL
from train.config import Trainable
from train.run.events import read_values
from train.step.state import split_model

UNTRAINED = "base"
BETWEEN, AHEAD, WRITTEN = "words between", "words ahead", "late in its own answer"
OTHER, MISLED, ALONE = "another image", "branch on another image", "image for the branch alone"


@dataclass(frozen=True)
class Curves:
    """What is measured, on the same held-out scenes of 4 x 4 cells with answers of 48 lines.

    Attributes:
        between: words between image and question.
        ahead: words ahead of the image, which stands beside the question.
        controls: words between, at which the branch is measured on another image, and alone.
        written: words between, at which the model writes the answer itself.
        scenes: how many.
        seed: of the scenes.
    """

    between: Sequence[int] = (0, 200, 400, 800, 1600)
    ahead: Sequence[int] = (400, 800, 1600)
    controls: Sequence[int] = (200, 800)
    written: Sequence[int] = (200,)
    scenes: int = 48
    seed: int = 10_000

    def __post_init__(self):
        if self.scenes < 2:
            raise ValueError("curves.scenes: a single scene has no other image to show; take more")


@dataclass(frozen=True)
class Measured:
    """One trained model, or the base.

    Attributes:
        method, table, seed, rate: of the training; seed and rate are None for the base.
        trained: parameters that were trained.
        tokens: that were read.
        curves: by name and words: the share of values read correctly, for each scene. Of WRITTEN,
            the share of right lines in the last third of what the model writes.
        attention: of the branch on the asked cell, by words between, layer and head.
        gates: of the branch, by layer, at every step of the training.
    """

    method: str
    table: str
    seed: int | None
    rate: float | None
    trained: int
    tokens: int
    curves: dict[str, dict[str, list[float]]]
    attention: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    gates: dict[str, list[float]] = field(default_factory=dict)


def once(file: Path, measure: Callable[[], Measured]) -> Measured:
    """What `measure` gives, kept in `file` for the next time."""
    if not file.exists():
        content = json.dumps(asdict(measure()))
        file.write_text(content)
        print(f"measured: {file}", flush=True)
    return Measured(**json.loads(file.read_text()))


def measure(
    model: Qwen3VL,
    checkpoint: Path,
    curves: Curves,
    *,
    trained: Sequence[Trainable],
    about: Mapping[str, Any],
    logs: Sequence[Path] = (),
) -> Measured:
    """A model; of the base (nothing `trained`) also what it guesses about other images, of a branch
    also its controls and its gates in `logs`.

    Args:
        checkpoint: the base's folder, for its tokenizer.
        about: method, table, seed and rate.
    """
    scenes = Scenes(curves, checkpoint)
    found = {
        BETWEEN: {words: scenes.sees(model, scenes.examples(words)) for words in curves.between},
        AHEAD: {words: scenes.sees(model, scenes.examples(0, words)) for words in curves.ahead},
        WRITTEN: {words: scenes.writes(model, words) for words in curves.written},
    }
    attention, gates = {}, {}
    if not trained:
        found[OTHER] = {
            words: scenes.sees(model, scenes.examples(words), other=True)
            for words in curves.between
        }
    if "pvm" in trained:
        misled, gates = mislead(model), read_gates(*logs)
        for name, one, hide in ((MISLED, misled, False), (ALONE, model, True)):
            found[name] = {
                words: scenes.sees(one, scenes.examples(words), hide=hide)
                for words in curves.controls
            }
        attention = {
            str(words): attention_on_cell(
                model, scenes.processor, scenes.examples(words), scenes.settings
            )
            for words in curves.controls
        }
    values = {
        name: {str(words): np.round(shares, 4).tolist() for words, shares in by_words.items()}
        for name, by_words in found.items()
        if by_words
    }
    return Measured(
        **about,
        trained=sum(
            leaf.size
            for part in set(trained)
            for leaf in jax.tree.leaves(split_model(model, part)[1])
        ),
        tokens=sum(read_tokens(log) for log in logs),
        curves=values,
        attention=attention,
        gates=gates,
    )


class Scenes:
    """The scenes of a measurement, and what a model sees in them."""

    def __init__(self, curves: Curves, checkpoint: Path):
        self.settings = replace(EvaluationSettings(), scenes=curves.scenes, seed=curves.seed)
        self.checkpoint, self.processor = checkpoint, Processor.from_pretrained(checkpoint)

    def examples(self, between: int, ahead: int = 0) -> list[GridExample]:
        return self.settings.examples(between, self.settings.scenes, ahead=ahead)

    def sees(
        self,
        model: Qwen3VL,
        examples: Sequence[GridExample],
        *,
        other: bool = False,
        hide: bool = False,
    ) -> np.ndarray:
        """[scenes]: the share of the values that are the likeliest token at their place; `other`:
        about another scene's image, `hide`: the image hidden from the decoder."""
        encoded = encode(examples, self.processor)
        if other:
            encoded = exchanged(encoded, model.config.vision)
        return sees(model, encoded, self.settings, hide=hide).mean(1)

    def writes(self, model: Qwen3VL, words: int) -> np.ndarray:
        """[scenes]: of the lines that the model writes itself, greedily, the share of the last
        third that is right, be the pair listed again or not (`evaluate.grade`)."""
        examples = self.examples(words)
        encoded = encode(examples, self.processor)
        scores = write(
            model,
            encoded,
            stop_tokens=read_stop_tokens(self.checkpoint),
            max_new_tokens=TOKENS_PER_LINE * self.settings.lines + 1,
            rows=self.settings.batch_size,
            grade=lambda number, ids: grade(ids, examples[number], self.processor, again=True),
        ).score
        lines = [row[np.isfinite(row)] for row in scores]
        return np.array(
            [row[len(row) - len(row) // 3 :].mean() if len(row) > 2 else 0 for row in lines]
        )


def read_gates(*logs: Path) -> dict[str, list[float]]:
    """The gates at every step of trainings that followed one another, by layer, out of their
    TensorBoard files."""
    gates: dict[str, list[float]] = {}
    for log in logs:
        for tag, points in sorted(read_values(log).items()):
            if tag.startswith("gate/"):
                gates.setdefault(tag.removeprefix("gate/"), []).extend(
                    round(value, 4) for _, value in sorted(dict(points).items())
                )
    return gates


def read_tokens(log: Path) -> int:
    """How many tokens a training read, padding left out."""
    return int(sum(dict(read_values(log)["train/tokens"]).values()))
