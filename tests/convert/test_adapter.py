"""LoRA adapters to the peft library's form and back."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert import orbax_to_hf
from convert.adapter import from_peft, main, to_peft
from pvm_jax import Batch, LoRAConfig, add_lora, load, save_lora
from pvm_jax.checkpoint.directory import CheckpointError
from pvm_jax.model.lora import is_adapter
from pvm_jax.model.parameters import by_path
from tests.close import assert_close
from tests.conftest import GOLDEN
from tests.convert.in_torch import read, tensors

BAR = 3e-5
EVERYTHING, ATTENTION = ".*", "language_model/layers/self_attn/.*_proj"
SHAPE = "shape_8b"


@pytest.fixture(scope="module")
def base(golden_checkpoints) -> Path:
    return golden_checkpoints[SHAPE]


@pytest.fixture(scope="module", params=[EVERYTHING, ATTENTION])
def trained(request, base, tmp_path_factory) -> Path:
    """An adapter that changes what the model computes."""
    path = tmp_path_factory.mktemp("lora") / "lora"
    model = add_lora(load(base), LoRAConfig(rank=3, alpha=7.5, targets=request.param))
    graphdef, adapter, rest = nnx.split(model, is_adapter, ...)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + rng.normal(0, 0.05, x.shape).astype(x.dtype)),
        adapter,
    )
    save_lora(path, nnx.merge(graphdef, noisy, rest))
    return path


@pytest.fixture
def peft_form(trained, tmp_path) -> Path:
    to_peft(trained, tmp_path / "peft", base_model="base")
    return tmp_path / "peft"


def adapter_of(model: Any) -> dict[str, np.ndarray]:
    return jax.device_get(by_path(nnx.state(model, is_adapter)))


def test_there_and_back(base, trained, peft_form, tmp_path):
    main([str(peft_form), str(tmp_path / "back"), "--checkpoint", str(base)])
    want, got = (load(base, lora=path) for path in (trained, tmp_path / "back"))
    assert (got.config.lora.rank, got.config.lora.alpha) == (3, 7.5)
    want, got = adapter_of(want), adapter_of(got)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        np.testing.assert_array_equal(got[path], leaf)


def test_names_are_those_of_peft(trained, peft_form, base):
    """And the modules that are named are those that have tensors, no branch's and no other's."""
    settings = json.loads((peft_form / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 7.5)
    assert settings["base_model_name_or_path"] == "base"
    names = load_file(peft_form / "adapter_model.safetensors").keys()
    assert "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.weight" in names
    modules = {
        re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name)[1] for name in names
    }
    weights = GOLDEN / SHAPE / "model.safetensors.index.json"
    every = json.loads(weights.read_text())["weight_map"]
    every = {name.removesuffix(".weight") for name in every if name.endswith(".weight")}
    targets = settings["target_modules"]
    assert {name for name in every if re.fullmatch(targets, name)} == modules


@pytest.mark.parametrize("trained", [ATTENTION], indirect=True)
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("peft_type", "LOHA", "peft_type must be 'LORA', got 'LOHA'"),
        ("bias", "all", "bias must be 'none', got 'all'"),
        ("use_dora", True, "use_dora = true is not supported"),
        ("rank_pattern", {"q_proj": 8}, r'rank_pattern = {"q_proj": 8} is not supported'),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa' changes the base model"),
        ("r", 0, "r must be a whole number of at least 1"),
    ],
)
def test_what_is_more_than_lora_is_refused(base, peft_form, tmp_path, key, value, said):
    file = peft_form / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=re.escape(said)):
        from_peft(peft_form, tmp_path / "dst", base)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("trained", [ATTENTION], indirect=True)
def test_tensors_that_do_not_fit_are_named(base, peft_form, tmp_path):
    file = peft_form / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.language_model.layers.{}.self_attn.q_proj.lora_A.weight"
    del tensors[name.format(0)]
    tensors[name.format(1)] = tensors[name.format(1)][:2]
    tensors[name.format(90)] = tensors[name.format(2)]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="3 problems") as refused:
        from_peft(peft_form, tmp_path / "dst", base)
    for problem, layer in (("missing", 0), ("wrong shape", 1), ("unexpected", 90)):
        assert f"{problem}: {name.format(layer)}" in str(refused.value)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        from_peft(peft_form, tmp_path / "dst", base)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        from_peft(peft_form, tmp_path / "dst", base)


@pytest.mark.parametrize("trained", [ATTENTION], indirect=True)
def test_each_way_has_its_flag(base, trained, peft_form, tmp_path, refused):
    dst = str(tmp_path / "dst")
    assert "--checkpoint" in refused(main, [str(peft_form), dst])
    assert "leave --checkpoint out" in refused(main, [str(trained), dst, "--checkpoint", str(base)])
    assert "is no LoRA adapter" in refused(main, [str(base), dst])


@pytest.mark.usefixtures("run_by_transformers")
def test_in_peft(base, trained, peft_form, tmp_path):
    """What peft computes with it, beside the branch that it was trained with; and what peft saves
    is read back."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    orbax_to_hf.convert(base, tmp_path / "hf")
    arrays = load_file(GOLDEN / SHAPE / "forward_inputs.safetensors")
    adapted = peft.PeftModel.from_pretrained(read(tmp_path / "hf"), peft_form)
    with torch.no_grad():
        got = adapted(**tensors(arrays, adapted.config)).logits.numpy()
    adapted.save_pretrained(tmp_path / "saved")
    from_peft(tmp_path / "saved", tmp_path / "back", base)
    valid = arrays["attention_mask"].astype(bool)
    plain = np.asarray(load(base)(Batch.from_hf(arrays, load(base).config)))
    for lora in (trained, tmp_path / "back"):
        model = load(base, lora=lora)
        want = np.asarray(model(Batch.from_hf(arrays, model.config)))
        assert np.abs(want - plain).max() > 0.1
        assert_close(got[valid], want[:, : valid.shape[1]][valid], BAR)
