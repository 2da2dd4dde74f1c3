"""Models and adapters of the Hub, by their ids: a server on localhost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from convert import adapter, dataset, hf_to_orbax, orbax_to_hf
from demo.task import Mixture, make_example, write
from pvm_jax.checkpoint.store import find
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.processor import Processor
from pvm_jax.files.hub import named_on_hub
from tests.convert.directories import read_tensors
from tests.hub_server import TOKEN, Hub, hub, serving

__all__ = ["hub"]
ID = "someone/Small-VL.1"
BASE = Path(__file__).parents[2] / "demo" / "base"


@pytest.fixture
def small(hub, golden_checkpoints, tmp_path, monkeypatch) -> Hub:
    """The Hub with a model in several files, and files that nobody needs."""
    folder = tmp_path / "served"
    orbax_to_hf.convert(golden_checkpoints["shape_4b"], folder, max_shard_size="1MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    (folder / "README.md").write_text("none")
    (folder / "pytorch_model.bin").write_bytes(b"none")
    (folder / "consolidated.safetensors").write_bytes(b"none")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("none")
    hub.repositories[f"models/{ID}"] = folder
    monkeypatch.chdir(tmp_path)
    return hub


def test_a_model_is_converted_from_its_id_and_only_what_is_needed_is_read(small, tmp_path):
    weights = {file.name for file in (tmp_path / "served").glob("model-*.safetensors")}
    hf_to_orbax.main([ID, "there"])
    orbax_to_hf.convert("there", "back")
    a, b = read_tensors(tmp_path / "served"), read_tensors(tmp_path / "back")
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    settings = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert small.files_given() == weights | settings
    small.asked.clear()
    hf_to_orbax.main([f"hf://{ID}@main", "again"])
    assert small.files_given() == set()


def test_what_was_cut_off_goes_on_where_it_was(small, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    name = next((tmp_path / "served").glob("model-00002-*")).name
    small.cut.add(name)
    hf_to_orbax.main([ID, "there"])
    half = (tmp_path / "served" / name).stat().st_size // 2 // 1000 * 1000
    assert [given for _, given in small.asked if given] == [f"bytes={half}-"]


def test_what_is_refused_is_refused_before_weights_travel(small, refused, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert "is not empty" in refused(hf_to_orbax.main, [ID, "taken"])
    assert not small.asked
    config = tmp_path / "served" / "config.json"
    right = config.read_text()
    config.write_text(right.replace('"qwen3_vl"', '"qwen9_vl"'))
    assert "model_type must be" in refused(hf_to_orbax.main, [ID, "there"])
    config.write_text(right)
    small.revision = "2" * 40
    assert "File exists" in refused(hf_to_orbax.main, [ID, "taken/file/there"])
    assert not any(name.endswith(".safetensors") for name in small.files_given())


def test_a_directory_wins(small, refused, tmp_path):
    (tmp_path / ID).mkdir(parents=True)
    for given in (ID, f"./{ID}", str(tmp_path / ID), f"~/{ID}", "someone", "a/b/c", "a/b.json"):
        assert refused(hf_to_orbax.main, [given, "there"]).endswith(" does not exist")
    assert named_on_hub(Path("someone/else")) is None
    assert not small.asked


def test_who_names_the_hub_where_it_is_not_asked_hears_of_converting():
    with pytest.raises(FileNotFoundError, match=rf"; the Hub's .*: pvm convert {ID} DST$"):
        find(ID)
    with pytest.raises(FileNotFoundError, match=rf"such directory; the Hub's .* convert {ID} DST$"):
        Processor.from_pretrained(ID)
    with pytest.raises(FileNotFoundError, match=r"; the Hub's .*: pvm dataset someone/talks DST$"):
        open_conversations("someone/talks")
    with pytest.raises(FileNotFoundError, match=r"directory of conversations$"):
        open_conversations("tests/nothing")


def test_each_refusal_is_one_line(small, refused, tmp_path, monkeypatch):
    def said(given: str = ID) -> str:
        line = refused(hf_to_orbax.main, [given, "there"])
        assert not (tmp_path / "there").exists()
        return line

    place = f"nothing of this name is here, and as a model of {small.address} it"
    nowhere = said("someone/missing")
    assert nowhere.startswith(f"error: someone/missing: {place} does not exist, or not for every")
    assert said(f"{ID}@v9").startswith(f"error: {ID}@v9: {place} has no revision 'v9'")
    assert said("hf://datasets/a/b").startswith("error: hf://datasets/a/b is no model")
    small.gated.add(f"models/{ID}")
    assert f"is gated: accept its terms at {small.address}/{ID}, and log in" in said()
    small.gated.clear()
    small.private.add(f"models/{ID}")
    assert "does not exist, or not for everyone: if it is private, log in" in said()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "is closed to this token" in said()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and" in said()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "as a model of http://127.0.0.1:9 it cannot be reached (ConnectError: " in said()


def test_offline_reads_what_was_read_before(small, monkeypatch):
    small.private.add(f"models/{ID}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hf_to_orbax.main([ID, "there"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    small.asked.clear()
    hf_to_orbax.main([ID, "again"])
    assert not small.asked


def test_a_cache_that_lacks_a_file_says_so_offline(small, refused, tmp_path, monkeypatch):
    hf_to_orbax.main([ID, "there"])
    next(tmp_path.glob("hub_cache/models--*/snapshots/*/model-00002*")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and" in refused(hf_to_orbax.main, [ID, "again"])


def test_an_adapter_is_converted_from_its_id(small, golden_checkpoints, refused, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (folder / "adapter_model.safetensors").write_bytes(b"none")
    small.repositories["models/someone/lora"] = folder
    given = ["someone/lora", "there", "--checkpoint", str(golden_checkpoints["shape_4b"])]
    assert "adapter_config.json: peft_type must be 'LORA'" in refused(adapter.main, given)
    assert small.files_given() == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_tokenizer_of_a_model_measures_data(small, tmp_path):
    small.repositories["models/demo/base"] = BASE
    write([make_example(Mixture(sizes=(1,), lines=(1, 1)), i) for i in range(3)], tmp_path / "data")
    dataset.main(["data/data.jsonl", "shards", "--checkpoint", "demo/base"])
    dataset.main(["data/data.jsonl", "here", "--checkpoint", str(BASE)])
    assert (tmp_path / "shards" / "dataset.json").read_text() == (
        tmp_path / "here" / "dataset.json"
    ).read_text()
    assert "model.safetensors" not in small.files_given()


def test_the_variables_of_the_library_are_all_it_takes(tmp_path):
    """A process of its own: HF_ENDPOINT, HF_HOME, HF_TOKEN."""
    with serving() as hub:
        hub.repositories["models/demo/base"] = BASE
        hub.private.add("models/demo/base")
        told = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        told |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(BASE.parents[1])}
        words = [sys.executable, "-m", "convert.hf_to_orbax", "demo/base", "there", "--plain"]
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=os.environ | told,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there" / "params").is_dir()
    assert "model.safetensors" in hub.files_given()
