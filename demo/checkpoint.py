"""The demo's untrained model: a Qwen3-VL of two million parameters, without the branch, in both
layouts.

The tokenizer is byte-level BPE like Qwen's, so that any text can be asked, trained on the task's
words alone, so that each of them is one token: a line of an answer is three tokens (`B3`, `
ground`, ` navy⏎`).
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from flax import nnx
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from convert.orbax_to_hf import convert
from demo import task
from pvm_jax.checkpoint.store import save
from pvm_jax.config import ModelConfig, TextConfig, VisionConfig
from pvm_jax.model.qwen3_vl import Qwen3VL
from pvm_jax.options import run_as_command

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
VOCABULARY_MULTIPLE = 64
# N(0, 0.5): beside the patches' embeddings, N(0, 0.02) would say nothing about place for hundreds
# of steps
POSITION_SCALE = 25

CHAT_TEMPLATE = """\
{%- set count = namespace(images=0, videos=0) %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {%- set count.images = count.images + 1 %}
                {{- 'Picture ' ~ count.images ~ ': ' if add_vision_id else '' }}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {%- set count.videos = count.videos + 1 %}
                {{- 'Video ' ~ count.videos ~ ': ' if add_vision_id else '' }}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE in which every word of the task, with its space before or its line break
    after, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\S+\n?|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[
            AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS
        ],
        show_progress=False,
    )
    roles = ("system\n", "user\n", "assistant\n")
    tokenizer.train_from_iterator([*roles, *task.words()], trainer)
    return tokenizer


def make_config(tokenizer: Tokenizer) -> ModelConfig:
    """The model's shape, without the branch."""
    words = tokenizer.get_vocab_size()
    text = TextConfig(
        vocab_size=-(-words // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=1e4,
        mrope_section=(6, 5, 5),
        max_position_embeddings=4096,
    )
    vision = VisionConfig(
        hidden_size=96,
        intermediate_size=384,
        depth=3,
        num_heads=3,
        out_hidden_size=text.hidden_size,
        num_position_embeddings=64,
        deepstack_visual_indexes=(0, 1),
    )
    return ModelConfig(
        text=text,
        vision=vision,
        tie_word_embeddings=True,
        image_token_id=_token_id(tokenizer, IMAGE_PAD),
        video_token_id=_token_id(tokenizer, VIDEO_PAD),
        vision_start_token_id=_token_id(tokenizer, VISION_START),
        vision_end_token_id=_token_id(tokenizer, VISION_END),
    )


def write_assets(folder: Path) -> ModelConfig:
    """Writes everything but the weights to `folder`: config, tokenizer, chat template, preprocessor
    and generation config."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    end, pad = _token_id(tokenizer, IM_END), _token_id(tokenizer, ENDOFTEXT)
    _write_json(folder / "config.json", config.to_hf())
    _write_json(
        folder / "generation_config.json",
        {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad},
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": IM_END,
            "pad_token": ENDOFTEXT,
            "unk_token": None,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.text.max_position_embeddings,
            "additional_special_tokens": [
                token for token in SPECIAL_TOKENS if token not in (ENDOFTEXT, IM_END)
            ],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    pixels = {"shortest_edge": task.CELL**2, "longest_edge": (8 * task.CELL) ** 2}
    common = {
        "size": pixels,
        "patch_size": config.vision.patch_size,
        "temporal_patch_size": config.vision.temporal_patch_size,
        "merge_size": config.vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    _write_json(
        folder / "preprocessor_config.json",
        common | {"image_processor_type": "Qwen2VLImageProcessorFast"},
    )
    _write_json(
        folder / "video_preprocessor_config.json",
        common | {"video_processor_type": "Qwen3VLVideoProcessor"},
    )
    return config


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    assert number is not None, token
    return number


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def make_model(config: ModelConfig, seed: int) -> Qwen3VL:
    """The model with fresh weights, its learned vision positions scaled up."""
    model = nnx.jit(lambda: Qwen3VL(config, rngs=nnx.Rngs(seed)))()
    table = model.visual.pos_embed.weight
    table[...] = table[...] * POSITION_SCALE
    return model


def write(out: Path, seed: int = 0) -> None:
    """Writes the untrained model to out/orbax, for train.sft, and to out/hf, an ordinary Hugging
    Face directory.

    Example: python -m demo.checkpoint out/demo/untrained

    Args:
        out: folder to write; its orbax and hf must be absent or empty.
        seed: of the weights.

    Raises:
        FileExistsError: if one of them holds something.
    """
    with TemporaryDirectory() as assets:
        config = write_assets(Path(assets))
        save(out / "orbax", make_model(config, seed), assets=assets)
    convert(out / "orbax", out / "hf")


if __name__ == "__main__":
    run_as_command(write)
