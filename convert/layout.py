"""The ONE table of the conversion: a tensor's name in a Hugging Face checkpoint, and its place in
the parameter tree.

The tree keeps Hugging Face's names and [out, in] layout, so nothing is ever transposed: alike
layers are stacked, and the patch embedding [hidden, 3, 2, 16, 16] is flattened to [hidden, 1536],
which moves no byte.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import jax
from flax import nnx

from pvm_jax.config import ModelConfig
from pvm_jax.model.parameters import by_path
from pvm_jax.model.qwen3_vl import abstract_model

# A path of the tree -> the Hugging Face name; {index} is the layer's place in a stack. The first
# match counts.
TABLE = (
    (r"pvm/(?P<layer>\d+)/(?P<rest>.+)", "model.language_model.layers.{layer}.pvm_block.{rest}"),
    (
        r"(?P<stack>visual/blocks|visual/deepstack_merger_list|language_model/layers)/(?P<rest>.+)",
        "model.{stack}.{index}.{rest}",
    ),
    (r"(?P<rest>(visual|language_model)/.+)", "model.{rest}"),
    (r"(?P<rest>lm_head/weight)", "{rest}"),
)
BRANCH = ".pvm_block."
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
PATCH_EMBEDDING = "visual/patch_embed/proj/weight"


@dataclass(frozen=True)
class Slot:
    """Where a Hugging Face tensor of `shape` lives: the array at `path`, its layer `index` if that
    is a stack."""

    path: str
    index: int | None
    shape: tuple[int, ...]


@cache
def parameter_tree(config: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape of every array in the parameter tree, by path."""
    return by_path(nnx.state(abstract_model(config)))


def layout(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor of a Hugging Face checkpoint of this model, by name, in the order of layers."""
    slots = {
        name: slot
        for path, leaf in parameter_tree(config).items()
        for name, slot in _slots(path, leaf.shape, config)
    }
    return dict(sorted(slots.items(), key=lambda item: _natural(item[0])))


def adapter_layout(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor of this model's LoRA adapter by the name that the peft library gives it."""
    slots = {}
    for name, slot in layout(config).items():
        module, _, matrix = name.partition(".lora.")
        if matrix:
            if slot.path.startswith(f"{PATCH_EMBEDDING.removesuffix('/weight')}/"):
                slot = replace(slot, shape=_convolution(slot.shape, matrix, config))
            slots[f"base_model.model.{module}.lora_{matrix.upper()}.weight"] = slot
    return slots


def _convolution(shape: tuple[int, ...], matrix: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape of the patch embedding's low-rank "a" or "b" where it is a convolution."""
    return (shape[0], *_patch_shape(config)) if matrix == "a" else (*shape, 1, 1, 1)


def _patch_shape(config: ModelConfig) -> tuple[int, ...]:
    v = config.vision
    return (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)


@dataclass(frozen=True)
class TensorSource:
    """What an array of the tree is made of: one tensor, or a stack of them in order."""

    names: tuple[str, ...]
    stacked: bool


def sources(slots: Mapping[str, Slot]) -> dict[str, TensorSource]:
    """The source of each array, by path."""
    names: dict[str, list[str]] = {}
    for name, slot in sorted(slots.items(), key=lambda item: item[1].index or 0):
        names.setdefault(slot.path, []).append(name)
    return {
        path: TensorSource(tuple(parts), slots[parts[0]].index is not None)
        for path, parts in names.items()
    }


def _slots(path: str, shape: tuple[int, ...], config: ModelConfig) -> list[tuple[str, Slot]]:
    for pattern, template in TABLE:
        if found := re.fullmatch(pattern, path):
            parts = {key: value.replace("/", ".") for key, value in found.groupdict().items()}
            if "{index}" in template:
                return [
                    (template.format(index=i, **parts), Slot(path, i, shape[1:]))
                    for i in range(shape[0])
                ]
            if path == PATCH_EMBEDDING:
                shape = (shape[0], *_patch_shape(config))
            return [(template.format(**parts), Slot(path, None, shape))]
    raise ValueError(f"the model has a parameter that the table does not name: {path}")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
