"""Persistent Visual Memory on Qwen3-VL in JAX."""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch

from pvm_jax.batch import Batch, Example
from pvm_jax.checkpoint import load, load_branch, save, save_branch
from pvm_jax.config import ModelConfig, TextConfig, VisionConfig
from pvm_jax.generation import Generation, generate, stream
from pvm_jax.model import Qwen3VL, Trace, abstract_model
from pvm_jax.processing import Processor
from pvm_jax.sharding import make_mesh

__all__ = [
    "Batch",
    "Example",
    "Generation",
    "ModelConfig",
    "Processor",
    "Qwen3VL",
    "TextConfig",
    "Trace",
    "VisionConfig",
    "abstract_model",
    "generate",
    "load",
    "load_branch",
    "make_mesh",
    "save",
    "save_branch",
    "stream",
]
