"""What the model still sees of the image, by distance from it and by position in the answer, with and without the branch.

Teacher-forced: the true answer is given, and a line counts if the likeliest token where its value stands is the value. The
value can be known only from the image, so this is sight alone. Free-running: the model writes the answer, and every line of it
is checked against the scene. Scenes are made of digit images that were held out from training; every distance has the same
scenes and the same lines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jsonargparse import auto_cli

from demo.checkpoint import IM_END
from demo.report import write_report
from demo.task import Example, Mixture, draw, make_example
from pvm_jax.batch import Batch, bucket_size
from pvm_jax.batch import Example as Encoded
from pvm_jax.checkpoint import load
from pvm_jax.generation import generate
from pvm_jax.model import Qwen3VL
from pvm_jax.processing import Processor

TOKENS_PER_LINE = 3
SHUFFLED = "before, other image"


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        distances: filler words between image and question.
        scenes: scenes for the teacher-forced accuracy, the same ones at every distance.
        size: side G of the grids.
        lines: lines of each true answer.
        written_scenes: scenes whose answers the model writes itself.
        written_lines: lines' worth of tokens that it may write.
        batch_size: conversations that are computed together.
        resamples: bootstrap resamples of the scenes for the 95% intervals.
        seed: of the scenes.
    """

    distances: tuple[int, ...] = (0, 100, 200, 400, 800)
    scenes: int = 48
    size: int = 4
    lines: int = 48
    written_scenes: int = 8
    written_lines: int = 24
    batch_size: int = 8
    resamples: int = 1000
    seed: int = 10_000

    def examples(self, distance: int, count: int) -> list[Example]:
        """The first `count` scenes, `distance` filler words from the question."""
        lines, filler = (self.lines, self.lines), (distance, distance)
        mixture = Mixture(sizes=(self.size,), lines=lines, filler=filler, digits="heldout", seed=self.seed)
        return [make_example(mixture, index) for index in range(count)]


class Written(NamedTuple):
    """What became of the lines that a model wrote itself.

    Attributes:
        lines: lines written; malformed: not `cell attribute value` of this grid; repeated: the pair was listed before;
            correct: neither, and the value is the scene's.
    """

    lines: int
    malformed: int
    repeated: int
    correct: int


def evaluate(models: Mapping[str, Qwen3VL], processor: Processor, settings: Settings) -> dict[str, Any]:
    """Measures every model, and the first one once more with the scenes' images exchanged (what guessing gives).

    Returns:
        JSON-ready: `settings`; `attributes` and `lines`, what each listed line [scenes, lines] is about and its index;
        `hits`: by model and distance, [scenes, lines] of 0 and 1; `written`: by model and distance, a Written.
    """
    hits: dict[str, dict[int, np.ndarray]] = {name: {} for name in (*models, SHUFFLED)}
    written: dict[str, dict[int, dict[str, int]]] = {name: {} for name in models}
    for distance in settings.distances:
        examples = settings.examples(distance, settings.scenes)
        encoded = encode(examples, processor)
        for name, model in models.items():
            hits[name][distance] = sees(model, encoded, settings)
            few = settings.examples(distance, settings.written_scenes)
            written[name][distance] = writes(model, processor, few, settings)._asdict()
        hits[SHUFFLED][distance] = sees(next(iter(models.values())), exchange(encoded), settings)
    lines = settings.examples(0, settings.scenes)
    return {
        "settings": asdict(settings),
        "attributes": [[attribute for _, attribute, _ in example.lines] for example in lines],
        "hits": {name: {d: h.astype(int).tolist() for d, h in by.items()} for name, by in hits.items()},
        "written": written,
    }


def encode(examples: Sequence[Example], processor: Processor) -> list[Encoded]:
    """The conversations, true answers included, with their images drawn."""
    return [processor.encode(example.messages(draw(example.scene))) for example in examples]


def exchange(examples: Sequence[Encoded]) -> list[Encoded]:
    """The same conversations, each about the next one's image."""
    others = [*examples[1:], *examples[:1]]
    return [replace(mine, pixel_values=other.pixel_values) for mine, other in zip(examples, others, strict=True)]


def sees(model: Qwen3VL, examples: Sequence[Encoded], settings: Settings) -> np.ndarray:
    """Whether the likeliest token at each line's value is the value: [scenes, lines] bool."""
    graphdef, params = nnx.split(model)
    params = nnx.as_pure(params)
    length = bucket_size(max(len(example.input_ids) for example in examples))
    patches = bucket_size(max(example.num_patches for example in examples))
    hits = []
    for start in range(0, len(examples), settings.batch_size):
        rows = examples[start : start + settings.batch_size]
        columns = np.stack([value_columns(example, settings.lines) for example in rows])
        full = [*rows, *[rows[-1]] * (settings.batch_size - len(rows))]  # one shape, one compilation
        batch = Batch.from_rows([[example] for example in full], model.config, length=length, patches=patches)
        padded = np.pad(columns, ((0, len(full) - len(rows)), (0, 0)), mode="edge")
        predicted = np.asarray(_likeliest(graphdef, params, batch, padded))[: len(rows)]
        targets = np.stack([example.input_ids[c] for example, c in zip(rows, columns, strict=True)])
        hits.append(predicted == targets)
    return np.concatenate(hits)


def value_columns(example: Encoded, lines: int) -> np.ndarray:
    """Columns of the answer's values [lines]: the last token of each line; the answer ends with the end of the turn."""
    assert example.loss_mask is not None
    learned = np.flatnonzero(example.loss_mask)
    if len(learned) != lines * TOKENS_PER_LINE + 1:
        raise ValueError(
            f"an answer of {lines} lines has {len(learned)} tokens, not {TOKENS_PER_LINE} a line and an end: "
            "the checkpoint's tokenizer is not the demo's (python -m demo.checkpoint)"
        )
    return learned[TOKENS_PER_LINE - 1 :: TOKENS_PER_LINE]


@partial(jax.jit, static_argnames="graphdef")
def _likeliest(graphdef: nnx.GraphDef, params: Any, batch: Batch, columns: jax.Array) -> jax.Array:
    """The likeliest token at `columns` [B, N], given what stands before them."""
    model: Qwen3VL = nnx.merge(graphdef, params)
    before = jnp.take_along_axis(model.hidden(batch), columns[..., None] - 1, axis=1)
    return jnp.argmax(model.logits(before), -1)


def writes(model: Qwen3VL, processor: Processor, examples: Sequence[Example], settings: Settings) -> Written:
    """Lets the model write each answer, greedily, and checks every whole line of it."""
    prompts = [example.messages(draw(example.scene))[:1] for example in examples]
    batch = Batch.from_hf(processor(prompts), model.config)
    stop = int(processor.tokenizer.get_vocab()[IM_END])
    tokens = settings.written_lines * TOKENS_PER_LINE
    generation = generate(model, batch, max_new_tokens=tokens, temperature=0.0, stop_tokens=(stop,))
    counts = np.zeros(len(Written._fields), int)
    for example, ids, length in zip(examples, generation.tokens, generation.lengths, strict=True):
        counts += check(processor.decode(np.asarray(ids[: int(length)])), example)
    return Written(*counts.tolist())


def check(text: str, example: Example) -> Written:
    """Compares a written answer with the scene; a last line without its line break is not counted."""
    seen: set[tuple[str, str]] = set()
    malformed = repeated = correct = 0
    lines = text.split("\n")[:-1]
    for line in lines:
        words = line.split(" ")
        if len(words) != 3 or words[0] not in example.scene.cells or words[1] not in example.attributes:
            malformed += 1
        elif (words[0], words[1]) in seen:
            repeated += 1
        else:
            seen.add((words[0], words[1]))
            correct += example.scene.value(words[0], words[1]) == words[2]
    return Written(len(lines), malformed, repeated, correct)


def main(out: Path, checkpoint: Path, branch: Path | None = None, settings: Settings = Settings()) -> None:
    """Measures a checkpoint, and the same with a trained branch; writes results.json, results.md and results.png to `out`.

    Example: python -m demo.evaluate out/demo/report out/demo/checkpoint --branch out/demo/run/branch

    Args:
        out: folder for the results.
        checkpoint: the base model (Orbax).
        branch: a branch that was trained on it; without one, the base alone is measured.
        settings: what is measured.
    """
    models = {"before": load(checkpoint)}
    if branch is not None:
        models["after"] = load(checkpoint, branch=branch)
    write_report(evaluate(models, Processor.from_pretrained(checkpoint), settings), out)


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
