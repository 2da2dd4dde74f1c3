"""The models that are measured: the published sizes, and a small one for the CPU."""

from pvm_jax import ModelConfig, TextConfig, VisionConfig

TEXT = TextConfig(
    vocab_size=32000,
    hidden_size=640,
    intermediate_size=1920,
    num_hidden_layers=12,
    num_attention_heads=10,
    num_key_value_heads=5,
    head_dim=64,
    mrope_section=(12, 10, 10),
)
"""A decoder for the CPU: 79 M parameters with its embeddings."""

SMALL = ModelConfig(
    text=TEXT,
    vision=VisionConfig(
        hidden_size=64,
        intermediate_size=64,
        depth=1,
        num_heads=1,
        out_hidden_size=640,
        deepstack_visual_indexes=(0,),
    ),
    tie_word_embeddings=True,
    image_token_id=31990,
    video_token_id=31991,
    vision_start_token_id=31992,
    vision_end_token_id=31993,
).with_pvm((6,), 128)
"""A model for the CPU, in float32; what decodes of it is that of benchmarks.against_torch, with a
branch."""


def config_of(size: str) -> ModelConfig:
    """Of "small" (float32), or of a preset (bfloat16): 2b, 4b, 8b, 32b.

    Raises:
        KeyError: for another one.
    """
    return (
        SMALL
        if size == "small"
        else ModelConfig.preset(size, dtype="bfloat16", param_dtype="bfloat16")
    )
