"""Persistent Visual Memory on Qwen3-VL in JAX."""

import os
from importlib.metadata import version

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch

from pvm_jax.checkpoint.store import load, load_branch, load_lora, save, save_branch, save_lora
from pvm_jax.config import LoRAConfig, ModelConfig, TextConfig, VisionConfig
from pvm_jax.data.batch import Batch
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.example import Example
from pvm_jax.data.processor import Processor
from pvm_jax.generation import Chat, Generation, Settings, generate, stream
from pvm_jax.model.qwen3_vl import Qwen3VL, Trace, abstract_model, add_lora, without_pvm
from pvm_jax.sharding import make_mesh

__version__ = version("pvm-jax")

__all__ = [
    "Batch",
    "Chat",
    "Example",
    "Generation",
    "LoRAConfig",
    "ModelConfig",
    "Processor",
    "Qwen3VL",
    "Settings",
    "TextConfig",
    "Trace",
    "VisionConfig",
    "__version__",
    "abstract_model",
    "add_lora",
    "generate",
    "load",
    "load_branch",
    "load_lora",
    "make_mesh",
    "open_conversations",
    "save",
    "save_branch",
    "save_lora",
    "stream",
    "without_pvm",
]
