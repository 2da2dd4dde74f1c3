"""Persistent Visual Memory on Qwen3-VL in JAX."""

from pvm_jax.batch import Batch, Example
from pvm_jax.config import ModelConfig, TextConfig, VisionConfig
from pvm_jax.model import Qwen3VL, abstract_model

__all__ = ["Batch", "Example", "ModelConfig", "Qwen3VL", "TextConfig", "VisionConfig", "abstract_model"]
