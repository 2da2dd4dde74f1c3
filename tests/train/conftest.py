"""The reference checkpoints as models, and their batch with labels."""

import re
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from pvm_jax.batch import Batch, Example
from pvm_jax.config import ModelConfig
from pvm_jax.model import Qwen3VL, abstract_model


def _load_model(path: Path) -> Qwen3VL:
    """Reads a reference checkpoint without the converter (which has its own tests)."""
    tensors = {}
    for file in sorted(path.glob("model*.safetensors")):
        tensors |= load_file(file)
    config = ModelConfig.from_hf(path)
    graphdef, abstract = nnx.split(abstract_model(config))
    params = [
        (path, param.replace(jnp.asarray(_find(tensors, "/".join(map(str, path)), param.shape))))
        for path, param in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(params))


def _find(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    name = re.sub(r"^pvm/(\d+)", r"language_model/layers/\1/pvm_block", name).replace("/", ".")
    name = name if name.startswith("lm_head") else f"model.{name}"
    if name not in tensors:
        stack = re.match(r"(.*?\.(?:layers|blocks|deepstack_merger_list))\.(.*)", name)
        return np.stack([tensors[f"{stack[1]}.{index}.{stack[2]}"] for index in range(shape[0])])
    return tensors[name].reshape(shape)


@pytest.fixture
def golden_model(golden) -> Qwen3VL:
    return _load_model(golden)


@pytest.fixture
def golden_batch(golden) -> Batch:
    arrays = load_file(golden / "forward_inputs.safetensors")
    arrays["labels"] = load_file(golden / "grad_outputs.safetensors")["labels"]
    return Batch.from_hf(arrays, ModelConfig.from_hf(golden))


@pytest.fixture(scope="session")
def model() -> Qwen3VL:
    """The smallest model with every part in it, its gate open: it compiles fast."""
    config = ModelConfig.from_hf(Path(__file__).parents[1] / "golden" / "shape_8b", remat="none")
    text = replace(config.text, num_hidden_layers=2, pvm_layers=(1,))
    vision = replace(config.vision, depth=1, deepstack_visual_indexes=(0,))
    model = Qwen3VL(replace(config, text=text, vision=vision), rngs=nnx.Rngs(0))
    model.pvm["1"].gate_alpha[...] = jnp.ones(1)
    return model


@pytest.fixture(scope="session")
def eight_rows(model) -> Batch:
    """Eight rows with images of several sizes, one without any; each has its own share of learned tokens."""
    rng, config = np.random.default_rng(0), model.config

    def example(grids: list[tuple[int, int]], learned: float) -> Example:
        images = [
            [config.vision_start_token_id, *[config.image_token_id] * (rows * columns // 4), config.vision_end_token_id]
            for rows, columns in grids
        ]
        ids = np.concatenate([*images, rng.integers(0, 400, rng.integers(10, 24))]).astype(np.int32)
        patches = sum(rows * columns for rows, columns in grids)
        return Example(
            ids,
            rng.normal(size=(patches, config.vision.patch_dim)).astype(np.float32) if grids else None,
            np.array([(1, *grid) for grid in grids]) if grids else None,
            loss_mask=(np.arange(len(ids)) > sum(map(len, images))) & (rng.random(len(ids)) < learned),
        )

    grids = [[(2, 2)], [(4, 4)], [(2, 4), (4, 2)], [], [(2, 8)], [(4, 2)], [(2, 2), (2, 2)], [(4, 4)]]
    rows = [[example(grid, learned)] for grid, learned in zip(grids, np.linspace(0.1, 1, 8), strict=True)]
    return Batch.from_rows(rows, config, length=48, patches=16)
