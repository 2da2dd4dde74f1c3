"""The demo's Hugging Face directory is what the processor, the model and transformers expect of
one."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from demo import checkpoint, task
from pvm_jax.checkpoint.store import load
from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.data.processor import Processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    checkpoint.write_assets(path)
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


def test_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert all(len(tokenizer.encode(word)) == 1 for word in task.words())
    text = "B3 ground navy\nWhat is\n\n this: Größe 漢字?"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id, tokenizer.pad_token_id]) == [
        checkpoint.IM_END,
        checkpoint.ENDOFTEXT,
    ]
    assert checkpoint.make_tokenizer().to_str() == checkpoint.make_tokenizer().to_str()


def test_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "List ink"}],
        },
    ]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>List ink<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == text + "<|im_start|>assistant\n"
    messages.append({"role": "assistant", "content": "A1 ink red\n"})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == prompt + "A1 ink red\n<|im_end|>\n"
    numbered = tokenizer.apply_chat_template(messages, tokenize=False, add_vision_id=True)
    assert "Picture 1: <|vision_start|>" in numbered


def test_config_round_trip(folder):
    config = ModelConfig.from_hf(folder)
    assert config == checkpoint.make_config(checkpoint.make_tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(config.image_token_id) == checkpoint.IMAGE_PAD
    assert len(tokenizer) <= config.text.vocab_size


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_cell_is_a_visual_token_and_loss_covers_the_answer(folder, processor, size):
    words = 5
    example = task.make_example(
        task.Mixture(sizes=(size,), lines=(16, 16), filler=(words, words)), size
    )
    encoded = processor.encode(example.messages(task.draw(example.scene)))
    assert encoded.image_grid_thw.tolist() == [[1, 2 * size, 2 * size]]
    learned = encoded.input_ids[encoded.loss_mask]
    assert (
        processor.decode(learned, skip_special_tokens=False) == example.answer + checkpoint.IM_END
    )
    assert len(learned) == 3 * len(example.lines) + 1
    assert len(encoded.input_ids) == 15 + size**2 + words + 3 * len(example.lines)
    Batch.from_rows([[encoded]], ModelConfig.from_hf(folder), length=128, patches=64)


def test_both_layouts_hold_the_model(tmp_path):
    checkpoint.write(tmp_path)
    model = load(tmp_path / "orbax")
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model))]
    assert 1.5e6 < sum(sizes) < 3e6
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert sum(tensor.size for tensor in tensors.values()) == sum(sizes)
    assert not any("pvm" in name for name in tensors)
    positions = tensors["model.visual.pos_embed.weight"]
    np.testing.assert_array_equal(positions, model.visual.pos_embed.weight[...])
    assert 0.4 < positions.std() < 0.6
    for folder in ("orbax", "hf"):
        assert Processor.from_pretrained(tmp_path / folder).tokenizer.eos_token == checkpoint.IM_END
    with pytest.raises(FileExistsError):
        checkpoint.write(tmp_path)
