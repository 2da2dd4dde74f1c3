"""The examples, and the README's ten lines, on the demo's checkpoint, as small as they can be."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.hf_to_orbax import convert
from demo.task import Mixture, draw, make_example
from examples import fine_tune, generate, lora, measurement, reward
from tests.train import runs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "checkpoint"
    convert(ROOT / "demo" / "base", path, pvm_layers=(1,), pvm_hidden_size=32)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Of one layer and untrained: where steps are to be taken, and no one looks what comes of
    them."""
    root = tmp_path_factory.mktemp("tiny")
    runs.write_workplace(root, examples=0)
    return root / "base"


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"[-+]?\d+\.\d+(?:e-?\d+)?", text)]


def test_every_example_is_here_and_short():
    files = sorted((ROOT / "examples").glob("*.py"))
    assert [file.stem for file in files] == [
        module.__name__.rpartition(".")[2]
        for module in (fine_tune, generate, lora, measurement, reward)
    ]
    assert all(file.read_text().count("\n") <= 80 for file in files)


def test_the_readme_is_short_and_its_ten_lines_run(checkpoint, tmp_path, monkeypatch, capsys):
    """As they stand, with the shipped model for a checkpoint and a grid of digits for a photo."""
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "8b").symlink_to(checkpoint)
    draw(make_example(Mixture(sizes=(1,)), 0).scene).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(lines, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("cells", [5, pytest.param(7, marks=pytest.mark.slow)])
def test_the_tour_runs_top_to_bottom(cells, checkpoint, tmp_path, monkeypatch):
    """As Jupyter runs it, but for the sizes that its first cell sets, by default as far as the
    training; it holds no output."""
    book = json.loads((ROOT / "examples" / "tour.ipynb").read_text())["cells"]
    code = [cell for cell in book if cell["cell_type"] == "code"]
    assert len(code) == 7
    assert not any(cell["outputs"] for cell in code)
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = {}
    with runs.one_device():
        for cell in code[:cells]:
            exec("".join(cell["source"]), names)
            if cell is code[0]:
                sizes = {"STEPS": 2, "BATCH_SIZE": 2, "SCENES": 2}
                names |= {"CHECKPOINT": checkpoint, "OUT": tmp_path} | sizes
    assert names["right"] >= 0.75 * len(names["lines"]) >= 6
    assert names["mass"].shape == (len(names["found"].uniform[0]),)
    if cells == len(code):
        assert len(names["losses"]) == 2
        assert names["loss"]["before"] != names["loss"]["after"]


def test_generate(checkpoint, capsys):
    generate.main(checkpoint)
    said = capsys.readouterr().out
    right, of = map(int, re.findall(r"(\d+) of (\d+) lines are right", said)[0])
    assert right >= 0.75 * of >= 6
    assert said.count("log-probability") == 4


@pytest.mark.slow  # lora.py, by default, does the same with an adapter
def test_fine_tune(tiny, tmp_path, capsys):
    with runs.one_device():
        fine_tune.main(tiny, tmp_path, steps=2, batch_size=2)
    assert (tmp_path / "run" / "branch").is_dir()
    before, after = numbers(capsys.readouterr().out)[-2:]
    assert before != after


def test_lora(tiny, tmp_path, capsys):
    """Merged and converted back it is what it was beside the weights."""
    with runs.one_device():
        lora.main(tiny, tmp_path, steps=2, batch_size=2)
    changed, lost = numbers(capsys.readouterr().out)[-2:]
    assert changed > 100 * lost


def test_reward(tiny, tmp_path, capsys):
    with runs.one_device():
        reward.main(tiny, tmp_path, steps=1, prompts=2, completions=2)
    said = re.findall(r"step 0: reward ([-+]\d\.\d+)", capsys.readouterr().out)
    assert -4 <= float(said[-1]) <= 1


def test_a_reward_counts_right_lines_less_wrong_ones():
    example = {"solution": "A1 ink red\nA1 digit 5\n"}
    assert reward.net("A1 ink red\nA1 digit 5\n", example) == 1
    np.testing.assert_allclose(reward.net("A1 ink red\nA1 digit 4\n", example), 0)
    assert reward.net("", example) == 0


def test_measurement(checkpoint, capsys):
    """Values, and they alone, need the image."""
    measurement.main(checkpoint, scenes=4)
    found = numbers(capsys.readouterr().out)[::3]
    assert len(found) == 6
    assert found[2] < 0.1 < found[5]
