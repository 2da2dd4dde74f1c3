"""Paths as users write them: ~ is the home directory, gs:// a bucket; another URL is refused before
anything starts."""

from pathlib import Path

import pytest

from convert import dataset, hf_to_orbax, orbax_to_hf
from pvm_jax import load
from pvm_jax.__main__ import GenerateOptions
from pvm_jax.checkpoint.directory import write_aside
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.processor import Processor
from pvm_jax.files.lock import sole_writer
from pvm_jax.files.paths import any_path, checkpoint_path, local_path, on_bucket
from pvm_jax.measure.report.command import Request
from train.config import Bucket, DataConfig, Source
from train.grpo.config import EvaluationConfig
from train.sft.config import HeldOutConfig, SFTConfig

URLS = ["ftp://bucket/ck", "hf://org/model", "https://host/x", "file:///tmp/x"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("written", [str, Path])
def test_a_url_is_named_as_it_was_written(url, written):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        any_path(written(url))
    shown = url.replace("file:///tmp", "file://tmp")
    assert str(error.value).startswith(f"{shown} is a URL: give a path of this machine")
    assert ("pvm convert OWNER/NAME" in str(error.value)) == url.startswith("hf:")


@pytest.mark.parametrize("written", [str, Path])
def test_a_path_of_a_bucket(written):
    path = any_path(written("gs://bucket/run/steps"))
    assert on_bucket(path)
    assert not on_bucket(any_path("run/steps"))
    assert str(path) == f"{path}" == "gs://bucket/run/steps"
    assert str(path.absolute()) == str(path)
    assert str(path.parent / "x.y") == "gs://bucket/run/x.y"
    assert (path.name, path.suffix, any_path(path)) == ("steps", "", path)
    config = SFTConfig("gs://bucket/ck", "gs://bucket/run", DataConfig("s3://b/d", [Bucket(8, 4)]))
    assert (config.checkpoint, config.run_dir) == ("gs://bucket/ck", "gs://bucket/run")
    assert [source.path for source in config.data.mixture] == ["s3://b/d"]
    options = GenerateOptions("gs://b/ck", input=Path("s3://b/q"), output=Path("gs://b/a"))
    assert (str(options.input), str(options.output)) == ("s3://b/q", "gs://b/a")


def test_what_a_bucket_cannot_take():
    for url in ("gs://", "s3:///", Path("gs://")):
        with pytest.raises(ValueError, match="names no bucket"):
            any_path(url)
    with pytest.raises(
        ValueError, match="gs://bucket/x is in a bucket: this must be a path of this"
    ):
        local_path("gs://bucket/x")
    with pytest.raises(
        ValueError, match="az://b/ck: checkpoints and runs are in gs://, s3:// and on"
    ):
        checkpoint_path("az://b/ck")
    with pytest.raises(ValueError, match="run_dir: az://b/run: checkpoints and runs"):
        SFTConfig("ck", "az://b/run", DATA)


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/runs/a") == tmp_path / "runs" / "a"
    assert local_path(Path("~")) == tmp_path
    assert local_path("./~x/a:b") == Path("./~x/a:b")
    with pytest.raises(ValueError, match="~nobody_at_all/x: there is no such user here"):
        local_path("~nobody_at_all/x")
    config = SFTConfig("~/ck", "~/run", DataConfig("~/d.jsonl", [Bucket(8, 4)]), branch="~/b")
    assert (config.checkpoint, config.run_dir, config.branch) == tuple(
        str(tmp_path / name) for name in ("ck", "run", "b")
    )
    assert [source.path for source in config.data.mixture] == [str(tmp_path / "d.jsonl")]


DATA = DataConfig("d.jsonl", [Bucket(8, 4)])
DOORS = {
    "load": load,
    "load a branch": lambda url: load("none", branch=url),
    "save": lambda url: write_aside(url).__enter__(),
    "processor": Processor.from_pretrained,
    "conversations": open_conversations,
    "writer": lambda url: sole_writer(url).__enter__(),
    "dataset": lambda url: dataset.convert("none", url),
    "hf_to_orbax": lambda url: hf_to_orbax.convert(url, "out"),
    "hf_to_orbax to": lambda url: hf_to_orbax.convert("none", url),
    "orbax_to_hf": lambda url: orbax_to_hf.convert(url, "out"),
    "checkpoint": lambda url: SFTConfig(url, "run", DATA),
    "run_dir": lambda url: SFTConfig("ck", url, DATA),
    "branch": lambda url: SFTConfig("ck", "run", DATA, branch=url),
    "source": lambda url: DataConfig(["a.jsonl", url], [Bucket(8, 4)]),
    "weighted source": lambda url: Source(url, 0.5),
    "held out": HeldOutConfig,
    "evaluation": EvaluationConfig,
    "generate to": lambda url: GenerateOptions("none", input=Path("q"), output=Path(url)),
    "generate with": lambda url: GenerateOptions("none", question="q", branch=url),
    "a picture": lambda url: GenerateOptions("none", question="q", image=[url]),
    "measure": lambda url: Request(Path("none"), Path(url), Path("report")),
    "measure to": lambda url: Request(Path("none"), Path("none"), Path(url)),
}


@pytest.mark.parametrize("door", DOORS)
def test_no_door_takes_a_url(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="https://bucket/x is a URL"):
        DOORS[door]("https://bucket/x")
    assert not list(tmp_path.iterdir())
