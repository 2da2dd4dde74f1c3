"""A tiny model whose branch is open, and conversations for it: images of any grid, an answer at the end."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pvm_jax import Example, ModelConfig, Qwen3VL, abstract_model
from tests.pvm_jax import test_model

CONFIG = replace(
    test_model.CONFIG,
    text=replace(test_model.CONFIG.text, num_hidden_layers=3, pvm_layers=(1, 2)),
    vision=replace(test_model.CONFIG.vision, depth=2, deepstack_visual_indexes=(0,)),
)


def make_model(config: ModelConfig = CONFIG, scale: float = 0.2) -> Qwen3VL:
    """Random, gates open."""
    graphdef, params = nnx.split(abstract_model(config))
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) or "gate" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(mean + scale * rng.normal(size=leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, nnx.as_pure(params)))


def make_example(seed: int, answer: int, grids: tuple[tuple[int, int], ...] = ((4, 4),), question: int = 5) -> Example:
    """Images of (rows, columns) patches, `question` tokens, then `answer` tokens to say."""
    rng = np.random.default_rng(seed)
    images = [np.array([92, *[90] * (rows * columns // 4), 93]) for rows, columns in grids]
    ids = np.concatenate([*images, rng.integers(1, 80, question + answer)])
    pixels = rng.uniform(-1, 1, (sum(rows * columns for rows, columns in grids), CONFIG.vision.patch_dim))
    return Example(
        input_ids=ids,
        pixel_values=pixels.astype(np.float32),
        image_grid_thw=np.array([(1, *grid) for grid in grids]),
        loss_mask=np.arange(len(ids)) >= len(ids) - answer,
    )
