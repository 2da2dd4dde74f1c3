"""The grid inventory: synthetic scenes of real handwritten digits, and conversations that list what
is in them.

An image is a grid of G x G cells of 32 x 32 pixels (one cell = one visual token). Each cell holds
one of scikit-learn's real handwritten digits, with four independent attributes. The answer is a
list of lines such as `B3 ground navy`: column and row of the cell, the attribute, its value. No
(cell, attribute) pair comes twice, and values are independent, so a value can be known only from
the image however late in the answer it stands. Filler words between the image and the question move
the whole answer away from the image and change nothing else; as many words ahead of the image make
the text as long, and leave question and image side by side.

Everything is a function of (seed, index): the same example has the same scene and the same lines
whatever its filler.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from rich.progress import track

from pvm_jax.options import run_as_command

CELL = 32
MAX_SIZE = 4
COLUMNS = "ABCD"

GROUNDS = {
    "navy": (24, 32, 104),
    "charcoal": (44, 44, 44),
    "maroon": (112, 20, 32),
    "forest": (16, 84, 40),
}
INKS = {
    "white": (248, 248, 248),
    "yellow": (252, 228, 40),
    "orange": (255, 148, 16),
    "red": (255, 64, 56),
    "pink": (255, 140, 208),
    "violet": (176, 104, 255),
    "cyan": (48, 216, 244),
    "lime": (136, 244, 56),
}
MARK_COLOUR = (208, 208, 208)
MARK_WIDTH = 3
DIGIT_SIDE = 24

VALUES: dict[str, tuple[str, ...]] = {
    "ground": tuple(GROUNDS),
    "mark": ("none", "top", "right", "bottom", "left"),
    "ink": tuple(INKS),
    "digit": tuple("0123456789"),
}
ATTRIBUTES = tuple(VALUES)
CELLS = tuple(f"{column}{row + 1}" for row in range(MAX_SIZE) for column in COLUMNS)
QUESTION = "List"
FILLER_TEXT = """
the road ran along a quiet river and then over some low hills where old farms stood between fields
of wheat no one spoke while slow carts went by
"""
FILLER = FILLER_TEXT.split()

Digits = Literal["train", "heldout"]


@dataclass(frozen=True)
class Scene:
    """A grid of cells. `values[row][column]` maps each attribute to its value; `glyphs` index
    scikit-learn's digit images."""

    size: int
    values: tuple[tuple[dict[str, str], ...], ...]
    glyphs: tuple[tuple[int, ...], ...]

    def value(self, cell: str, attribute: str) -> str:
        """The value of `attribute` in the cell named `cell` (column letter, row number: `B3`)."""
        return self.values[int(cell[1]) - 1][COLUMNS.index(cell[0])][attribute]

    @property
    def cells(self) -> tuple[str, ...]:
        return tuple(
            f"{column}{row + 1}" for row in range(self.size) for column in COLUMNS[: self.size]
        )


@dataclass(frozen=True)
class GridExample:
    """A scene and what is said about it.

    Attributes:
        lines: the answer: (cell, attribute, value) in the order in which they are listed.
        filler: words between the image and the question.
        ahead: words before the image.
    """

    scene: Scene
    attributes: tuple[str, ...]
    lines: tuple[tuple[str, str, str], ...]
    filler: tuple[str, ...]
    ahead: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        question = " ".join((QUESTION, *self.attributes))
        return f"{' '.join(self.filler)}\n{question}" if self.filler else question

    @property
    def answer(self) -> str:
        return "".join(f"{cell} {attribute} {value}\n" for cell, attribute, value in self.lines)

    def messages(self, image: Any) -> list[dict[str, Any]]:
        """The conversation, with `image` (a path or a PIL image) where the picture goes."""
        ahead = [{"type": "text", "text": " ".join(self.ahead) + "\n"}] if self.ahead else []
        user = [*ahead, {"type": "image", "image": image}, {"type": "text", "text": self.prompt}]
        return [{"role": "user", "content": user}, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True)
class Mixture:
    """What examples are made.

    Attributes:
        sizes: grid sizes G in [1, 4], drawn uniformly; repeat one to have it more often.
        lines: fewest and most lines of an answer, drawn uniformly; a scene with fewer (cell,
            attribute) pairs lists them all.
        filler: fewest and most filler words between image and question, drawn uniformly.
        ahead: fewest and most filler words before the image, drawn uniformly.
        attributes: attributes that are asked for, any of ground, mark, ink, digit.
        digits: which of scikit-learn's digit images the scenes are made of; "train" and "heldout"
            share none.
        seed: examples are a function of (seed, index).
    """

    sizes: tuple[int, ...] = (1, 2, 3, 4)
    lines: tuple[int, int] = (1, 16)
    filler: tuple[int, int] = (0, 0)
    ahead: tuple[int, int] = (0, 0)
    attributes: tuple[str, ...] = ATTRIBUTES
    digits: Digits = "train"
    seed: int = 0

    def __post_init__(self):
        if not self.sizes or any(not 1 <= size <= MAX_SIZE for size in self.sizes):
            raise ValueError(f"sizes must be grid sizes in [1, {MAX_SIZE}], got {self.sizes}")
        for name, least in (("lines", 1), ("filler", 0), ("ahead", 0)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise ValueError(
                    f"{name} must be [fewest, most] with {least} <= fewest <= most, got [{low},"
                    f" {high}]"
                )
        unknown = [name for name in self.attributes if name not in VALUES]
        if unknown or not self.attributes:
            raise ValueError(
                f"attributes must be some of {', '.join(VALUES)}, got {', '.join(self.attributes)}"
            )


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's digit images [1797, 8, 8] as coverage in [0, 1], and their classes [1797]."""
    from sklearn.datasets import load_digits  # seconds: only for those who draw

    bunch: Any = load_digits()
    return bunch.images.astype(np.float32) / 16, bunch.target


def digit_indices(digits: Digits) -> np.ndarray:
    """Indices of the digit images of a part: every fifth is held out, the rest are for training."""
    indices = np.arange(len(_digits()[1]))
    return indices[indices % 5 == 4] if digits == "heldout" else indices[indices % 5 != 4]


def make_example(mixture: Mixture, index: int) -> GridExample:
    """Example number `index` of the mixture. Scene, lines and filler come from separate random
    streams."""
    streams = [np.random.default_rng((mixture.seed, index, stream)) for stream in range(4)]
    scene = _make_scene(
        streams[0], int(streams[0].choice(mixture.sizes)), digit_indices(mixture.digits)
    )
    pairs = [(cell, attribute) for cell in scene.cells for attribute in mixture.attributes]
    order = streams[1].permutation(len(pairs))
    lines = order[: streams[1].integers(mixture.lines[0], mixture.lines[1] + 1)]
    return GridExample(
        scene=scene,
        attributes=mixture.attributes,
        lines=tuple(
            (cell, name, scene.value(cell, name)) for cell, name in (pairs[i] for i in lines)
        ),
        filler=_some_words(streams[2], mixture.filler),
        ahead=_some_words(streams[3], mixture.ahead),
    )


def _some_words(rng: np.random.Generator, count: tuple[int, int]) -> tuple[str, ...]:
    """As many filler words as are drawn from [fewest, most]."""
    return tuple(str(word) for word in rng.choice(FILLER, rng.integers(count[0], count[1] + 1)))


def _make_scene(rng: np.random.Generator, size: int, indices: np.ndarray) -> Scene:
    classes = _digits()[1]
    glyphs = rng.choice(indices, (size, size))

    def cell(glyph: int) -> dict[str, str]:
        drawn = {name: str(rng.choice(VALUES[name])) for name in ("ground", "mark", "ink")}
        return drawn | {"digit": str(classes[glyph])}

    values = tuple(tuple(cell(glyph) for glyph in row) for row in glyphs)
    return Scene(size, values, tuple(tuple(int(glyph) for glyph in row) for row in glyphs))


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of size * 32 pixels a side."""
    canvas = np.zeros((scene.size * CELL, scene.size * CELL, 3), np.uint8)
    for row in range(scene.size):
        for column in range(scene.size):
            area = canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            area[:] = _draw_cell(scene.values[row][column], scene.glyphs[row][column])
    return Image.fromarray(canvas)


@cache
def _coverage(glyph: int) -> np.ndarray:
    """How much of each pixel of its cell a digit image covers, [32, 32, 1] in [0, 1]."""
    small = Image.fromarray(np.round(255 * _digits()[0][glyph]).astype(np.uint8))
    scaled = small.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC)
    margin = (CELL - DIGIT_SIDE) // 2
    coverage = np.zeros((CELL, CELL, 1), np.float32)
    coverage[margin : margin + DIGIT_SIDE, margin : margin + DIGIT_SIDE, 0] = (
        np.asarray(scaled) / 255
    )
    return coverage


def _draw_cell(values: dict[str, str], glyph: int) -> np.ndarray:
    coverage = _coverage(glyph)
    cell = coverage * np.array(INKS[values["ink"]]) + (1 - coverage) * np.array(
        GROUNDS[values["ground"]]
    )
    edges: dict[str, Any] = {
        "none": np.s_[:0],
        "top": np.s_[:MARK_WIDTH],
        "right": np.s_[:, -MARK_WIDTH:],
        "bottom": np.s_[-MARK_WIDTH:],
        "left": np.s_[:, :MARK_WIDTH],
    }
    cell[edges[values["mark"]]] = MARK_COLOUR
    return np.round(cell).astype(np.uint8)


def words() -> Iterator[str]:
    """Every word of the task as it stands in a conversation, with the space before it or the line
    break after it."""
    yield from CELLS
    yield QUESTION
    yield from (f" {name}" for name in ATTRIBUTES)
    yield from (f" {value}\n" for values in VALUES.values() for value in values)
    yield from (form for word in FILLER for form in (word, f" {word}", f"{word}\n", f" {word}\n"))


def write(examples: Sequence[GridExample], out: Path) -> None:
    """Writes `out`/data.jsonl, one {"messages": [...]} a line, and the images that it names,
    relative to it, as PNG files.

    Raises:
        FileExistsError: if `out` holds a data.jsonl already.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    with open(out / "data.jsonl", "x") as file:
        for number, example in enumerate(track(examples, f"{out}", disable=len(examples) < 1000)):
            name = f"images/{number:06d}.png"
            draw(example.scene).save(out / name)
            file.write(json.dumps({"messages": example.messages(name)}) + "\n")


def main(out: Path, count: int = 1000, mixture: Mixture = Mixture()) -> None:
    """Writes `count` examples of the grid inventory to the folder `out`: data.jsonl and images/.

    Example: python -m demo.task out/task --count 2000 --mixture.sizes [3,4] --mixture.lines [8,16]

    Args:
        out: folder to write; it must not hold a data.jsonl already.
        count: number of examples.
        mixture: what examples are made.
    """
    write([make_example(mixture, index) for index in range(count)], out)


if __name__ == "__main__":
    run_as_command(main)
