"""An export and its card, pushed to a server on localhost."""

import base64
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from convert import hf_to_orbax, orbax_to_hf
from tests.hub_server import TOKEN, Hub, hub

__all__ = ["hub"]
ID = "someone/Small-PVM"


@pytest.fixture
def ready(hub, golden_checkpoints, tmp_path, monkeypatch) -> Hub:
    """Somebody who is logged in, with a checkpoint as a run leaves its own, and a report."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    served = tmp_path / "there"
    served.mkdir()
    (served / "model-00009.safetensors").write_bytes(b"of before")
    hub.repositories[f"models/{ID}"] = served
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "dataset.json").write_text('{"source": "hf://datasets/a/b@123"}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").symlink_to(golden_checkpoints["shape_4b"])
    notes = {
        "checkpoint": "/home/me/checkpoints/8b",
        "trainable": "pvm",
        "optimizer": {"learning_rate": 1e-4, "schedule": None},
        "data": {"sources": [{"path": "/home/me/secret/train.jsonl", "weight": 1.0}, "shards"]},
        "contents": ["abc"],
        "branch": str(tmp_path / "look" / "branch"),
        "lora": {"rank": 16},
    }
    (tmp_path / "look").mkdir()
    (tmp_path / "look" / "run.json").write_text(json.dumps({"epochs": 3, "branch": "/gone/b"}))
    (tmp_path / "run" / "run.json").write_text(json.dumps(notes))
    (tmp_path / "report").mkdir()
    section = {"facts": ["reads .84"], "table": [["words", "read"], ["0", "a|b"]], "figures": {}}
    section["title"] = "Values read"
    content = {"title": "t", "settings": {}, "sections": {"accuracy": section, "samples": {}}}
    content["origin"] = {"command": "pvm /home/me", "device": "1 cpu"}
    (tmp_path / "report" / "report.json").write_text(json.dumps(content))
    return hub


def sent(hub: Hub) -> tuple[dict[str, bytes], set[str]]:
    """The files of the commits, and those that they remove."""
    lines = [line for commit in hub.commits for line in commit]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    return files, {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}


def test_an_export_is_pushed_with_its_card(ready, tmp_path):
    told = ["--push-to-hub", ID, "--private", "--base_model", "Qwen/Base", "--report", "report"]
    orbax_to_hf.main(["run/checkpoint", "out", *told])
    files, removed = sent(ready)
    assert files.keys() == {file.name for file in (tmp_path / "out").iterdir()}
    assert all(files[name] == (tmp_path / "out" / name).read_bytes() for name in files)
    assert removed == {"model-00009.safetensors"}
    assert ready.made[ID]["visibility"] == "private"
    _, head, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "Qwen/Base"
    for line in (
        "# Small-PVM",
        "| trainable | pvm |",
        "| optimizer.learning_rate | 0.0001 |",
        "| data.sources | train.jsonl, hf://datasets/a/b@123 |",
        "It began with the branch of a run with these settings:",
        "| epochs | 3 |",
        "It began with a trained branch, of which no run's notes are left.",
        "| device | 1 cpu |",
        "### Values read",
        "- reads .84",
        "| 0 | a\\|b |",
    ):
        assert line in text.splitlines()
    assert "beside the FFN of the decoder layers" in text
    assert not re.search(r"/home|/gone|lora.rank|samples", text)
    for name, content in files.items():
        (tmp_path / "there" / name).write_bytes(content)
    (tmp_path / "there" / "model-00009.safetensors").unlink()
    ready.revision = "2" * 40
    hf_to_orbax.main([ID, "back"])


def test_a_plain_export_says_what_is_not_known(ready, tmp_path, golden_checkpoints):
    source = str(golden_checkpoints["shape_8b"])
    orbax_to_hf.main([source, "out", "--plain", "--push_to_hub", ID])
    text = sent(ready)[0]["README.md"].decode()
    assert "The base model is not recorded." in text
    assert "Not recorded: no run left its notes" in text
    assert "Not measured." in text
    assert "A Qwen3-VL, as transformers' own" in text


def test_each_refusal_is_one_line_before_anything_is_written(
    ready, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def said(*more: str, to: str = ID) -> str:
        line = refused(orbax_to_hf.main, ["run/checkpoint", "out", "--push_to_hub", to, *more])
        assert not (tmp_path / "out").exists()
        return line

    assert "report.json does not exist" in said("--report", "nowhere")
    assert not ready.made
    for wrong in (f"{ID}@main", "nothing"):
        assert f"--push_to_hub {wrong}: give OWNER/NAME" in said(to=wrong)
    assert "--base_model ~/models/base: give OWNER/NAME" in said("--base_model", "~/models/base")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "it is to be written, but as a model of" in said()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in said()
    alone = refused(orbax_to_hf.main, ["run/checkpoint", "out", "--private"])
    assert "are for --push_to_hub" in alone
    assert not ready.made


def test_what_does_not_arrive_is_still_here(ready, refused, tmp_path):
    ready.broken = True
    line = refused(orbax_to_hf.main, ["run/checkpoint", "out", "--push_to_hub", ID])
    assert "out is whole and can be sent again by `hf upload`; as a model of" in line
    assert "the server answers 500" in line
    assert (tmp_path / "out" / "README.md").exists()
