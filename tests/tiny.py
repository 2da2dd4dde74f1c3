"""The tiny models that the tests share: a configuration with few layers of every kind, and a model
of it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pvm_jax.config import ModelConfig
from pvm_jax.model.qwen3_vl import Qwen3VL

GOLDEN = Path(__file__).parent / "golden" / "shape_8b"


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


def make_model(config: ModelConfig, *, gate: float | None = None) -> Qwen3VL:
    """A model of `config` with fresh parameters, always the same; `gate`, if given, opens its
    branches."""
    model = nnx.jit(lambda: Qwen3VL(config, rngs=nnx.Rngs(0)))()
    if gate is not None:
        for branch in model.pvm.values():
            branch.gate_alpha[...] = jnp.full(1, gate)
    return model
