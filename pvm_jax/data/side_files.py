"""What a checkpoint's files say of its inputs beside the tokenizer: pixel settings, stop tokens,
and whether the model reads what is made by them."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pvm_jax.config import ModelConfig
from pvm_jax.data.patches import ImageSettings, PixelSettings, VideoSettings
from pvm_jax.data.tokenizer import has_tokenizer, read_tokenizer
from pvm_jax.files.json_file import JsonObject, read_json_if_any
from pvm_jax.files.paths import any_path

_VISUAL_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_SIZES = {
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}
"""A size's name in the preprocessor config, and in config.json."""


def visual_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The placeholders of an image and of a video, and what stands before and after them."""
    return [getattr(tokenizer, name, default) for name, default in _VISUAL_TOKENS.items()]


def pixel_settings(folder: Path) -> tuple[ImageSettings, VideoSettings]:
    """From processor_config.json, as transformers 5 saves it, or from the files that came before
    it.

    Raises:
        FileNotFoundError: if there is none of them.
        ValueError: naming the file, for a setting that is malformed or not computed here.
    """
    nested = read_json_if_any(folder / "processor_config.json")
    file = "processor_config.json" if "image_processor" in nested else "preprocessor_config.json"
    image = nested.object("image_processor", None) or read_json_if_any(folder / file)
    if not image:
        raise FileNotFoundError(
            f"{folder}: no preprocessor_config.json (nor image_processor in processor_config.json)"
        )
    image_settings = ImageSettings.from_config(image, str(folder / file))
    video = nested.object("video_processor", None)
    source = "processor_config.json" if video else "video_preprocessor_config.json"
    video = video or read_json_if_any(folder / source)
    if not video:
        # Hugging Face then reads the images' file, whose min_pixels and max_pixels mean nothing to
        # videos.
        source = file
        video = {key: value for key, value in image.items() if key not in VideoSettings.refuses}
    return image_settings, VideoSettings.from_config(video, str(folder / source))


def read_stop_tokens(
    checkpoint: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[int, ...]:
    """The end-of-sequence ids: of generation_config.json, else of config.json, else the
    tokenizer's; none where a file says null, or weights stand without a tokenizer.

    Args:
        tokenizer: the checkpoint's, where it has been read.

    Raises:
        ValueError: naming file and key, if they cannot be read.
    """
    folder = any_path(checkpoint)
    config = read_json_if_any(folder / "config.json")
    text = config.object("text_config", None) or JsonObject({}, config.file)
    for source in (read_json_if_any(folder / "generation_config.json"), text, config):
        if "eos_token_id" in source:
            return _ids(source, text.integer("vocab_size", None))
    if tokenizer is None:
        if not has_tokenizer(folder):
            return ()
        tokenizer = read_tokenizer(folder)
    stop: Any = tokenizer.eos_token_id
    return () if stop is None else (stop,)


def _ids(source: JsonObject, rows: int | None) -> tuple[int, ...]:
    value = source["eos_token_id"]
    if isinstance(value, list):
        ids = source.integers("eos_token_id")
    else:
        ids = () if value is None else (source.integer("eos_token_id"),)
    for token in ids:
        if rows is not None and token >= rows:
            source.refuse("eos_token_id", f"{token} is outside the vocabulary of {rows}")
    return ids


def check_fits(
    folder: Path, tokenizer: PreTrainedTokenizerBase, settings: tuple[PixelSettings, PixelSettings]
) -> None:
    """Raises ValueError unless the model of config.json reads patches of this size (of images and
    of videos), and knows the placeholders by the tokenizer's ids."""
    config = ModelConfig.from_hf(folder)
    for kind, made in zip(("images", "videos"), settings, strict=True):
        for ours, theirs in _SIZES.items():
            if getattr(made, ours) != getattr(config.vision, theirs):
                raise ValueError(
                    f"{folder}: {ours} of {kind} is {getattr(made, ours)} in the preprocessor"
                    f" config, vision_config.{theirs} {getattr(config.vision, theirs)} in"
                    " config.json: one of them is another checkpoint's"
                )
    for name, token in zip(_VISUAL_TOKENS, visual_tokens(tokenizer), strict=True):
        found, expected = tokenizer.convert_tokens_to_ids(token), getattr(config, f"{name}_id")
        if found != expected:
            raise ValueError(
                f"{folder}/config.json: {name}_id is {expected}, but the tokenizer's {token} is"
                f" {found}: one of them is another checkpoint's"
            )
