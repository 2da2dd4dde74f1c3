"""Whose a run directory is: what a second run, other data and a failed start find there."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pvm_jax.data.conversations import open_conversations
from train.config import Bucket, DataConfig
from train.data.contents import contents_of
from train.run.claim import SIZES, claimed
from train.sft.config import SFTConfig


@pytest.fixture
def data(tmp_path):
    """The path of twelve conversations about pictures beside them."""
    folder = tmp_path / "data"
    folder.mkdir()
    records = []
    for index in range(12):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(folder / f"{index}.bmp")
        asked = [{"type": "image", "image": f"{index}.bmp"}, {"type": "text", "text": "List"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "a" * 9}]
        records.append(json.dumps({"messages": messages}))
    (folder / "data.jsonl").write_text("\n".join(records) + "\n")
    return folder / "data.jsonl"


@pytest.fixture
def config(data, tmp_path):
    return SFTConfig("checkpoint", str(tmp_path / "run"), DataConfig(str(data), [Bucket(8, 4)]))


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


def claim(config, run_dir, *, step=None):
    """Claims `run_dir`, leaves the sizes of its examples there, and this step."""
    with claimed(config, run_dir, run_dir / "steps"):
        measured = not (run_dir / SIZES).exists()
        np.save(run_dir / SIZES, [1])
        (run_dir / "steps").mkdir(exist_ok=True)
        if step is not None:
            (run_dir / "steps" / str(step)).mkdir()
        return measured


def test_a_second_run_in_one_directory_is_refused(config, run_dir):
    with (
        claimed(config, run_dir, run_dir / "steps"),
        pytest.raises(OSError, match=f"{run_dir} is being written by another .*another --run_dir"),
    ):
        claim(replace(config, seed=1), run_dir)
    assert json.loads((run_dir / "run.json").read_text())["seed"] == config.seed
    claim(config, run_dir)


def test_a_run_without_a_step_owns_nothing(config, run_dir):
    assert claim(config, run_dir)
    assert not claim(config, run_dir)  # measured already
    assert claim(replace(config, seed=1), run_dir, step=2)
    assert not claim(replace(config, seed=1, log_every=7), run_dir)
    with pytest.raises(ValueError, match=r"holds a run with another seed \(see .*run.json"):
        claim(config, run_dir)


def reordered(data):
    first, *others = data.read_text().splitlines()
    data.write_text("\n".join([*others, first]) + "\n")


def edited(data):
    data.write_text(data.read_text().replace("aaaaaaaaa", "aaaabaaaa", 1))


def repaired(data):
    Image.new("RGB", (64, 32)).save(data.with_name("5.bmp"))


def recoloured(data):
    """A picture of as many bytes."""
    before = data.with_name("5.bmp").read_bytes()
    Image.new("RGB", (32, 32), (0, 5, 0)).save(data.with_name("5.bmp"))
    assert len(data.with_name("5.bmp").read_bytes()) == len(before)


@pytest.mark.parametrize("change", [reordered, edited, repaired, recoloured])
def test_data_that_have_changed_are_refused_or_measured_anew(change, config, run_dir, data):
    claim(config, run_dir)
    change(data)
    assert claim(config, run_dir, step=2)  # nothing had been read of the others
    reordered(data)
    told = rf"{data} no longer holds what the run in {run_dir} has read: .*data.measure_anew"
    with pytest.raises(ValueError, match=told):
        claim(config, run_dir)
    assert (run_dir / SIZES).exists()
    anew = replace(config, data=replace(config.data, measure_anew=True))
    assert claim(anew, run_dir)
    assert not claim(config, run_dir)
    assert claim(anew, run_dir)  # a change that only the reading noticed
    with pytest.raises(ValueError, match="another seed"):
        claim(replace(anew, seed=1), run_dir)


def test_a_note_that_is_damaged_is_named(config, run_dir):
    claim(config, run_dir, step=2)
    (run_dir / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged .*: remove it"):
        claim(config, run_dir)


def test_contents_do_not_depend_on_the_place_or_the_time(data, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in data.parent.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    one, other = (open_conversations(file) for file in (copy / "data.jsonl", data))
    assert contents_of(one, 1) == contents_of(other, 4)


def test_of_much_data_a_sample_is_read(tmp_path, monkeypatch):
    """Both ends are in it, and the size of all."""
    monkeypatch.setattr("train.data.contents.BLOCK_BYTES", 100)
    monkeypatch.setattr("train.data.contents.MOST_BLOCKS", 5)
    line = json.dumps({"messages": [{"role": "user", "content": "q"}]})
    file, found = tmp_path / "data.jsonl", set()
    for lines in ([line] * 90, [line.replace("q", "r"), *[line] * 89], [line] * 91):
        for ordered in (lines, lines[::-1]):
            file.write_text("\n".join(ordered) + "\n")
            found.add(contents_of(open_conversations(file), 2))
    assert len(found) == 4
