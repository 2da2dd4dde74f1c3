"""Hugging Face's `config.json` of a Qwen3-VL, read key by key: what changes what is computed is
computed or refused by name; any other key is left alone, as transformers leaves it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pvm_jax.files.json_file import JsonObject, read_json
from pvm_jax.files.paths import any_path

MODEL_TYPE = "qwen3_vl"
SPECIAL_TOKENS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
_SIZES = {
    "text_config": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "pvm_hidden_size",
    ),
    "vision_config": (
        "hidden_size",
        "intermediate_size",
        "depth",
        "num_heads",
        "out_hidden_size",
        "num_position_embeddings",
        "in_channels",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
    ),
}
BRANCH_CHOICES = {"pvm_visibility": ("all", "preceding"), "pvm_gate": ("scalar", "token")}
"""Keys of the branch that are not the authors': the published form, where the key is left out, and
the other one."""
# Keys with which this family or its relatives compute something else, and all that is computed
# here. null is as good as absent.
_COMPUTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {"quantization_config": (), "compression_config": ()},
    "text_config": {
        "quantization_config": (),
        "hidden_act": ("silu",),
        "attention_dropout": (0,),
        "mlp_bias": (False,),
        "qkv_bias": (),
        "use_qk_norm": (True,),
        "use_sliding_window": (False,),
        "attention_chunk_size": (),
        "use_bidirectional_attention": (False,),
        "is_causal": (True,),
        "partial_rotary_factor": (1,),
        "original_max_position_embeddings": (),
        "no_rope_layers": (),
        "attn_logit_softcapping": (),
        "final_logit_softcapping": (),
        "query_pre_attn_scalar": (),
        "attention_multiplier": (),
        "embedding_multiplier": (1,),
        "residual_multiplier": (1,),
        "logits_scaling": (1,),
        "num_experts": (0,),
        "num_local_experts": (0,),
        "moe_intermediate_size": (),
    },
    "vision_config": {
        "quantization_config": (),
        "hidden_act": ("gelu_pytorch_tanh",),
        "attention_dropout": (0,),
        "layer_norm_eps": (1e-6,),
        "rms_norm_eps": (1e-6,),
        "norm_eps": (1e-6,),
        "rope_theta": (1e4,),
        "window_size": (),
        "fullatt_block_indexes": (),
    },
}
_FULL = "full_attention"
_VISION_ROPE = {"type": ("axial", "default"), "rope_type": ("axial", "default")}
_VISION_ROPE |= {"rope_theta": (1e4,), "partial_rotary_factor": (1,)}
_ROPE = ("type", "rope_type", "rope_theta", "mrope_section", "mrope_interleaved")
_ROPE += ("partial_rotary_factor",)
_YARN = ("factor", "original_max_position_embeddings", "attention_factor", "mscale")
_YARN += ("mscale_all_dim", "beta_fast", "beta_slow", "truncate")


class Sections(NamedTuple):
    """The fields of TextConfig, VisionConfig and ModelConfig that a file sets, and its name."""

    text: dict[str, Any]
    vision: dict[str, Any]
    own: dict[str, Any]
    file: str


def read_sections(config: Mapping[str, Any] | str | Path) -> Sections:
    """Reads `config`: a path (file or its directory) or the parsed mapping.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: naming file and key, for another architecture, a value of the wrong kind, and
            what is not computed here.
    """
    raw = read_config(config)
    check_model_type(raw)
    if missing := [key for key in ("text_config", "vision_config") if key not in raw]:
        raise ValueError(f"{raw.file}: {' and '.join(missing)} missing: is it a Qwen3-VL's?")
    text, vision = raw.object("text_config"), raw.object("vision_config")
    if quantised := raw.get("quantization_config") or text.get("quantization_config"):
        how = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ValueError(
            f"{raw.file}: quantization_config: a quantised checkpoint ({how}) is not read: convert"
            " the one in bfloat16, float16 or float32 that it was made of"
        )
    for section, name in ((raw, ""), (text, "text_config"), (vision, "vision_config")):
        _check_computed(section, _COMPUTED[name])
    vocab_size = text.integer("vocab_size", None, least=1)
    tokens = {key: raw.integer(key) for key in SPECIAL_TOKENS if key in raw}
    for key, token in tokens.items():
        if vocab_size is not None and token >= vocab_size:
            raw.refuse(key, f"is {token}, text_config.vocab_size only {vocab_size}")
    tied = raw.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False))
    return Sections(_text(text), _vision(vision), tokens | {"tie_word_embeddings": tied}, raw.file)


def read_config(config: Mapping[str, Any] | str | Path) -> JsonObject:
    """The config.json at a path (file or its directory), or the parsed mapping, as it is.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is no JSON object.
    """
    if isinstance(config, JsonObject):
        return config
    if isinstance(config, Mapping):
        return JsonObject(config, "config.json")
    path = any_path(config)
    return read_json(path / "config.json" if path.is_dir() else path)


def check_model_type(config: JsonObject) -> None:
    """Raises ValueError unless the config is a dense Qwen3-VL's."""
    if config.get("model_type") != MODEL_TYPE:
        config.refuse(
            "model_type", f"must be {MODEL_TYPE!r} (dense), got {config.get('model_type')!r}"
        )


def _text(text: JsonObject) -> dict[str, Any]:
    if text.get("sliding_window") is not None and text.get("use_sliding_window") is not False:
        text.refuse("sliding_window", f"= {text['sliding_window']!r} is not supported, only null")
    kinds = text.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or {*map(str, kinds)} - {_FULL}):
        text.refuse("layer_types", f"is not supported, only {_FULL!r} for every layer")
    values: dict[str, Any] = {
        key: text.integer(key, least=1) for key in _SIZES["text_config"] if key in text
    }
    if "rms_norm_eps" in text:
        values["rms_norm_eps"] = text.number("rms_norm_eps")
    values |= {key: text.text(key) for key in BRANCH_CHOICES if key in text}
    values["pvm_layers"] = text.integers("pvm_layers", None) or ()
    values["attention_bias"] = text.flag("attention_bias", None) or False
    return values | _rope(text)


def _vision(vision: JsonObject) -> dict[str, Any]:
    rope = vision.object("rope_parameters", None) or {}
    if isinstance(rope, JsonObject):
        _check_keys(rope, tuple(_VISION_ROPE), "axial")
        _check_computed(rope, _VISION_ROPE)
    values: dict[str, Any] = {
        key: vision.integer(key, least=1) for key in _SIZES["vision_config"] if key in vision
    }
    if "deepstack_visual_indexes" in vision:
        values["deepstack_visual_indexes"] = vision.integers("deepstack_visual_indexes")
    return values


def _rope(text: JsonObject) -> dict[str, Any]:
    """The fields of TextConfig that say how positions turn queries and keys."""
    rope = _rope_object(text)
    thetas = [part.number("rope_theta", above=1) for part in (rope, text) if "rope_theta" in part]
    if not thetas:
        text.refuse("rope_theta", "is missing: what it was trained with has to be known")
    if len({*thetas}) > 1:
        text.refuse("rope_theta", f"is {thetas[1]:g}, and {thetas[0]:g} among the rotary settings")
    kind = rope.text("rope_type", None) or rope.text("type", None) or "default"
    if rope.get("type") not in (None, kind, "mrope"):
        rope.refuse("type", f"is {rope['type']!r}, but rope_type {kind!r}: keep one")
    if kind not in ("default", "yarn"):
        rope.refuse("rope_type", f"{kind!r} is not supported, only 'default' and 'yarn'")
    _check_keys(rope, _ROPE + (_YARN if kind == "yarn" else ()), kind)
    _check_computed(rope, {"mrope_interleaved": (True,), "partial_rotary_factor": (1,)})
    fields: dict[str, Any] = {"rope_theta": thetas[0]}
    if (section := rope.integers("mrope_section", None)) is not None:
        fields["mrope_section"] = section
    if kind == "yarn":
        fields["yarn"] = _yarn(rope, text.integer("max_position_embeddings", None, least=1))
    return fields


def _rope_object(text: JsonObject) -> JsonObject:
    """What `rope_scaling` (transformers 4) and `rope_parameters` (5) say together."""
    parts = [text.object(key, None) or {} for key in ("rope_parameters", "rope_scaling")]
    new, old = parts
    if other := [key for key in old if key in new and old[key] != new[key]]:
        text.refuse("rope_scaling", f"says another {other[0]} than rope_parameters: keep one")
    key = "rope_parameters" if new else "rope_scaling"
    return JsonObject({key: {**new, **old}}, text.file, text.parent).object(key)


def _yarn(rope: JsonObject, longest: int | None) -> dict[str, Any]:
    """The fields of Yarn, with transformers' defaults
    (`modeling_rope_utils._compute_yarn_parameters`)."""
    original = rope.integer("original_max_position_embeddings", None, least=1) or longest
    if original is None:
        rope.refuse("original_max_position_embeddings", "is missing")
    factor = rope.number("factor", None) or (longest or original) / original
    if factor < 1:
        rope.refuse("factor", f"must be at least 1, got {factor:g}")
    scale, scale_all = rope.number("mscale", None), rope.number("mscale_all_dim", None)
    implied = _magnitude(factor)
    if scale and scale_all:
        implied = _magnitude(factor, scale) / _magnitude(factor, scale_all)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": rope.number("attention_factor", None) or implied,
        "beta_fast": rope.number("beta_fast", None) or 32.0,
        "beta_slow": rope.number("beta_slow", None) or 1.0,
        "truncate": rope.flag("truncate", True),
    }


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0


def _check_keys(rope: JsonObject, known: tuple[str, ...], kind: str) -> None:
    for key, value in rope.items():
        if key not in known and value is not None:
            rope.refuse(key, f"is not supported with rope_type {kind!r}")


def _check_computed(section: JsonObject, computed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in computed.items():
        value = section.get(key)
        if value is not None and not any(
            value == good and isinstance(value, bool) == isinstance(good, bool) for good in values
        ):
            only = " or ".join(map(repr, values)) or "null"
            section.refuse(key, f"= {value!r} is not supported, only {only}")
