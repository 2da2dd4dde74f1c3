"""The reference checkpoints as models, and their batch with labels."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from pvm_jax.batch import Batch
from pvm_jax.config import ModelConfig
from pvm_jax.model import Qwen3VL, abstract_model


def load_golden_model(path: Path, **overrides) -> Qwen3VL:
    """Reads a reference checkpoint without the converter (which has its own tests)."""
    tensors = {}
    for file in sorted(path.glob("model*.safetensors")):
        tensors |= load_file(file)
    config = ModelConfig.from_hf(path, **overrides)
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
    return load_golden_model(golden)


@pytest.fixture
def golden_batch(golden) -> Batch:
    arrays = load_file(golden / "forward_inputs.safetensors")
    arrays["labels"] = load_file(golden / "grad_outputs.safetensors")["labels"]
    return Batch.from_hf(arrays, ModelConfig.from_hf(golden))
