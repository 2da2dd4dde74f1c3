"""The published sizes of Qwen3-VL."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """Fields of `TextConfig`, `VisionConfig` and `ModelConfig`; their defaults are the 8b's."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tie_word_embeddings: bool


def _text(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


_SMALL_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "depth": 24,
    "deepstack_visual_indexes": (5, 11, 17),
}

PRESETS: Mapping[str, Preset] = {
    "2b": Preset(_text(2048, 6144, 28, 16), _SMALL_VISION | {"out_hidden_size": 2048}, True),
    "4b": Preset(_text(2560, 9728, 36, 32), _SMALL_VISION | {"out_hidden_size": 2560}, True),
    "8b": Preset(_text(4096, 12288, 36, 32), {}, False),
    "32b": Preset(_text(5120, 25600, 64, 64), {"out_hidden_size": 5120}, False),
}
