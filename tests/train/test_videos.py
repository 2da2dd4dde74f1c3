"""Videos among the training data: every batch of a bucket has one form, which is known before any
data are read."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from convert.dataset import convert
from demo.checkpoint import write_assets
from pvm_jax.__main__ import main
from pvm_jax.config import ModelConfig
from pvm_jax.data.processor import Processor
from pvm_jax.sharding import batch_sharding, make_mesh
from tests.train import runs
from train.config import Bucket, DataConfig, ExamplesConfig
from train.data.loading import TrainingData, load_training_data
from train.grpo.prompts import load_prompts
from train.run.events import read_values
from train.sft import __main__ as sft
from train.step.program import abstract_batch

BUCKET = Bucket(96, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model_config(folder) -> ModelConfig:
    return write_assets(folder)


@pytest.fixture(scope="module")
def processor(folder, model_config) -> Processor:
    return Processor.from_pretrained(folder)


@pytest.fixture
def write(tmp_path) -> Callable[[int], str]:
    """(videos) -> path of four conversations about an image, and these about a video."""

    def picture(name: str) -> str:
        pixels = np.random.default_rng(len(name)).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return name

    def turns(part: dict) -> str:
        asked = {"role": "user", "content": [part, {"type": "text", "text": "List ink"}]}
        answer = {"role": "assistant", "content": "A1 ink red\n"}
        return json.dumps({"messages": [asked, answer]})

    def write(videos: int) -> str:
        image = {"type": "image", "image": picture("one.png")}
        film = {"type": "video", "video": [picture("a.png"), picture("bcd.png")], "fps": 1}
        lines = [turns(image)] * 4 + [turns(film)] * videos
        (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "data.jsonl")

    return write


@pytest.fixture
def load(processor, model_config) -> Callable[..., TrainingData]:
    """(path, videos=…) -> what a run reads of it."""

    def load(path: str | Path, **options: bool) -> TrainingData:
        data = DataConfig(str(path), [BUCKET], packing=False, **options)
        return load_training_data(data, processor, model_config, batch_size=2)

    return load


def form(batch) -> list[tuple[tuple[int, ...], str]]:
    return [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch)]


@pytest.mark.parametrize("videos", [0, 4])
def test_every_batch_has_the_form_that_is_compiled_ahead(load, write, model_config, videos):
    batches = list(load(write(videos), videos=bool(videos)).batches)
    sharding = batch_sharding(make_mesh(devices=jax.devices()[:1]))
    ahead = abstract_batch(model_config, BUCKET, 2, sharding, videos=bool(videos))
    assert len(batches) == 2 + videos // 2
    moving = 0
    for batch in batches:
        assert form(batch) == form(ahead)
        assert batch.patches.dtype == np.uint8
        frames = batch.patches.reshape(2, BUCKET.patches, 3, -1, 256)
        assert frames.shape[3] == (2 if videos else 1)
        apart = [(row[..., 0, :] != row[..., -1, :]).any() for row in frames]
        shown = [(row > 0).any() for row in frames]
        assert all(shown)
        moving += sum(apart)
    assert moving == videos


def test_a_video_without_its_room_is_refused_at_the_start(load, write, processor):
    path = write(1)
    told = r"data.jsonl:5: shows a video: set data.videos to true"
    with pytest.raises(ValueError, match=told):
        load(path)
    with pytest.raises(ValueError, match=told):
        load_prompts(ExamplesConfig(path, [BUCKET]), processor, batch_size=1)


def test_shards_say_whether_they_hold_videos(load, write, processor, tmp_path):
    """Those that were written before they did are refused when a video is read."""
    shards = tmp_path / "shards"
    convert(write(4), shards, processor)
    with pytest.raises(ValueError, match=r"shards: shows a video: set data.videos to true"):
        load(shards)
    assert len(load(shards, videos=True).batches) == 4
    index = json.loads((shards / "dataset.json").read_text())
    assert index.pop("videos") is True
    (shards / "dataset.json").write_text(json.dumps(index))
    older = load(shards)
    with pytest.raises(ValueError, match=r"array_record:\d: shows a video: set data.videos to"):
        list(older.batches)
    convert(write(0), tmp_path / "images", processor)
    assert len(load(tmp_path / "images").batches) == 2


def test_a_run_on_an_mp4_to_its_end(tmp_path, capsys):
    """And the branch that it wrote answers about the same file."""
    pytest.importorskip("av")
    from tests.pvm_jax.test_video_files import write_film

    runs.write_workplace(tmp_path, examples=0)
    film = write_film(tmp_path / "film.mp4", "mpeg4", frames=8)
    asked = [{"type": "video", "video": film.name}, {"type": "text", "text": "List ink"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "A1 ink red\n"}]
    line = json.dumps({"messages": turns}) + "\n"
    (tmp_path / "data.jsonl").write_text(line * 4)
    options = ["--data.videos=true", "--data.buckets=[{tokens: 96, patches: 64}]", "--batch_size=2"]
    with runs.one_device(), runs.raising():
        alone = "--distributed.num_processes=1"
        sft.main(runs.arguments(tmp_path, "run", "--max_steps=2", "--log_every=1", alone, *options))
    losses = read_values(tmp_path / "run" / "log")["train/loss"]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    capsys.readouterr()
    model = [f"--checkpoint={tmp_path / 'base'}", f"--branch={tmp_path / 'run' / 'branch'}"]
    main(["generate", *model, f"--video={film}", "List ink", "--max_new_tokens=1"])
    assert capsys.readouterr().out.strip()
