"""Trackers other than TensorBoard, with their real packages, offline: what one run shows there
after it was stopped and went on. Tests of a package that is not installed are skipped."""

import struct
from dataclasses import replace
from importlib import import_module

import jax
import numpy as np
import pytest

import train.sft.__main__ as sft
from train.config import Bucket, DataConfig, LogConfig
from train.run import trackers
from train.run.trackers import opened_trackers
from train.sft.config import SFTConfig

IMAGE = np.zeros((4, 6, 3), np.uint8)
VALUES = [(step, float(step)) for step in (0, 1, 2)]


@pytest.fixture
def config(tmp_path):
    data = DataConfig("data.jsonl", [Bucket(32, 8)])
    return SFTConfig("base", str(tmp_path / "runs" / "one"), data)


@pytest.fixture
def tracked(config, tmp_path, monkeypatch):
    """(tracker) -> logs a run that is stopped after two steps and goes on with the third."""
    for name, value in {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def tracked(name):
        package = pytest.importorskip(name)
        started = replace(config, log=LogConfig(to=[name], project="tests"))
        for steps in (VALUES[:2], VALUES[2:]):
            with opened_trackers(started, "0123abcd") as opened:
                for step, value in steps:
                    opened[0].scalars(step, {"train/loss": value, "gate/1": 0.5})
                opened[0].sample(step, "sample/0", "what **it** says", IMAGE)
                opened[0].sample(step, "rollout/sample", "no image", None)
                opened[0].flush()
        return package

    return tracked


def records(content):
    """The messages in a run's file of wandb: LevelDB's log behind seven bytes of its own."""
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_wandb_has_one_run(tracked, tmp_path):
    tracked("wandb").teardown()  # waits for the process that writes
    messages = import_module("wandb.proto.wandb_internal_pb2")
    folder = tmp_path / "runs" / "one" / "log" / "wandb"
    files = sorted(folder.glob("offline-run-*/run-0123abcd.wandb"))
    losses, shown = [], set()
    for record in (record for file in files for record in records(file.read_bytes())):
        row = {
            "/".join(item.nested_key): item.value_json
            for item in messages.Record.FromString(record).history.item
        }
        if "train/loss" in row:
            losses.append((int(row["step"]), float(row["train/loss"])))
        shown |= {name.removesuffix("/_type") for name in row if name.endswith("/_type")}
    assert len(files) == 2
    assert losses == VALUES
    assert shown == {"sample/0", "rollout/sample"}
    assert len(list(folder.rglob("*.png"))) == 2


def test_trackio_has_one_run(tracked, tmp_path):
    trackio = tracked("trackio")
    (run,) = trackio.Api().runs("tests")
    assert run.name == "one-0123abcd"
    storage = import_module("trackio.sqlite_storage").SQLiteStorage
    rows = storage.get_logs("tests", run.name)
    points = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert points == VALUES
    assert {name for row in rows for name in row} >= {"sample/0", "rollout/sample"}
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 2


def test_mlflow_has_one_run(tracked):
    mlflow = tracked("mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.run_name == "one"
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.learning_rate"] == "0.0001"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == VALUES
    shown = [file.path for file in client.list_artifacts(run.info.run_id, "sample/0")]
    assert shown == ["sample/0/00000001.md", "sample/0/00000002.md"]
    assert [f for f in client.list_artifacts(run.info.run_id, "images") if "png" in f.path]


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    config, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        sft.main(
            [
                *("--checkpoint=nowhere", "--data.sources=nothing.jsonl"),
                *("--data.buckets=[{tokens: 32, patches: 8}]", f"--run_dir={tmp_path / 'run'}"),
                *("--log.to", "tensorboard", "wandb", "--distributed.num_processes=1"),
            ]
        )
    told = capsys.readouterr().err
    assert told.startswith("error: log.to: wandb is not installed: pip install 'pvm-jax[wandb]'")
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


class Broken:
    """A tracker whose server is gone."""

    def __init__(self, *_):
        self.closed = None

    def scalars(self, step, values):
        raise ConnectionError("no route")

    def close(self, *, failed):
        self.closed = failed


def test_a_tracker_that_fails_later_is_told_once_and_ends_nothing(config, monkeypatch, capsys):
    broken = Broken()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda *_: broken)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    logged = replace(config, log=LogConfig(to=["wandb"]))

    def run():
        with opened_trackers(logged, "a") as opened:
            opened[0].scalars(0, {})
            opened[0].scalars(1, {})
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        run()
    assert capsys.readouterr().err.count("wandb takes no values (no route)") == 1
    assert broken.closed is True


def test_one_that_cannot_be_opened_ends_the_run_and_other_processes_open_none(config, monkeypatch):
    def refuse(*_):
        raise KeyError("no credentials")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", refuse)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    logged = replace(config, log=LogConfig(to=["wandb"]))
    with (
        pytest.raises(RuntimeError, match=r"log\.to: wandb cannot be opened"),
        opened_trackers(logged, "a"),
    ):
        pass
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with opened_trackers(logged, "a") as opened:
        assert opened == []
