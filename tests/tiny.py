"""The tiny models that the tests share: configurations with few layers of every kind, models of
them, and conversations that these read."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from pvm_jax.config import ModelConfig, TextConfig, VisionConfig
from pvm_jax.data.example import Example
from pvm_jax.model.qwen3_vl import Qwen3VL, abstract_model

GOLDEN = Path(__file__).parent / "golden" / "shape_8b"


CONFIG = ModelConfig(
    text=TextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mrope_section=(4, 2, 2),
        pvm_layers=(1, 2),
        pvm_hidden_size=32,
    ),
    vision=VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        depth=2,
        num_heads=2,
        out_hidden_size=32,
        num_position_embeddings=36,
        deepstack_visual_indexes=(0,),
        patch_size=4,
    ),
    tie_word_embeddings=True,
    image_token_id=90,
    video_token_id=91,
    vision_start_token_id=92,
    vision_end_token_id=93,
)
"""A layer of every kind, and two with a branch."""


def cut(
    config: ModelConfig,
    *,
    layers: int = 1,
    depth: int = 1,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """`config` with `layers` decoder layers, the last with a branch, and `depth` layers of the
    tower, the first with DeepStack; `text` and `vision` change more."""
    of_text = {"num_hidden_layers": layers, "pvm_layers": (layers - 1,)} | dict(text or {})
    of_vision = {"depth": depth, "deepstack_visual_indexes": (0,)} | dict(vision or {})
    return replace(
        config, text=replace(config.text, **of_text), vision=replace(config.vision, **of_vision)
    )


def golden_config(**options: Any) -> ModelConfig:
    """The reference's, cut to the smallest with every part in it: it compiles fast."""
    return cut(ModelConfig.from_hf(GOLDEN, **options))


def filled(model: Qwen3VL, value: Callable[[str, tuple[int, ...]], Any]) -> Qwen3VL:
    """`model` with `value(path, shape)` for every parameter; nothing is compiled for it."""
    graphdef, params = nnx.split(model)

    def fill(path, leaf):
        return jax.device_put(np.asarray(value(jax.tree_util.keystr(path), leaf.shape), leaf.dtype))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, nnx.as_pure(params)))


def make_model(config: ModelConfig, *, gate: float = 0) -> Qwen3VL:
    """A model of `config` with parameters as fresh ones are, always the same; `gate`, if given,
    opens its branches."""
    rng = np.random.default_rng(0)

    def value(path, shape):
        if "gate_alpha" in path:
            return np.full(shape, gate)
        if "bias" in path or "gate_token" in path:
            return np.zeros(shape)
        return np.ones(shape) if "norm" in path else rng.normal(0, 0.02, shape)

    return filled(abstract_model(config), value)


def randomized(config: ModelConfig = CONFIG, scale: float = 0.2) -> Qwen3VL:
    """Random, with gates that are open and norms that are not 1: nothing is neutral by accident."""
    rng = np.random.default_rng(1)

    def value(path, shape):
        mean = 1.0 if "norm" in path or "gate_alpha" in path else 0.0
        return mean + scale * rng.normal(size=shape)

    return filled(abstract_model(config), value)


def example(
    seed: int, *, text: tuple[int, ...], grids: tuple[tuple[int, int], ...] = ()
) -> Example:
    """Random text runs around images of the given (rows, columns) of patches; every text token but
    the first is learned."""
    rng = np.random.default_rng(seed)
    pieces, pixels = [], []
    for number, length in enumerate(text):
        pieces.append(rng.integers(1, 80, length))
        if number < len(grids):
            rows, columns = grids[number]
            pieces.append([92, *[90] * (rows * columns // 4), 93])
            pixels.append(
                rng.normal(size=(rows * columns, CONFIG.vision.patch_dim)).astype(np.float32)
            )
    ids = np.concatenate(pieces).astype(np.int32)
    return Example(
        input_ids=ids,
        pixel_values=np.concatenate(pixels) if pixels else None,
        image_grid_thw=np.array([(1, *grid) for grid in grids]) if grids else None,
        loss_mask=ids < 80,
    )


EXAMPLES = [
    example(1, text=(5, 9), grids=((4, 6),)),
    example(2, text=(12,)),
    example(3, text=(3, 4, 7), grids=((2, 2), (6, 4))),
    example(4, text=(1, 20), grids=((2, 8),)),
]
