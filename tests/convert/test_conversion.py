"""Hugging Face -> Orbax -> Hugging Face: equal bytes, and errors that name what is wrong."""

import ast
import json
import runpy
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from convert import hf_to_orbax, orbax_to_hf, store
from pvm_jax import load, save
from pvm_jax.checkpoint.directory import CheckpointError
from pvm_jax.checkpoint.store import save_branch
from pvm_jax.config import ModelConfig
from pvm_jax.hf_config import read_config
from pvm_jax.model.parameters import by_path
from pvm_jax.sharding import make_mesh
from tests.convert.directories import read_tensors

EMBEDDING = "model.language_model.embed_tokens.weight"
DOWN = "model.language_model.layers.3.mlp.down_proj.weight"


def assert_equal_bytes(one: Path, other: Path) -> None:
    a, b = read_tensors(one), read_tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def test_there_and_back(golden, tmp_path):
    stored = tmp_path / "100%25 #1"  # a name, and no part of a URL
    hf_to_orbax.convert(golden, stored)
    orbax_to_hf.convert(stored, tmp_path / "back", max_shard_size="300KB")
    assert_equal_bytes(golden, tmp_path / "back")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert ModelConfig.from_hf(tmp_path / "back") == ModelConfig.from_hf(golden)


def test_there_and_back_in_small_blocks(golden, tmp_path, monkeypatch):
    """Layers cut into rows, rows into chunks: what full-size tensors go through."""
    monkeypatch.setattr(store, "BLOCK_BYTES", 2**14)
    monkeypatch.setattr(store, "CHUNK_BYTES", 2**9)
    hf_to_orbax.convert(golden, tmp_path / "orbax")
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    assert_equal_bytes(golden, tmp_path / "back")
    read, target = load(tmp_path / "orbax", mesh=make_mesh(1, 4, 2)), read_tensors(golden)
    layers = by_path(nnx.state(read))["language_model/layers/mlp/down_proj/weight"]
    np.testing.assert_array_equal(layers[3], target[DOWN])


def test_plain_bfloat16(plain, tmp_path):
    """Side files and unknown config keys survive; the fresh branch is left out again."""
    hf_to_orbax.convert(plain, tmp_path / "orbax", (1, 2), 16)
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back", plain=True)
    assert_equal_bytes(plain, tmp_path / "back")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (plain / name).read_bytes()
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (plain, tmp_path / "back")
    )
    after["text_config"].pop("tie_word_embeddings")
    before["text_config"].pop("tie_word_embeddings", None)
    assert after == before


@pytest.mark.parametrize("golden", ["shape_8b"], indirect=True)
def test_with_the_branch_the_config_is_the_authors(plain, tmp_path):
    hf_to_orbax.convert(plain, tmp_path / "orbax", (1, 2), 32)
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["PVMQwen3VLForConditionalGeneration"]
    assert (config["text_config"]["pvm_layers"], config["text_config"]["pvm_hidden_size"]) == (
        [1, 2],
        32,
    )
    assert "rope_scaling" not in config["text_config"]
    assert "model.language_model.layers.2.pvm_block.cross_attn.q_norm.weight" in read_tensors(
        tmp_path / "back"
    )


@pytest.mark.parametrize("golden", ["shape_8b"], indirect=True)
def test_with_the_branch_goes_the_code_that_runs_it(variant, tmp_path):
    """And its name, in place of other code's; without a branch, neither. The export is read back as
    it is, and nothing of it is run."""

    def change(_: dict, config: dict) -> None:
        config["auto_map"] = {"AutoConfig": "configuration_of_others.Config"}

    hf_to_orbax.convert(variant(change), tmp_path / "orbax")
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "hf")
    code = tmp_path / "hf" / "modeling_pvm_qwen3_vl.py"
    assert code.read_bytes() == orbax_to_hf.CODE.read_bytes()
    classes = {
        node.name for node in ast.parse(code.read_text()).body if isinstance(node, ast.ClassDef)
    }
    named = json.loads((tmp_path / "hf" / "config.json").read_text())["auto_map"]
    assert {name.split(".")[0] for name in named.values()} == {code.stem}
    assert {name.split(".")[1] for name in named.values()} <= classes
    assert "AutoModelForImageTextToText" in named

    code.write_text("raise SystemExit('this ran')")
    hf_to_orbax.convert(tmp_path / "hf", tmp_path / "again")
    orbax_to_hf.convert(tmp_path / "again", tmp_path / "back")
    assert_equal_bytes(tmp_path / "back", tmp_path / "hf")
    assert (tmp_path / "back" / code.name).read_bytes() == orbax_to_hf.CODE.read_bytes()
    configs = [(tmp_path / name / "config.json").read_text() for name in ("hf", "back")]
    assert configs[0] == configs[1]

    orbax_to_hf.convert(tmp_path / "again", tmp_path / "plain", plain=True)
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize("golden", ["shape_8b"], indirect=True)
def test_visibility_and_gate_are_a_checkpoints_own(variant, golden_checkpoints, tmp_path):
    """There and back, and in what a branch that was saved alone brings to a checkpoint with another
    branch."""
    own = {"pvm_visibility": "preceding", "pvm_gate": "token"}

    def change(tensors: dict, config: dict) -> None:
        config["text_config"] |= own
        for name in [name for name in tensors if name.endswith("output_expander.weight")]:
            weight = tensors[name][:, 0].copy()
            tensors[name.replace("output_expander.weight", "gate_token")] = weight

    by_token = variant(change)
    hf_to_orbax.convert(by_token, tmp_path / "orbax")
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    assert_equal_bytes(by_token, tmp_path / "back")
    assert read_config(tmp_path / "back")["text_config"].items() >= own.items()
    with pytest.raises(ValueError, match="--pvm_gate scalar: the checkpoint brings its own branch"):
        hf_to_orbax.convert(by_token, tmp_path / "other", pvm_gate="scalar")

    model = load(tmp_path / "orbax")
    save_branch(tmp_path / "branch", model)
    published = golden_checkpoints["shape_8b"]
    moved = load(published, branch=tmp_path / "branch")
    assert moved.config.text == model.config.text != ModelConfig.from_hf(published).text
    got, want = (by_path(nnx.state(one.pvm)) for one in (moved, model))
    assert got.keys() == want.keys()
    assert all((got[path] == want[path]).all() for path in want)


@pytest.mark.parametrize("golden", ["shape_8b"], indirect=True)
def test_fresh_branch(plain, tmp_path):
    hf_to_orbax.convert(plain, tmp_path / "one", seed=1, pvm_gate="token")
    hf_to_orbax.convert(plain, tmp_path / "two", seed=2, pvm_gate="token")
    model = load(tmp_path / "one")
    assert model.config.text == ModelConfig.from_hf(plain).with_pvm(gate="token").text
    one, two = (by_path(nnx.state(made)) for made in (model, load(tmp_path / "two")))
    expanders = [f"pvm/{layer}/output_expander/weight" for layer in model.config.text.pvm_layers]
    for layer, expander in zip(model.config.text.pvm_layers, expanders, strict=True):
        assert one[f"pvm/{layer}/gate_alpha"] == 0
        assert not one[f"pvm/{layer}/gate_token"].any()
        assert (one[f"pvm/{layer}/input_norm/weight"] == 1).all()
        assert np.std(one[expander].astype(np.float32)) == pytest.approx(0.02, rel=0.1)
        assert one[expander].dtype == jnp.bfloat16
        assert (one[expander] != two[expander]).any()
    assert (one[expanders[0]] != one[expanders[1]]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cast(golden, tmp_path, dtype):
    hf_to_orbax.convert(golden, tmp_path / "orbax", dtype=dtype)
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    for name, tensor in read_tensors(tmp_path / "back").items():
        assert tensor.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(tensor, read_tensors(golden)[name].astype(dtype))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == dtype


def test_orbax_alone_reads_it(golden, tmp_path):
    """An ordinary Orbax checkpoint, to be restored into any sharding; arrays of zeros too."""
    hf_to_orbax.convert(golden, tmp_path / "orbax")
    mesh = make_mesh(2, 2, 2)
    path = tmp_path / "orbax" / "params"
    sharding = jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor"))
    metadata = ocp.metadata(str(path)).metadata
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=sharding if len(leaf.shape) == 3 else jax.NamedSharding(mesh, jax.P()),
        ),
        metadata,
    )
    tree, tensors = ocp.load(str(path), abstract), read_tensors(golden)
    up = tree["language_model"]["layers"]["mlp"]["up_proj"]["weight"]
    assert up.sharding == sharding
    for layer in range(up.shape[0]):
        np.testing.assert_array_equal(
            up[layer], tensors[f"model.language_model.layers.{layer}.mlp.up_proj.weight"]
        )
    patches = tensors["model.visual.patch_embed.proj.weight"]
    np.testing.assert_array_equal(
        tree["visual"]["patch_embed"]["proj"]["weight"], patches.reshape(len(patches), -1)
    )
    assert "pvm" in ocp.load(str(path))


def test_exports_what_was_saved_after_training(golden_model, golden, tmp_path):
    save(tmp_path / "saved", golden_model, assets=golden)
    orbax_to_hf.convert(tmp_path / "saved", tmp_path / "back")
    assert_equal_bytes(golden, tmp_path / "back")


class TestRefused:
    """Nothing is left behind, neither the destination nor what was to become it."""

    @pytest.fixture(autouse=True)
    def nothing_left(self, tmp_path):
        yield
        assert not [path.name for path in tmp_path.iterdir() if "orbax" in path.name]

    def convert(self, source: Path, tmp_path: Path, **options) -> str:
        with pytest.raises((CheckpointError, OSError, ValueError)) as error:
            hf_to_orbax.convert(source, tmp_path / "orbax", **options)
        return str(error.value)

    def test_all_problems_at_once(self, variant, tmp_path):
        def change(tensors: dict, config: dict) -> None:
            del tensors["model.visual.merger.norm.bias"]
            tensors["model.extra"] = np.zeros((2, 3), np.float32)
            tensors[DOWN] = tensors[DOWN].T.copy()
            tensors["model.language_model.norm.weight"] = tensors[
                "model.language_model.norm.weight"
            ].astype(np.float16)

        message = self.convert(variant(change), tmp_path)
        assert "missing: model.visual.merger.norm.bias (32,)" in message
        assert "unexpected: model.extra (2, 3)" in message
        assert f"wrong shape: {DOWN}: expected " in message
        assert "wrong type: 1 tensors are F16 (model.language_model.norm.weight)" in message
        assert "(4 problems)" in message

    def test_branch_without_config(self, variant, tmp_path):
        def change(tensors: dict, config: dict) -> None:
            del config["text_config"]["pvm_layers"]

        assert ".pvm_block." in self.convert(variant(change), tmp_path)

    def test_config_without_branch(self, variant, tmp_path):
        def change(tensors: dict, config: dict) -> None:
            for name in [name for name in tensors if name.endswith("gate_alpha")]:
                del tensors[name]

        assert "gate_alpha (1,)" in self.convert(variant(change), tmp_path)

    def test_other_layers_or_gate_than_the_checkpoints(self, golden, tmp_path):
        assert "--pvm_layers (0,)" in self.convert(golden, tmp_path, pvm_layers=(0,))
        said = self.convert(golden, tmp_path, pvm_gate="token")
        assert said.startswith(
            "--pvm_gate token: the checkpoint brings its own branch, with scalar"
        )
        assert "\n" not in said

    def test_mixed_types_in_a_stack(self, variant, tmp_path):
        def change(tensors: dict, config: dict) -> None:
            tensors[DOWN] = tensors[DOWN].astype(ml_dtypes.bfloat16)

        assert "--dtype" in self.convert(variant(change), tmp_path)

    def test_cut_off_file(self, corrupt, tmp_path):
        last = sorted(corrupt.glob("model*.safetensors"))[-1]
        assert f"{last} is not a whole safetensors file" in self.convert(corrupt, tmp_path)

    def test_cut_off_while_read(self, golden, tmp_path, monkeypatch):
        source = Path(shutil.copytree(golden, tmp_path / "source"))
        last = sorted(source.glob("model*.safetensors"))[-1]
        copy_assets = hf_to_orbax.copy_assets

        def cut_after_check(*args):
            last.write_bytes(last.read_bytes()[:-100])
            copy_assets(*args)

        monkeypatch.setattr(hf_to_orbax, "copy_assets", cut_after_check)
        assert f"{last} ended while" in self.convert(source, tmp_path)

    def test_missing_file_of_the_index(self, golden, tmp_path):
        source = Path(shutil.copytree(golden, tmp_path / "source"))
        file = sorted(source.glob("model*.safetensors"))[-1]
        file.unlink()
        assert file.name in self.convert(source, tmp_path)

    def test_no_weights(self, tmp_path, golden):
        (tmp_path / "empty").mkdir()
        shutil.copy(golden / "config.json", tmp_path / "empty")
        assert "neither model.safetensors nor" in self.convert(tmp_path / "empty", tmp_path)


def test_a_full_destination_is_left_alone(golden, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        hf_to_orbax.convert(golden, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_an_empty_destination_is_taken(golden, tmp_path):
    (tmp_path / "orbax").mkdir()
    hf_to_orbax.convert(golden, tmp_path / "orbax")
    load(tmp_path / "orbax")


@pytest.mark.parametrize("golden", ["shape_4b"], indirect=True)
class TestTied:
    def test_a_stored_head_is_left_out(self, variant, tmp_path):
        source = variant(
            lambda tensors, config: tensors.update({"lm_head.weight": tensors[EMBEDDING]})
        )
        hf_to_orbax.convert(source, tmp_path / "orbax")
        orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
        assert "lm_head.weight" not in read_tensors(tmp_path / "back")

    def test_a_different_head_is_refused(self, variant, tmp_path):
        source = variant(
            lambda tensors, config: tensors.update({"lm_head.weight": tensors[EMBEDDING] + 1})
        )
        with pytest.raises(CheckpointError, match=r"unexpected: lm_head\.weight"):
            hf_to_orbax.convert(source, tmp_path / "orbax")


class TestCommand:
    @pytest.mark.parametrize("module", ["convert.hf_to_orbax", "convert.orbax_to_hf"])
    def test_help_has_examples(self, module, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_module(module, run_name="__main__")
        assert f"\n  python -m {module} " in capsys.readouterr().out

    @pytest.mark.parametrize("golden", ["shape_8b"], indirect=True)
    def test_arguments(self, plain, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(jax.config, "update", lambda *_: None)
        chosen = ["--pvm-visibility", "preceding", "--pvm-gate", "token"]
        hf_to_orbax.main(
            [
                str(plain),
                str(tmp_path / "o"),
                "--pvm-layers",
                "0",
                "3",
                "--pvm-hidden-size",
                "16",
                *chosen,
            ]
        )
        text = read_config(tmp_path / "o")["text_config"]
        assert (text["pvm_visibility"], text["pvm_gate"]) == ("preceding", "token")
        orbax_to_hf.main(
            [str(tmp_path / "o"), str(tmp_path / "b"), "--plain", "--max-shard-size", "1MB"]
        )
        assert_equal_bytes(plain, tmp_path / "b")
        assert "peak memory" in capsys.readouterr().out

    def test_errors_are_one_line(self, tmp_path, refused):
        assert "config.json" in refused(hf_to_orbax.main, [str(tmp_path), str(tmp_path / "o")])
