"""What a run says of rewards that teach nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken

from train.grpo.reward_watch import RewardWatch
from train.grpo.rollout import Completions
from train.rewards.pool import RewardTable


def processor(*tokens):
    added = {number: AddedToken(token, special=False) for number, token in enumerate(tokens)}
    return SimpleNamespace(tokenizer=SimpleNamespace(added_tokens_decoder=added))


def step(values, failures=None, truncated=0):
    """A table of two functions, whose `failures` are these, and its four completions."""
    values = np.array(values, np.float64)
    failures = dict(zip(("format", "accuracy"), failures or (0, 0), strict=True))
    errors = {name: "KeyError: 'x'" for name, count in failures.items() if count}
    table = RewardTable(("format", "accuracy"), values, values.sum(1), failures, errors)
    lengths, cut_off = np.full(4, 3, np.int32), np.arange(4) < truncated
    return table, Completions(np.zeros((4, 3), np.int32), np.zeros((4, 3)), lengths, cut_off)


SPREAD = [[0, 0], [0, 1], [0, 0], [0, 1]]


def test_a_reward_that_is_the_same_for_all_is_spoken_of_once():
    said = []
    watch = RewardWatch(processor("<think>", "</think>"), said.append)
    for _ in range(4):
        watch(*step(SPREAD))
    assert not said
    for _ in range(4):
        watch(*step(SPREAD))
    (line,) = said
    assert line.startswith("reward format was 0 for every one of the 20 completions of the first 5")
    assert "tags_as_text writes it in letters" in line
    assert "max_completion_tokens" not in line


def test_what_may_be_behind_it_depends_on_what_is_seen():
    said = []
    watch = RewardWatch(processor(), said.append)
    for _ in range(5):
        watch(*step(SPREAD, truncated=3))
    assert "max_completion_tokens cut 15 of them off" in said[0]
    assert "tags_as_text" not in said[0]
    watch = RewardWatch(processor(), said.append)
    for values in (SPREAD, SPREAD, [[1, 0]] * 4, SPREAD, SPREAD):
        watch(*step(values))
    watch(None, step(SPREAD)[1])
    assert len(said) == 1


def test_a_reward_that_fails_on_everything_ends_the_run():
    watch = RewardWatch(processor(), print)
    for failures in ((4, 0), (4, 3), (0, 4), (4, 4), (4, 3)):
        watch(*step(SPREAD, failures))
    told = "reward format failed on every completion of the last 3 steps: KeyError: 'x'. Mend"
    with pytest.raises(ValueError, match=told):
        watch(*step(SPREAD, (4, 0)))
