"""GRPO on the demo's task: its reward, its commands and its report."""

import json
from pathlib import Path

import numpy as np
import pytest

from demo.exactness import exactness
from demo.grpo import grpo_steps, write_report

SOLUTION = {"solution": "A1 ground navy\nA1 mark top\nB1 ink red\nB1 digit 7\n"}


@pytest.mark.parametrize(
    ("completion", "worth"),
    [
        ("B1 digit 7\nA1 ground navy\nB1 ink red\nA1 mark top\n", 1),
        ("A1 ground navy\nA1 mark left\n", 1 / 4),
        ("A1 ground navy\n" * 4, 1 / 4),
        ("A1 ground navy\nA1 ground maroon\nA1 mark top\nB1 ink red\nB1 digit 7\n", 4 / 5),
        ("A1 ground navy\nB1 ink red", 2 / 4),
        ("", 0),
        ("a1 ground navy\nA1  mark top\nB1 ink", 0),
    ],
)
def test_right_lines_count_once_and_neither_silence_nor_guessing_pays(completion, worth):
    assert exactness(completion, SOLUTION) == pytest.approx(worth)


def test_seeds_share_their_data_and_held_out_digits_are_others(tmp_path):
    steps = dict(grpo_steps(Path("out"), tmp_path, (0, 1)))
    data, held_out, *trainings = ([str(a) for a in command] for command in steps.values())
    assert "heldout" in held_out
    assert "heldout" not in data
    assert {a.split("=")[0] for a in set(trainings[0]) ^ set(trainings[1])} == {
        "--run_dir",
        "--seed",
    }


def test_report_gives_each_seed_and_the_spread(tmp_path):
    write_report((0, 5), np.array([[0.5, 0.75], [0.5, 1.0]]), (3, 4), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| step | seed 3 | seed 4 | mean | least to most |" in text
    assert "| 5 | 0.750 | 1.000 | 0.875 | 0.750 to 1.000 |" in text
    assert json.loads((tmp_path / "results.json").read_text())["rewards"] == [
        [0.5, 0.75],
        [0.5, 1.0],
    ]
    assert (tmp_path / "results.png").stat().st_size > 5_000
