"""Conversations about real and synthetic images of many sizes, made of what scikit-image and
scikit-learn ship.

Half of them show crops of photographs and scans, with sentences of scikit-learn's dataset
descriptions as text of any length; a quarter the demo's grids of digits; a tenth several images, a
tenth none.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage import data

from demo.checkpoint import write_assets
from demo.task import Mixture, draw, make_example
from pvm_jax.config import ModelConfig
from pvm_jax.data.processor import Processor
from train.config import Bucket

PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "retina",
    "hubble_deep_field",
    "immunohistochemistry",
)
SCANS = ("camera", "coins", "moon", "page", "text", "brick", "grass", "gravel")
QWEN3_VL_PIXELS = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
KINDS = {"photograph": 0.55, "grid": 0.25, "several": 0.1, "text": 0.1}
ANSWER_CHARACTERS = 300, 1.0  # median and spread (of the logarithm)
PATCHES_PER_TOKEN = (
    1.25  # of the mix; rows with much more or less of either would be padded in the other
)
BUCKETS = [
    Bucket(tokens, int(tokens * PATCHES_PER_TOKEN)) for tokens in (512, 1024, 2048, 4096, 8192)
]


def write_mix(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes `count` conversations and their images to `folder`; returns the JSONL file."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "data.jsonl", "x") as file:
        for number in range(count):
            rng = np.random.default_rng((seed, number))
            file.write(json.dumps({"messages": _conversation(rng, folder, number)}) + "\n")
    return folder / "data.jsonl"


def make_processor(folder: Path) -> tuple[Processor, ModelConfig]:
    """The demo's tokenizer with the pixel limits of the published Qwen3-VL, written to `folder`,
    and the demo's model."""
    config = write_assets(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": QWEN3_VL_PIXELS}))
    return Processor.from_pretrained(folder), config


def _conversation(rng: np.random.Generator, folder: Path, number: int) -> list[dict[str, Any]]:
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    if kind == "grid":
        name = f"{number:06d}.png"
        example = make_example(Mixture(lines=(1, 48), filler=(0, 60)), number)
        draw(example.scene).save(folder / name)
        return example.messages(name)
    parts: list[dict[str, Any]] = []
    for image in range({"photograph": 1, "several": int(rng.integers(2, 5)), "text": 0}[kind]):
        name = f"{number:06d}_{image}.jpg"
        _crop(rng).save(folder / name, quality=90)
        parts.append({"type": "image", "image": name})
    median, spread = ANSWER_CHARACTERS
    question, answer = (
        _text(rng, int(rng.lognormal(np.log(size), spread))) for size in (60, median)
    )
    parts.append({"type": "text", "text": question})
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def _crop(rng: np.random.Generator) -> Image.Image:
    """Part of a photograph or scan, at half to twice the size."""
    image = _images()[rng.integers(len(_images()))]
    width, height = (int(side * rng.uniform(0.3, 1)) for side in image.size)
    left, top = (
        int(rng.integers(image.width - width + 1)),
        int(rng.integers(image.height - height + 1)),
    )
    scale = rng.uniform(0.5, 2)
    return image.crop((left, top, left + width, top + height)).resize(
        (int(width * scale), int(height * scale))
    )


@cache
def _images() -> list[Image.Image]:
    from sklearn.datasets import load_sample_image  # seconds: only for those who draw

    arrays = [getattr(data, name)() for name in (*PHOTOGRAPHS, *SCANS)]
    arrays += [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return [Image.fromarray(array).convert("RGB") for array in arrays]


def _text(rng: np.random.Generator, characters: int) -> str:
    words = _words()
    start = int(rng.integers(len(words)))
    return " ".join(np.roll(words, -start)[: max(1, characters // 6)])


@cache
def _words() -> np.ndarray:
    from sklearn import datasets

    names = ("breast_cancer", "diabetes", "digits", "iris", "wine")
    bunches: list[Any] = [getattr(datasets, f"load_{name}")() for name in names]
    return np.array(" ".join(bunch.DESCR for bunch in bunches).split())
