import json
import math
from dataclasses import replace

import pytest

from pvm_jax import LoRAConfig, ModelConfig
from pvm_jax.config import Yarn
from tests.tiny import CONFIG


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
        (changed(text_config={"pvm_gate": "row"}), "pvm_gate must be 'scalar' or 'token', got"),
        (changed(text_config={"num_key_value_heads": 3}), "num_key_value_heads 3"),
        (changed(vision_config={"out_hidden_size": 64}), "out_hidden_size 64"),
        (changed(vision_config={"deepstack_visual_indexes": [9]}), "deepstack_visual_indexes"),
        (changed(text_config={"rope_scaling": {"type": "linear", "factor": 2}}), "'linear'"),
        (changed(text_config={"rope_parameters": {"rope_type": "dynamic"}}), "another rope_type"),
        (changed(text_config={"rope_parameters": {"rope_theta": 1e4}}), "rope_theta is 5e"),
        (changed(text_config={"rope_scaling": {"type": "yarn", "factor": 0.5}}), "factor must be"),
        (changed(text_config={"rope_scaling": {"factor": 2}}), r"factor is not supported with"),
        (changed(text_config={"rope_scaling": {"mrope_interleaved": False}}), "mrope_interleaved"),
        (changed(text_config={"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5"),
        (changed(text_config={"rope_theta": None}), "rope_theta must be a finite number above 1"),
        (changed(text_config={"rope_theta": 0}), "rope_theta must be a finite number above 1"),
        (changed(text_config={"rms_norm_eps": 0}), "rms_norm_eps must be a finite number above 0"),
        (changed(text_config={"rms_norm_eps": math.nan}), "rms_norm_eps must be a finite number"),
        (changed(text_config={"rms_norm_eps": "1e-6"}), 'rms_norm_eps .* got "1e-6"'),
        (changed(text_config={"layer_types": ["sliding_attention"] * 3}), "layer_types"),
        (changed(text_config={"sliding_window": 512}), "sliding_window = 512 is not supported"),
        (changed(text_config={"hidden_size": 32.5}), "hidden_size must be a whole number"),
        (changed(text_config={"num_hidden_layers": True}), "num_hidden_layers must be a whole"),
        (changed(text_config={"attention_bias": "no"}), "attention_bias must be true or false"),
        (changed(text_config={"num_experts": 8}), "num_experts = 8 is not supported"),
        (CONFIG.to_hf() | {"text_config": []}, r"text_config must be an object, got \[\]"),
        (changed(quantization_config={"quant_method": "fp8"}), r"quantised checkpoint \(fp8\)"),
        (changed(image_token_id=96), "image_token_id is 96, text_config.vocab_size only 96"),
        (changed(tie_word_embeddings=1), "tie_word_embeddings must be true or false, got 1"),
    ],
)
def test_what_is_not_computed_is_refused(raw, named):
    with pytest.raises(ValueError, match=rf"^config\.json: .*{named}") as error:
        ModelConfig.from_hf(raw)
    assert "\n" not in str(error.value)


def test_a_missing_rope_theta_is_refused():
    raw = CONFIG.to_hf()
    del raw["text_config"]["rope_theta"]
    with pytest.raises(ValueError, match=r"text_config\.rope_theta is missing"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
    "keys",
    [
        {"layer_types": ["full_attention"] * 3, "sliding_window": None},
        {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 3},
        {"attention_dropout": 0.0, "partial_rotary_factor": 1.0, "use_cache": True},
    ],
)
def test_keys_that_change_nothing_are_taken(keys):
    assert ModelConfig.from_hf(changed(text_config=keys)) == CONFIG


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_yarn_under_either_key_survives(key, place):
    raw = CONFIG.to_hf()
    raw["text_config"][place] = raw["text_config"].pop("rope_scaling") | {
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    del raw["text_config"][place]["rope_type"]
    raw["text_config"][place][key] = "yarn"
    config = ModelConfig.from_hf(raw)
    assert config.text.yarn == Yarn(4.0, 512, attention_factor=0.1 * math.log(4) + 1)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LoRAConfig(alpha=math.nan), "lora.alpha"),
        (lambda: LoRAConfig(alpha=math.inf), "lora.alpha"),
        (lambda: replace(CONFIG.text, rms_norm_eps=-1.0), "rms_norm_eps"),
        (lambda: Yarn(2.0, 512, 1.0, beta_fast=1, beta_slow=2), "beta_fast 1 must be above"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_unknown_preset_names_the_known():
    with pytest.raises(KeyError, match="2b, 4b, 8b, 32b"):
        ModelConfig.preset("7b")
