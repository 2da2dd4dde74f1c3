"""What is taken from safetensors files: each tensor from one place, in its own type, or refused in
one line."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import hf_to_orbax, orbax_to_hf
from convert.safetensors_files import INDEX, SafetensorsReader, cast
from pvm_jax import load
from pvm_jax.checkpoint.directory import CheckpointError
from tests.convert.directories import read_tensors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Two files of one tensor each, and their index."""
    for number, name in enumerate("ab"):
        save_file({name: np.full(2, number, np.float32)}, tmp_path / f"{number}.safetensors")
    write_index(tmp_path, a="0.safetensors", b="1.safetensors")
    return tmp_path


def write_index(directory: Path, **places: object) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))


def test_the_index_is_followed(sharded):
    assert {
        name: stored.file.name for name, stored in SafetensorsReader(sharded).tensors.items()
    } == {
        "a": "0.safetensors",
        "b": "1.safetensors",
    }


def test_a_file_of_several_gigabytes(tmp_path):
    """As checkpoints have them; a hole on the disk but for the last numbers."""
    far = 2**32 + 8
    header = {
        "hole": {"dtype": "F64", "shape": [far // 8], "data_offsets": [0, far]},
        "end": {"dtype": "F16", "shape": [3], "data_offsets": [far, far + 6]},
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(far, os.SEEK_CUR)
        file.write(np.array([1, 2, 3], np.float16).tobytes())
    with SafetensorsReader(tmp_path) as reader:
        found = np.empty(3, np.float16)
        reader.read("end", 0, found)
    np.testing.assert_array_equal(found, [1, 2, 3])


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            {"a": "1.safetensors", "b": "0.safetensors"},
            "a is in 0.safetensors, in 1",
        ),
        ({"a": "0.safetensors"} | {"c": "1.safetensors"}, "b is in 1.safetensors, nowhere by"),
        (
            {"a": "0.safetensors", "b": "1.safetensors", "c": "1.safetensors"},
            "places c in 1.safetensors, which lacks it",
        ),
        ({"a": "../0.safetensors"}, "weight_map.a must be a file of this directory"),
        ({"a": "/0.safetensors"}, "weight_map.a must be a file of this directory"),
        ({"a": ".."}, "weight_map.a must be a file of this directory"),
        ({"a": 3}, "weight_map.a must be a text, got 3"),
        ({}, "weight_map is empty"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(sharded, places, message):
    write_index(sharded, **places)
    with pytest.raises(ValueError, match=message):
        SafetensorsReader(sharded)


def test_a_tensor_in_two_files_is_refused(sharded):
    save_file({name: np.zeros(2, np.float32) for name in "ab"}, sharded / "1.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in 0\.safetensors and in 1\.safetensors"):
        SafetensorsReader(sharded)


def test_a_single_file_beside_an_index_of_others_is_refused(sharded):
    save_file({"a": np.zeros(2, np.float32)}, sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match="remove the one that is out of date"):
        SafetensorsReader(sharded)


def test_an_index_that_is_not_json_is_named(sharded):
    (sharded / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not JSON"):
        SafetensorsReader(sharded)


@pytest.mark.parametrize("golden", ["shape_4b"], indirect=True)
class TestTypes:
    @pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8])
    def test_a_branch_of_any_type_may_be_left_out(self, golden, variant, tmp_path, dtype):
        """safetensors puts wider types first: every other tensor's place depends on its size."""

        def change(tensors: dict, config: dict) -> None:
            for name in tensors:
                if ".pvm_block." in name:
                    tensors[name] = tensors[name].astype(dtype)

        hf_to_orbax.convert(variant(change), tmp_path / "orbax", plain=True)
        orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
        before, after = read_tensors(golden), read_tensors(tmp_path / "back")
        assert after.keys() == {name for name in before if ".pvm_block." not in name}
        assert all(after[name].tobytes() == before[name].tobytes() for name in after)

    @pytest.mark.parametrize("stored", [np.float16, np.float64])
    def test_other_floats_are_cast(self, variant, tmp_path, stored):
        def change(tensors: dict, config: dict) -> None:
            tensors |= {name: tensor.astype(stored) for name, tensor in tensors.items()}

        source = variant(change)
        with pytest.raises(CheckpointError, match="choose what they become with --dtype"):
            hf_to_orbax.convert(source, tmp_path / "orbax")
        hf_to_orbax.convert(source, tmp_path / "orbax", dtype="float32")
        orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
        before, after = read_tensors(source), read_tensors(tmp_path / "back")
        for name, tensor in after.items():
            np.testing.assert_array_equal(tensor, before[name].astype(np.float32))

    def test_a_quantised_checkpoint_is_called_so_in_one_line(self, variant, tmp_path):
        def change(tensors: dict, config: dict) -> None:
            for name in tensors:
                if name.endswith("q_proj.weight"):
                    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)

        with pytest.raises(CheckpointError, match=r"is quantised: .* tensors are F8_E4M3") as error:
            hf_to_orbax.convert(variant(change), tmp_path / "orbax")
        assert "\n" not in str(error.value)

    def test_so_is_one_whose_weights_have_other_names(self, variant, tmp_path):
        def change(tensors: dict, config: dict) -> None:
            weight = tensors.pop("model.language_model.layers.0.mlp.up_proj.weight")
            name = "model.language_model.layers.0.mlp.up_proj.qweight"
            tensors[name] = weight.astype(np.int32)

        with pytest.raises(CheckpointError, match=r"is quantised: 1 tensors are I32"):
            hf_to_orbax.convert(variant(change), tmp_path / "orbax")


def test_a_cast_rounds_once():
    """float64 -> bfloat16 by way of float32 would round these to even, and then down."""
    values = np.array([1 + 2**-8 + 2**-40, -(1 + 2**-8 + 2**-40), 1 + 2**-8, np.inf])
    assert cast(values, BFLOAT16, "x").tolist() == [1 + 2**-7, -(1 + 2**-7), 1, np.inf]
    drawn = np.random.default_rng(0).standard_normal(1000)
    got = cast(drawn, BFLOAT16, "x")
    error = np.abs(got.astype(np.float64) - drawn)
    for side in (-np.inf, np.inf):
        other = np.nextafter(got, np.array(side, BFLOAT16)).astype(np.float64)
        assert (error <= np.abs(other - drawn)).all()


def test_a_cast_makes_nothing_infinite():
    with pytest.raises(CheckpointError, match="x holds numbers that are too large for float32"):
        cast(np.array([1e300]), np.dtype(np.float32), "x")


def test_an_adapter_of_peft_is_called_so(golden, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A.weight": np.zeros(2, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds a PEFT adapter .*: python -m convert.adapter"
    ):
        hf_to_orbax.convert(tmp_path, tmp_path / "orbax")


@pytest.mark.parametrize("golden", ["shape_4b"], indirect=True)
def test_more_tokens_than_rows_are_refused(variant, tmp_path):
    source = variant(lambda tensors, config: None)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["b"] = 512
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"vocab_size is 512, but the tokenizer's 'b' is 512"):
        hf_to_orbax.convert(source, tmp_path / "orbax")


def biased(tensors: dict, config: dict) -> None:
    """Gives every projection of attention, the branch's too, a bias."""
    config["text_config"]["attention_bias"] = True
    generator = np.random.default_rng(0)
    for name in list(tensors):
        if ".visual." not in name and name.endswith("_proj.weight") and "attn." in name:
            bias = generator.standard_normal(len(tensors[name])).astype(np.float32)
            tensors[name.removesuffix("weight") + "bias"] = bias


@pytest.mark.parametrize("golden", ["shape_8b"], indirect=True)
def test_biases_of_attention_survive(variant, tmp_path):
    source = variant(biased)
    hf_to_orbax.convert(source, tmp_path / "orbax")
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    before, after = read_tensors(source), read_tensors(tmp_path / "back")
    assert after.keys() == before.keys()
    assert all(after[name].tobytes() == before[name].tobytes() for name in after)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["text_config"][
        "attention_bias"
    ]


@pytest.mark.parametrize("golden", ["shape_8b"], indirect=True)
def test_a_flipped_bit_is_noticed(golden, tmp_path):
    """By whoever reads what conversion wrote."""
    hf_to_orbax.convert(golden, tmp_path / "orbax")
    embedding = read_tensors(golden)["model.language_model.embed_tokens.weight"]
    piece = embedding[100].tobytes()
    files = [file for file in (tmp_path / "orbax").rglob("*") if file.is_file()]
    (file,) = [file for file in files if piece in file.read_bytes()]
    content = bytearray(file.read_bytes())
    content[content.index(piece)] ^= 1
    file.write_bytes(content)
    for read in (
        lambda: load(tmp_path / "orbax"),
        lambda: orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back"),
    ):
        with pytest.raises(CheckpointError, match=r"params cannot be read: .*Digest mismatch"):
            read()
    assert not (tmp_path / "back").exists()
