"""Hugging Face directories made from the reference checkpoints."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import pytest

from tests.convert.directories import read_tensors, write_checkpoint


@pytest.fixture
def variant(golden, tmp_path) -> Callable[..., Path]:
    """Makes a copy of the reference checkpoint with its tensors and config.json changed in place by
    `change`."""

    def make(change: Callable[[dict, dict], None], name: str = "variant") -> Path:
        tensors, config = read_tensors(golden), json.loads((golden / "config.json").read_text())
        change(tensors, config)
        return write_checkpoint(tmp_path / name, tensors, config)

    return make


@pytest.fixture
def plain(variant) -> Path:
    """A Qwen3-VL without the branch, as transformers 5 writes its config, in bfloat16."""

    def change(tensors: dict, config: dict) -> None:
        for name in list(tensors):
            if ".pvm_block." in name:
                del tensors[name]
            else:
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
        text = config["text_config"]
        del text["pvm_layers"], text["pvm_hidden_size"]
        text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
        text["dtype"] = config["dtype"] = "bfloat16"
        config["architectures"] = ["Qwen3VLForConditionalGeneration"]
        config["vision_config"]["model_type"] = "qwen3_vl_vision"
        config["mine"] = {"kept": True}

    return variant(change, "plain")


@pytest.fixture
def corrupt(golden, tmp_path) -> Path:
    """The reference checkpoint with its last file cut off."""
    copied = Path(shutil.copytree(golden, tmp_path / "corrupt"))
    last = sorted(copied.glob("model*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    return copied


@pytest.fixture(scope="module")
def run_by_transformers(tmp_path_factory) -> Iterator[None]:
    """transformers copies code that it runs to a place of the tests'; PyTorch takes one thread,
    beside other tests."""
    torch = pytest.importorskip("torch")
    from transformers import dynamic_module_utils

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        yield
    torch.set_num_threads(threads)
