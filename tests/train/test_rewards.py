"""Rewards from functions that hang, raise and die."""

import time
from pathlib import Path

import numpy as np
import pytest

from train.rewards.pool import RewardConfig, Rewards

USER = "tests.train.graders_of_a_user:"


def test_built_in_rewards_are_weighted_and_an_explosion_scores_0():
    completions = [
        "<think>a</think><answer>4</answer>",
        "<answer>4</answer>",
        "<think>a</think><answer>10^{10^{10}}</answer>",
    ]
    configs = [RewardConfig("format", 0.1), RewardConfig("accuracy", 0.9)]
    with Rewards(configs, time_limit=3, workers=1) as rewards:
        table = rewards(completions, [{"solution": "4"}] * 3)
        again = rewards(completions[:1] * 5, [{"solution": "4"}] * 4 + [{"solution": "5"}])
    assert table.names == ("format", "accuracy")
    np.testing.assert_array_equal(table.values, [[1, 1], [0, 1], [1, 0]])
    np.testing.assert_allclose(table.totals, [1, 0.9, 0.1])
    assert table.failures == {"format": 0, "accuracy": 1}
    assert table.errors == {"accuracy": "took more than 3 s"}
    np.testing.assert_allclose(again.totals, [1, 1, 1, 1, 0.1])


def test_a_grader_that_fails_scores_0_and_is_counted(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    names = [
        USER + name
        for name in (
            "length",
            "sleeps",
            "raises",
            "dies",
            "is_nan",
            "is_none",
            "imports_jax",
            "is_huge",
        )
    ]
    with Rewards([RewardConfig(name) for name in names], time_limit=2, workers=2) as rewards:
        table = rewards(["sleep", "die", "four"], [{"bonus": 0}, {"bonus": 1}, {"bonus": 0.5}])
    expected = [[5, 0, 0, 1, 0, 0, 0, 0], [4, 1, 0, 0, 0, 0, 0, 0], [4.5, 1, 0, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(table.values, expected)
    assert list(table.failures.values()) == [0, 1, 3, 1, 3, 3, 0, 3]
    errors = {name.removeprefix(USER): error for name, error in table.errors.items()}
    assert errors.keys() == {"sleeps", "raises", "dies", "is_nan", "is_none", "is_huge"}
    assert errors["sleeps"] == "took more than 2 s"
    assert errors["raises"] == "KeyError: 'no such key'"
    assert errors["dies"] == "its process ended"
    assert errors["is_nan"] == "ValueError: the reward is nan"
    assert errors["is_none"].startswith("TypeError")


def test_a_grader_that_takes_too_much_memory_scores_0():
    with Rewards([RewardConfig(USER + "is_greedy")], memory=1, workers=1) as rewards:
        table = rewards(["", "ab", ""], [{}] * 3)
    np.testing.assert_array_equal(table.totals, [0, 0, 0])
    assert table.failures == {USER + "is_greedy": 1}
    assert table.errors == {USER + "is_greedy": "took more than 1 GiB of memory"}


def test_what_hangs_is_killed_with_what_it_started(tmp_path):
    with Rewards([RewardConfig(USER + "sleeps_with_a_child")], time_limit=1, workers=1) as rewards:
        assert rewards([""], [{"children": str(tmp_path / "pids")}]).totals == 0
        for pid in map(int, (tmp_path / "pids").read_text().split()):
            assert not _runs(pid)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_misspelt_function_is_refused_before_anything_is_started():
    with pytest.raises(ValueError, match="'acuracy' is neither"):
        RewardConfig("acuracy")


def test_a_function_that_is_not_there_ends_the_run_at_its_start():
    start = time.monotonic()
    with (
        pytest.raises(ValueError, match="'no_module:reward' cannot be imported"),
        Rewards([RewardConfig("no_module:reward")], workers=1),
    ):
        pass
    assert time.monotonic() - start < 60


def test_settings_and_examples_that_cannot_be_are_refused():
    accuracy = [RewardConfig("accuracy")]
    for configs, settings in (
        ([], {}),
        (accuracy * 2, {}),
        (accuracy, {"time_limit": 0}),
        (accuracy, {"workers": 0}),
        (accuracy, {"memory": 0}),
    ):
        with pytest.raises(ValueError, match="rewards: needs"):
            Rewards(configs, **settings)
    rewards = Rewards(accuracy)
    with pytest.raises(RuntimeError, match="inside its context"):
        rewards([""], [{"solution": "4"}])
    with pytest.raises(ValueError, match="2 completions with 1 examples"):
        rewards(["", ""], [{}])
    with pytest.raises(ValueError, match="needs 'solution' in every example"):
        rewards([""], [{"solution": " "}])


def test_a_train_of_the_user_stays_out_of_the_graders_way(tmp_path, monkeypatch):
    """Modules of theirs beside it are found."""
    (tmp_path / "train.py").write_text("raise SystemExit('not the train that was asked for')")
    (tmp_path / "grades_of_mine.py").write_text("def length(text, example):\n    return len(text)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with Rewards([RewardConfig("grades_of_mine:length")], time_limit=5, workers=1) as rewards:
        assert rewards(["four"], [{}]).totals[0] == 4
