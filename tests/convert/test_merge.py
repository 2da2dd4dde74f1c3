"""What export puts into a backbone: a branch from elsewhere, an adapter's updates; and a checkpoint
without a branch."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from convert import hf_to_orbax, orbax_to_hf, store
from convert.merge import Update
from pvm_jax import LoRAConfig, ModelConfig, add_lora, load, save, save_branch, save_lora
from pvm_jax.checkpoint.directory import CheckpointError
from pvm_jax.checkpoint.identity import backbone_identity
from pvm_jax.data.batch import Batch
from pvm_jax.model.lora import is_adapter
from pvm_jax.model.parameters import by_path, part_of
from tests import tiny
from tests.close import assert_close
from tests.conftest import GOLDEN
from tests.convert.directories import read_tensors

LORA = LoRAConfig(rank=3, alpha=6, targets=".*")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two decoder layers, the last with an open branch, and one of the tower."""
    path = tmp_path_factory.mktemp("base") / "base"
    save(path, tiny.randomized(tiny.cut(ModelConfig.from_hf(tiny.GOLDEN), layers=2)))
    return path


def changed(model, filter, seed=0):
    """`model` with noise on the parameters that `filter` names."""
    graphdef, params = nnx.split(model)
    rng = np.random.default_rng(seed)

    def add(path, leaf):
        if not filter(path):
            return leaf
        noise = rng.normal(0, 0.05, leaf.shape)
        return leaf.replace(jax.device_put((np.asarray(leaf[...]) + noise).astype(leaf.dtype)))

    return nnx.merge(graphdef, nnx.map_state(add, params))


@pytest.fixture(scope="module")
def branch(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("branch") / "branch"
    save_branch(path, changed(load(base), lambda path: path[0] == "pvm"))
    return path


@pytest.fixture(scope="module")
def lora(base, branch, tmp_path_factory):
    """Trained beside `branch`."""
    path = tmp_path_factory.mktemp("lora") / "lora"
    save_lora(path, changed(add_lora(load(base, branch=branch), LORA), is_adapter))
    return path


def weights(model):
    return jax.device_get(by_path(nnx.state(model)))


def test_merged_export_is_the_adapted_model(base, branch, lora, tmp_path, monkeypatch):
    """Its weights are W + alpha / rank B A, layer for layer, in blocks of rows as at full size; the
    branch is the given one."""
    monkeypatch.setattr(store, "BLOCK_BYTES", 2**14)
    monkeypatch.setattr(store, "CHUNK_BYTES", 2**9)
    orbax_to_hf.convert(base, tmp_path / "hf", branch=branch, lora=lora)
    hf_to_orbax.convert(tmp_path / "hf", tmp_path / "merged")
    models = load(tmp_path / "merged"), load(base, branch=branch, lora=lora)
    merged, adapted = map(weights, models)
    assert merged.keys() == {path for path in adapted if part_of(path) != "lora"}
    for path, weight in merged.items():
        a, b = (adapted.get(f"{path.removesuffix('/weight')}/lora/{part}") for part in "ab")
        expected = adapted[path] if a is None else adapted[path] + LORA.scale * b @ a
        assert_close(weight, expected, 1e-5, what=path)
        assert (a is None) == np.array_equal(weight, adapted[path])
    arrays = load_file(GOLDEN / "shape_8b" / "forward_inputs.safetensors")
    merged, adapted = (model(Batch.from_hf(arrays, model.config)) for model in models)
    assert_close(merged, adapted, 3e-5)


def test_sums_are_rounded_once_to_the_stored_dtype():
    """Computed in float32; rows of a layer of a stack."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 6, 5)).astype(ml_dtypes.bfloat16)
    update = Update(
        *(rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 5), (2, 6, 3))), scale=0.5
    )
    merged = update.merged(weight[1, 2:4], 1, slice(2, 4))
    assert merged.dtype == weight.dtype
    exact = weight[1].astype(np.float64) + 0.5 * update.b[1].astype(np.float64) @ update.a[1]
    np.testing.assert_array_equal(merged, exact[2:4].astype(np.float32).astype(weight.dtype))


def test_stored_identity_is_that_of_the_loaded(golden_checkpoints, monkeypatch):
    base = golden_checkpoints["shape_8b"]
    expected = backbone_identity(nnx.state(load(base)))
    for size in (store.BLOCK_BYTES, 2**12):
        monkeypatch.setattr(store, "BLOCK_BYTES", size)
        arrays = {
            path: array
            for path, array in store.open_arrays(base).items()
            if part_of(path) == "backbone"
        }
        assert store.stored_identity(arrays) == expected


def test_without_a_branch_there_and_back(golden, tmp_path):
    """`--plain` leaves a branch out and adds none."""
    hf_to_orbax.convert(golden, tmp_path / "orbax", plain=True)
    assert not load(tmp_path / "orbax").config.text.pvm_layers
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    tensors = {
        name: tensor for name, tensor in read_tensors(golden).items() if ".pvm_block." not in name
    }
    back = read_tensors(tmp_path / "back")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in back)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    with pytest.raises(ValueError, match="--plain makes no branch"):
        hf_to_orbax.convert(golden, tmp_path / "both", (1,), plain=True)


def test_what_was_trained_on_something_else_is_refused(base, branch, lora, tmp_path):
    other = changed(load(base), lambda path: path[-2] == "pos_embed")
    save(tmp_path / "other", other)
    for given in ({"branch": branch}, {"lora": lora, "branch": tmp_path / "other"}):
        with pytest.raises(CheckpointError, match="was trained on the backbone"):
            orbax_to_hf.convert(tmp_path / "other", tmp_path / "hf", **given)
    with pytest.raises(CheckpointError, match="was trained on the branch"):
        orbax_to_hf.convert(base, tmp_path / "hf", lora=lora)
    with pytest.raises(CheckpointError, match="is no LoRA adapter"):
        orbax_to_hf.convert(base, tmp_path / "hf", lora=branch)
    with pytest.raises(CheckpointError, match="has no PVM branch"):
        orbax_to_hf.convert(base, tmp_path / "hf", branch=lora)
    with pytest.raises(ValueError, match="--plain leaves the branch out"):
        orbax_to_hf.convert(base, tmp_path / "hf", plain=True, branch=branch)
    assert not (tmp_path / "hf").exists()
