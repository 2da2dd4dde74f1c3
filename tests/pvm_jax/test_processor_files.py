"""What a Processor takes of a checkpoint's files, and says of those that are missing or wrong."""

from dataclasses import replace

import pytest

from pvm_jax.data.processor import Processor
from tests.pvm_jax.processor_files import (
    IMAGES,
    TEMPLATE,
    THINKING_TEMPLATE,
    VIDEOS,
    write_checkpoint,
    write_json,
)


def test_template_files_in_the_order_of_transformers(tmp_path):
    write_checkpoint(tmp_path)
    assert Processor.from_pretrained(tmp_path).chat_template == TEMPLATE
    write_json(tmp_path / "chat_template.json", {"chat_template": THINKING_TEMPLATE})
    assert Processor.from_pretrained(tmp_path).chat_template == THINKING_TEMPLATE
    (tmp_path / "chat_template.json").unlink()
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Processor.from_pretrained(tmp_path)


def test_pixel_settings_files_in_the_order_of_transformers(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "video_preprocessor_config.json").unlink()
    write_json(tmp_path / "preprocessor_config.json", IMAGES | {"max_pixels": 5000})
    processor = Processor.from_pretrained(tmp_path)
    assert (processor.image_settings.max_pixels, processor.video_settings.max_pixels) == (
        5000,
        65536,
    )
    nested = {
        "image_processor": IMAGES | {"max_pixels": 6000},
        "video_processor": VIDEOS | {"merge_size": 4},
    }
    write_json(tmp_path / "processor_config.json", nested)
    processor = Processor.from_pretrained(tmp_path)
    assert (processor.image_settings.max_pixels, processor.video_settings.merge_size) == (6000, 4)
    write_json(
        tmp_path / "processor_config.json", {"image_processor": IMAGES | {"do_rescale": False}}
    )
    with pytest.raises(
        ValueError, match=r"processor_config\.json: do_rescale = False is not supported"
    ):
        Processor.from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Processor.from_pretrained(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Processor.from_pretrained(tmp_path)
    write_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json"):
        Processor.from_pretrained(tmp_path)


def test_tokenizer_without_visual_tokens_is_refused(tmp_path):
    write_checkpoint(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|video_pad|>", "<|video_gap|>"))
    with pytest.raises(ValueError, match=r"no token <\|video_pad\|>"):
        Processor.from_pretrained(tmp_path)


def test_fingerprints_differ_where_sizes_could(tmp_path):
    same = Processor.from_pretrained(write_checkpoint(tmp_path))
    assert same.fingerprint == Processor.from_pretrained(tmp_path).fingerprint
    other = Processor.from_pretrained(write_checkpoint(tmp_path, THINKING_TEMPLATE))
    smaller = replace(same.image_settings, max_pixels=same.image_settings.max_pixels // 2)
    resized = Processor(same.tokenizer, same.chat_template, smaller, same.video_settings)
    assert len({same.fingerprint, other.fingerprint, resized.fingerprint}) == 3
