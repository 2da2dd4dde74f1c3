import json

import pytest

from pvm_jax import ModelConfig
from tests.pvm_jax.test_model import CONFIG


def changed(**sections):
    """CONFIG's config.json with some keys of its sections changed."""
    raw = CONFIG.to_hf()
    for name, keys in sections.items():
        raw[name] = raw[name] | keys if isinstance(raw.get(name), dict) else keys
    return raw


def test_reads_a_file_or_its_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(tmp_path / "config.json") == CONFIG


def test_reads_rope_parameters_as_transformers_5_writes_them():
    raw = CONFIG.to_hf()
    text = raw["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    assert ModelConfig.from_hf(raw) == CONFIG


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (changed(model_type="qwen3_vl_moe"), "model_type"),
        ({"model_type": "qwen3_vl"}, "text_config and vision_config missing"),
        (changed(text_config={"rope_scaling": {"rope_type": "longrope"}}), "longrope"),
        (changed(vision_config={"hidden_act": "relu"}), "hidden_act"),
        (changed(vision_config={"rope_parameters": {"rope_theta": 5e4}}), "rope_theta"),
        (changed(text_config={"pvm_layers": [3, 1]}), "pvm_layers must be ascending"),
        (changed(text_config={"pvm_layers": [7]}), r"pvm_layers must be ascending and in \[0, 3\)"),
        (changed(text_config={"pvm_hidden_size": 40}), "pvm_hidden_size 40 must be a multiple"),
        (changed(text_config={"num_key_value_heads": 3}), "num_key_value_heads 3"),
        (changed(vision_config={"out_hidden_size": 64}), "out_hidden_size 64"),
        (changed(vision_config={"deepstack_visual_indexes": [9]}), "deepstack_visual_indexes"),
    ],
)
def test_what_is_not_computed_is_refused(raw, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf(raw)


def test_unknown_preset_names_the_known():
    with pytest.raises(KeyError, match="2b, 4b, 8b, 32b"):
        ModelConfig.preset("7b")
