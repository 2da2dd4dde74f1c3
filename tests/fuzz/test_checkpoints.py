"""Files of a Hugging Face checkpoint, damaged: what is read is what was written, or the file is
named in one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from convert.safetensors_files import DTYPES, INDEX, SafetensorsReader
from pvm_jax.config import ModelConfig
from pvm_jax.data.processor import Processor
from pvm_jax.data.side_files import read_stop_tokens
from tests.fuzz.mutations import VALUES, damaged, mutated, one_of, outcome, shuffled, with_nulls
from tests.pvm_jax.processor_files import write_checkpoint, write_json
from tests.pvm_jax.test_chat_template import TOOLS_TEMPLATE
from tests.pvm_jax.test_model import CONFIG

NAMES = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json")
NAMES += ("preprocessor_config.json", "video_preprocessor_config.json")
KEYS = (
    "vocab_size",
    "eos_token_id",
    "hidden_size",
    "rope_scaling",
    "rope_type",
    "size",
    "auto_map",
)
KEYS += (
    "patch_size",
    "image_mean",
    "weight_map",
    "pad_token",
    "chat_template",
    "dtype",
    "shape",
    "",
)
KEYS += (
    "auto_map",
    "shape",
    "quantization_config",
    "min_pixels",
    "tokenizer_class",
    "data_offsets",
    "t0",
)
CONTENTS = (*VALUES, "linear", "yarn", 16, 3.0, [0.5] * 3, "a.safetensors", "../a.safetensors")
CONTENTS += (
    "<|im_end|>",
    {"type": "yarn", "factor": 2.0},
    "F32",
    "BF16",
    "I64",
    [0, 8],
    [2**60, 4],
)
ASKED = [
    {
        "role": "user",
        "content": [{"type": "image", "image": Image.new("RGB", (100, 70), (9, 200, 30))}],
    },
    {"role": "assistant", "content": "a boat"},
]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's files, small; its weights are four tensors in two files."""
    write_checkpoint(tmp_path, TOOLS_TEMPLATE)
    ids = {"vision_start_token_id": 3, "vision_end_token_id": 4}
    ids |= {"image_token_id": 5, "video_token_id": 6}
    text = replace(CONFIG.text, vocab_size=400)
    config = replace(CONFIG, text=text, vision=replace(CONFIG.vision, patch_size=16), **ids).to_hf()
    config["text_config"]["eos_token_id"] = 2
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 0], "temperature": 0.7})
    places = {}
    for number, name in enumerate(("a.safetensors", "b.safetensors")):
        tensors = {f"t{2 * number + k}": np.full((2, 3 + k), number, np.float32) for k in range(2)}
        save_file(tensors, tmp_path / name)
        places |= dict.fromkeys(tensors, name)
    write_json(tmp_path / INDEX, {"metadata": {"total_size": 112}, "weight_map": places})
    return tmp_path


def inputs(folder):
    """What the files say of the model and its inputs."""
    config, stops = ModelConfig.from_hf(folder), read_stop_tokens(folder)
    processor = Processor.from_pretrained(folder)
    example = processor.encode(ASKED)
    tokens, learned = example.input_ids.tolist(), example.loss_mask.tolist()
    return config, stops, tokens, learned, example.pixel_values.tobytes(), processor.video_settings


def weights(folder):
    """{name: (dtype, shape, bytes)} of all tensors."""
    found = {}
    with SafetensorsReader(folder) as reader:
        for name, stored in reader.tensors.items():
            out = np.empty(stored.shape, DTYPES.get(stored.dtype, np.uint8))
            reader.read(name, 0, out)
            found[name] = stored.dtype, stored.shape, out.tobytes()
    return found


def changed(file, rng, *, only_bytes=False):
    """Damages `file`, as JSON or as bytes; what is in it now."""
    content = file.read_bytes()
    if only_bytes or not rng.integers(5):
        file.write_bytes(damaged(content, rng))
        return None
    case = mutated(json.loads(content), rng, CONTENTS, KEYS)
    write_json(file, case)
    return case


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("seed", "cases"), [pytest.param(0, 100), pytest.param(1, 1000, marks=pytest.mark.slow)]
)
def test_damaged_json_is_read_as_it_stands_or_named(folder, seed, cases, peak):
    rng = np.random.default_rng(seed)
    taken = 0
    for _ in range(cases):
        file = folder / one_of([*NAMES, "config.json", "config.json"], rng)
        content = file.read_bytes()
        case = changed(file, rng)
        found = outcome(lambda: inputs(folder), names=[file.name, "config.json", "the tokenizer"])
        if found.made is not None:
            taken += 1
            write_json(file, shuffled(case if case is not None else json.loads(content), rng))
            assert case is None or inputs(folder) == found.made
        file.write_bytes(content)
    assert cases / 10 < taken < cases / 2


def test_neutral_changes_change_nothing(folder):
    rng = np.random.default_rng(0)
    expected = inputs(folder), weights(folder)
    for name in (*NAMES[:3], *NAMES[4:], INDEX):
        values = json.loads((folder / name).read_text())
        if name != INDEX:
            values = with_nulls(values, rng, ("_name_or_path", "torch_dtype"))
        values |= {"transformers_version": "5", "mine": {"a": [None]}}
        write_json(folder / name, shuffled(values, rng))
    assert (inputs(folder), weights(folder)) == expected


@pytest.mark.parametrize(
    ("seed", "cases"), [pytest.param(0, 80), pytest.param(1, 800, marks=pytest.mark.slow)]
)
def test_damaged_weights_are_the_bytes_that_the_header_names_or_refused(folder, seed, cases, peak):
    rng = np.random.default_rng(seed)
    expected = weights(folder)
    for _ in range(cases):
        file = folder / one_of([INDEX, "a.safetensors"], rng)
        content = file.read_bytes()
        if file.name == INDEX:
            changed(file, rng)
        elif rng.integers(3):
            change_header(file, rng)
        else:
            changed(file, rng, only_bytes=True)
        names = [file.name, INDEX, "model.safetensors", f"too long: '{folder}"]
        found = outcome(lambda: weights(folder), names=names)
        if found.made is not None:
            sound = found.made if file.name == INDEX else {"t2", "t3"}
            assert all(found.made[name] == expected[name] for name in sound)
        file.write_bytes(content)


def change_header(file, rng):
    """Another header before the same bytes."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = mutated(json.loads(content[8 : 8 + length]), rng, CONTENTS, KEYS)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
