"""Whole runs of `train.grpo` on a tiny checkpoint: rollouts, updates, interruption and continuation, several processes."""

import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

from pvm_jax.checkpoint import load
from pvm_jax.vision import VisionTower
from tests.train import runs
from train import grpo, grpo_loop
from train.events import read_values
from train.log import RunLog
from train.rollout import Sampler

REWARD = "tests.train.reward_functions:letters"


def arguments(root, run_dir, *more):
    """Of train.grpo, for a run of the workplace `root` in float32: 8 prompts with 2 completions each, two steps an epoch."""
    return [
        *(f"--checkpoint={root / 'base'}", f"--run_dir={root / run_dir}", f"--data.sources={root / 'data.jsonl'}"),
        *("--data.buckets=[{tokens: 24, patches: 8}]", "--prompts_per_step=8", "--group_size=2", "--max_completion_tokens=16"),
        *(f"--rewards=[{{function: '{REWARD}'}}]", "--reward_workers=1", "--mask_truncated=false"),
        *("--trainable=pvm", "--dtype=float32", "--remat=none", "--optimizer.learning_rate=1e-2", "--temperature=0.8"),
        *("--checkpoint_every=2", "--epochs=2"),
        *more,
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with base/ (a tiny checkpoint) and data.jsonl; programs are compiled once for all its runs."""
    root = tmp_path_factory.mktemp("grpo")
    runs.write_workplace(root, examples=16)
    settings = {"jax_compilation_cache_dir": str(root / "compiled"), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield root
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def grpo_run(workplace):
    """(run_dir, *arguments, stop_at) -> ({step: metrics}, [completions of each step]) of the steps that the command did."""

    def run(run_dir, *more, stop_at=None):
        metrics, rollouts, add, sample = {}, [], RunLog.add, Sampler.__call__

        def record(log, step, values, **options):
            metrics[step] = dict(values)
            add(log, step, values, **options)
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        def keep(sampler, *args, **options):
            rollouts.append(sample(sampler, *args, **options))
            return rollouts[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunLog, "add", record)
            patch.setattr(Sampler, "__call__", keep)
            grpo.main(arguments(workplace, run_dir, "--distributed.num_processes=1", *more))
        return metrics, rollouts

    return run


@pytest.fixture(scope="module")
def whole(grpo_run):
    """A run of four steps with two updates each."""
    encoded, encode = [], VisionTower.__call__

    def count(self, patches, *rest):
        encoded.append(patches.shape[0])
        return encode(self, patches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTower, "__call__", count)
        metrics, rollouts = grpo_run("whole", "--num_iterations=2", "--beta=0.1")
    return metrics, rollouts, encoded


def test_trainer_and_sampler_agree_on_what_was_drawn(whole):
    metrics, rollouts, _ = whole
    assert sorted(metrics) == [0, 1, 2, 3]
    for values in metrics.values():
        assert 0 < values["policy/largest_gap"] < 1e-4
        assert values["policy/gap"] <= values["policy/largest_gap"]
        assert values["loss_tokens"] == 2 * sum(rollouts[0].lengths) or values["loss_tokens"] > 0
