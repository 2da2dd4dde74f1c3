"""Checkpoints: any mesh, and the branch apart from its backbone."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pvm_jax import ModelConfig, Qwen3VL, abstract_model, load, load_branch, save, save_branch
from pvm_jax.checkpoint import identity
from pvm_jax.checkpoint.checksums import CHECKSUMS
from pvm_jax.checkpoint.directory import CheckpointError
from pvm_jax.checkpoint.identity import backbone_identity, exact_identity
from pvm_jax.model.parameters import by_path
from pvm_jax.sharding import make_mesh, param_shardings
from tests.full_disk import full_disk

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def converted(golden_checkpoints) -> Path:
    return golden_checkpoints["shape_8b"]


@pytest.fixture(scope="module")
def model(converted) -> Qwen3VL:
    return load(converted)


@pytest.fixture(scope="module")
def trained(model) -> Qwen3VL:
    """The same backbone, another branch."""
    graphdef, params = nnx.split(model)
    return nnx.merge(
        graphdef,
        nnx.map_state(
            lambda path, leaf: jax.device_put(np.asarray(leaf) + 1) if path[0] == "pvm" else leaf,
            params,
        ),
    )


@pytest.fixture(scope="module")
def branch(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("branch") / "branch"
    save_branch(path, trained)
    return path


def filled(config: ModelConfig) -> Qwen3VL:
    """A model of ones, without waiting for an initialisation."""
    graphdef, params = nnx.split(abstract_model(config))
    return nnx.merge(
        graphdef, jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype)), params)
    )


def parameters(model: Qwen3VL) -> dict[str, jax.Array]:
    return by_path(nnx.state(model))


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    one, other = jax.device_get((one, other))  # or a program compares, for each shape and sharding
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


def test_what_orbax_logs_is_its_message_alone(caplog):
    """It raises the error too, which is told in one line."""
    try:
        raise OSError("the disk is full")
    except OSError as error:
        absl.logging.exception("saving failed: %s", error)
    (record,) = caplog.records
    assert record.getMessage() == "saving failed: the disk is full"
    assert record.exc_info is None


def test_a_full_disk_is_named_and_leaves_nothing(model, tmp_path):
    told = r"full.* could not be written: .*Make room there"
    with full_disk(10_000), pytest.raises(CheckpointError, match=told):
        save(tmp_path / "full", model)
    assert not list(tmp_path.iterdir())


class TestLoad:
    @pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
    def test_into_any_mesh(self, converted, model, sizes):
        mesh = make_mesh(*sizes)
        loaded = load(converted, mesh=mesh)
        expected = by_path(param_shardings(nnx.state(loaded), mesh))
        for path, leaf in parameters(loaded).items():
            assert leaf.sharding == expected[path], path
        assert_equal(parameters(loaded), parameters(model))

    def test_from_another_mesh(self, converted, model, tmp_path):
        mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
        save(tmp_path / "sharded", load(converted, mesh=mesh), assets=converted)
        assert_equal(
            parameters(load(tmp_path / "sharded", mesh=make_mesh(2, 1, 4))), parameters(model)
        )
        assert_equal(parameters(load(tmp_path / "sharded")), parameters(model))

    @pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.dtype(jnp.bfloat16)])
    def test_dtype_casts_while_reading(self, converted, model, dtype):
        loaded = load(converted, dtype=dtype, mesh=make_mesh())
        assert (loaded.config.dtype, loaded.config.param_dtype) == ("bfloat16", "bfloat16")
        assert_equal(
            parameters(loaded),
            {path: np.asarray(leaf, jnp.bfloat16) for path, leaf in parameters(model).items()},
        )

    @pytest.mark.parametrize("dtype", ["float16", jnp.int32, "half"])
    def test_another_dtype_is_refused(self, converted, dtype):
        with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got"):
            load(converted, dtype=dtype)

    def test_stored_dtypes_are_kept(self, converted, tmp_path):
        """A trained float32 branch beside its bfloat16 backbone."""
        mixed = load(converted, dtype="bfloat16")
        save(tmp_path / "mixed", load_branch(converted, mixed))
        loaded = parameters(load(tmp_path / "mixed"))
        assert {leaf.dtype.name for path, leaf in loaded.items() if path.startswith("pvm/")} == {
            "float32"
        }
        assert {
            leaf.dtype.name for path, leaf in loaded.items() if not path.startswith("pvm/")
        } == {"bfloat16"}

    def test_config_round_trip(self, model, tmp_path):
        """What is of the run, not of the model, is not stored."""
        save(tmp_path / "saved", filled(replace(model.config, remat="none", attention="xla")))
        assert load(tmp_path / "saved").config == replace(model.config, stop_tokens=())

    def test_stop_tokens_are_the_checkpoints(self, model):
        assert model.config.stop_tokens == (511,)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint directory"):
            load(tmp_path / "absent")

    def test_hugging_face_directory(self):
        with pytest.raises(
            CheckpointError, match=r"convert it first, python -m convert\.hf_to_orbax"
        ):
            load(GOLDEN / "shape_8b")

    def test_another_directory(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(
            CheckpointError, match=r"expected config\.json and params/, found notes\.txt"
        ):
            load(tmp_path)

    def test_shapes_of_another_config(self, converted, tmp_path):
        copied = Path(shutil.copytree(converted, tmp_path / "copied"))
        config = json.loads((copied / "config.json").read_text())
        config["text_config"] |= {"vocab_size": 640, "pvm_layers": [1]}
        (copied / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError) as error:
            load(copied)
        assert "wrong shape: lm_head/weight: expected (640, 64), found (512, 64)" in str(
            error.value
        )
        assert "unexpected: pvm/3/gate_alpha (1,)" in str(error.value)


class TestDamage:
    """Whatever a disk or a copy did to the files is one line that names them."""

    @pytest.fixture
    def copied(self, branch, tmp_path) -> Path:
        return Path(shutil.copytree(branch, tmp_path / "copied"))

    def test_any_flipped_bit_is_noticed(self, copied, model):
        names = (copied / CHECKSUMS).read_text().split()[1::2]
        assert any(name.startswith("params/") for name in names)
        for name in names:
            content = (copied / name).read_bytes()
            if not content:
                continue
            (copied / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(CheckpointError, match=rf"1 files differ .*: {re.escape(name)}\."):
                load_branch(copied, model)
            (copied / name).write_bytes(content)
        load_branch(copied, model)

    def test_a_missing_file_is_noticed(self, copied, model):
        next((copied / "params").rglob("manifest.ocdbt")).unlink()
        with pytest.raises(CheckpointError, match=r"missing: params/.*manifest\.ocdbt"):
            load_branch(copied, model)

    def test_an_older_checkpoint_without_checksums_loads(self, copied, model, trained):
        (copied / CHECKSUMS).unlink()
        assert_equal(parameters(load_branch(copied, model)), parameters(trained))

    @pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
    def test_what_orbax_cannot_read_is_one_line(self, converted, tmp_path, name):
        """In a converted checkpoint, whose files have no checksums of their own."""
        copied = Path(shutil.copytree(converted, tmp_path / "converted"))
        for file in (copied / "params").rglob(name):
            file.write_text("{")
        with pytest.raises(CheckpointError, match=r"params cannot be read: ") as error:
            load(copied)
        assert "\n" not in str(error.value)


class TestSave:
    def test_interrupted(self, model, tmp_path, monkeypatch):
        """A write that fails leaves nothing; one that was killed leaves what `load` tells from a
        checkpoint."""
        monkeypatch.setattr(
            "pvm_jax.checkpoint.store.write_checksums",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "saved", model)
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "saved", model)
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="never finished"):
            load(tmp_path / "saved")
        save(tmp_path / "saved", model)
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]

    def test_never_over_something(self, model, tmp_path):
        (tmp_path / "note").touch()
        with pytest.raises(FileExistsError, match="not empty"):
            save(tmp_path, model)


class TestBranch:
    def test_holds_the_branch_alone(self, branch, trained):
        values = sum(
            leaf.nbytes for path, leaf in parameters(trained).items() if path.startswith("pvm/")
        )
        assert sum(file.stat().st_size for file in branch.rglob("*") if file.is_file()) < 2 * values
        with pytest.raises(CheckpointError, match="a PVM branch alone"):
            load(branch)

    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_on_its_backbone(self, converted, branch, trained, dtype):
        loaded = load(converted, branch=branch, mesh=make_mesh(2, 2, 2), dtype=dtype)
        expected = {
            path: np.asarray(leaf, dtype and jnp.bfloat16)
            for path, leaf in parameters(trained).items()
        }
        assert_equal(parameters(loaded), expected)

    def test_on_another_backbone(self, branch, model):
        graphdef, params = nnx.split(model)
        other = nnx.map_state(
            lambda path, leaf: leaf.at[0].add(0.5) if path[-2] == "pos_embed" else leaf, params
        )
        with pytest.raises(CheckpointError, match="was trained on the backbone"):
            load_branch(branch, nnx.merge(graphdef, other))

    def test_of_a_whole_checkpoint(self, trained, converted, model, tmp_path):
        """Layers and width come with the branch; the backbone stays."""
        config = model.config.with_pvm((0, 2, 4), 16)
        save(tmp_path / "other", filled(config))
        loaded = load(converted, branch=tmp_path / "other")
        assert loaded.config == config
        assert backbone_identity(nnx.state(loaded)) == backbone_identity(nnx.state(model))
        assert all(
            (np.asarray(leaf) == 1).all()
            for path, leaf in parameters(loaded).items()
            if path.startswith("pvm/")
        )

    def test_of_a_plain_checkpoint(self, model, tmp_path):
        save(tmp_path / "plain", filled(model.config.without_pvm()))
        with pytest.raises(CheckpointError, match="no PVM branch"):
            load_branch(tmp_path / "plain", model)


class TestIdentity:
    def test_is_of_the_values(self, converted, model):
        """The same on any mesh."""
        name = backbone_identity(nnx.state(model))
        assert backbone_identity(nnx.to_pure_dict(nnx.state(model))) == name
        assert backbone_identity(nnx.state(load(converted, mesh=make_mesh(2, 2, 2)))) == name
        assert (
            backbone_identity(nnx.state(load(converted, mesh=make_mesh(1, 8, 1), dtype="bfloat16")))
            == name
        )

    def test_is_the_same_for_large_arrays(self, converted, model, monkeypatch):
        """Which a program sums where they lie, small ones NumPy."""
        whole = nnx.to_pure_dict(nnx.state(model))
        head = whole["lm_head"]
        found = backbone_identity(whole), exact_identity(head)
        spread = nnx.to_pure_dict(nnx.state(load(converted, mesh=make_mesh(2, 2, 2))))
        monkeypatch.setattr(identity, "SMALL", 0)
        assert (backbone_identity(spread), exact_identity(head)) == found

    @pytest.mark.parametrize(
        "change", [lambda leaf: leaf.at[..., 3].add(0.5), lambda leaf: leaf[::-1]]
    )
    def test_differs_for_other_values(self, model, change):
        params = nnx.to_pure_dict(nnx.state(model))
        name = backbone_identity(params)
        up = params["language_model"]["layers"]["mlp"]["up_proj"]
        up["weight"] = change(up["weight"])
        assert backbone_identity(params) != name
