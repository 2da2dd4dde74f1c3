"""The table against the published checkpoints' names and sizes."""

from math import prod

import pytest

from convert.layout import BRANCH, layout, parameter_tree, sources
from pvm_jax.config import ModelConfig
from tests.convert.directories import read_tensors


def test_names_and_shapes_of_the_reference(golden):
    expected = {name: tensor.shape for name, tensor in read_tensors(golden).items()}
    assert {
        name: slot.shape for name, slot in layout(ModelConfig.from_hf(golden)).items()
    } == expected


# Parameters of Qwen/Qwen3-VL-*-Instruct, as their safetensors indexes count them (a tied head
# once).
@pytest.mark.parametrize(
    ("size", "count"), [("2b", 2_127_532_032), ("4b", 4_437_815_808), ("8b", 8_767_123_696)]
)
def test_published_sizes(size, count):
    slots = layout(ModelConfig.preset(size).without_pvm())
    assert sum(prod(slot.shape) for slot in slots.values()) == count


def test_the_papers_branch():
    slots = layout(ModelConfig.preset("8b"))
    assert sum(prod(slot.shape) for name, slot in slots.items() if BRANCH in name) == 27_922_179


def test_every_array_is_made_of_all_its_tensors():
    config = ModelConfig.preset("8b")
    made = sources(layout(config))
    for path, leaf in parameter_tree(config).items():
        assert len(made[path].names) == (leaf.shape[0] if made[path].stacked else 1)
    assert (
        made["language_model/layers/self_attn/q_proj/weight"]
        .names[10]
        .endswith("layers.10.self_attn.q_proj.weight")
    )
