"""Whole runs of `train.grpo` on a tiny checkpoint: rollouts, updates, interruption and
continuation, several processes."""

import json
import os
import shutil
import signal
from contextlib import nullcontext

import chex
import numpy as np
import pytest
from flax import nnx

from pvm_jax.checkpoint.store import load
from pvm_jax.data.json_files import JsonFile
from pvm_jax.data.side_files import read_stop_tokens
from pvm_jax.model.vision import VisionTower
from tests.close import assert_close
from tests.train import runs
from train.grpo import __main__ as grpo
from train.grpo.loop import TRAINING_STREAM
from train.grpo.reward_watch import RewardWatch
from train.grpo.rollout import Sampler
from train.run.events import read_values
from train.run.log import RunLog

PROMPTS, GROUP, STEPS = 8, 2, 4


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with base/ (a tiny checkpoint) and data.jsonl; programs are compiled once for all
    its runs."""
    root = tmp_path_factory.mktemp("grpo")
    runs.write_workplace(root, examples=PROMPTS * STEPS // 2)
    with runs.programs_kept(root):
        yield root


@pytest.fixture(scope="module")
def grpo_run(workplace):
    """(run_dir, *arguments, stop_at, spread) -> ({step: metrics}, [completions of each rollout]) of
    what the command did, on all devices if `spread`, else on one."""

    def run(run_dir, *more, stop_at=None, spread=False):
        metrics, rollouts, add, sample = {}, [], RunLog.add, Sampler.__call__
        watched, watch = [], RewardWatch.__call__

        def record(log, step, values, **options):
            metrics[step] = {
                name: value for name, value in values.items() if "per_second" not in name
            }
            add(log, step, values, **options)
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        def keep(sampler, *args, **options):
            completions = sample(sampler, *args, **options)
            if options["draw"][1] == TRAINING_STREAM:
                rollouts.append(completions)
            return completions

        def look(self, table, completions):
            watched.append(completions)
            watch(self, table, completions)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RewardWatch, "__call__", look)
            patch.setattr(RunLog, "add", record)
            patch.setattr(Sampler, "__call__", keep)
            with runs.raising(), nullcontext() if spread else runs.one_device():
                grpo.main(
                    runs.grpo_arguments(workplace, run_dir, "--distributed.num_processes=1", *more)
                )
        if "--dry_run" not in more:
            assert [id(one) for one in watched] == [id(one) for one in rollouts]
        return metrics, rollouts

    return run


UPDATES = ("--num_iterations=2", "--beta=0.1")


@pytest.fixture(scope="module")
def whole(grpo_run):
    """A run of four steps with two updates each: metrics, rollouts, and the rows of every call of
    the vision tower."""
    encoded, encode = [], VisionTower.__call__

    def count(self, patches, *rest):
        encoded.append(patches.shape[0])
        return encode(self, patches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTower, "__call__", count)
        return *grpo_run("whole", *UPDATES), encoded


def test_trainer_and_sampler_agree_on_what_was_drawn(workplace, whole):
    metrics, rollouts, _ = whole
    stop_tokens = read_stop_tokens(workplace / "base")
    assert sorted(metrics) == list(range(STEPS))
    for values, rollout in zip(metrics.values(), rollouts, strict=True):
        assert 0 < values["policy/largest_gap"] < 1e-4
        assert values["policy/gap"] <= values["policy/largest_gap"]
        assert (rollout.logprobs[rollout.mask] < 0).all()
        np.testing.assert_array_equal(
            rollout.truncated, ~np.isin(rollout.tokens, stop_tokens).any(1)
        )
        assert (
            values["loss_tokens"] == 2 * rollout.lengths.sum()
        )  # in two updates, none of them masked
    assert metrics[STEPS - 1]["policy/kl"] > metrics[0]["policy/kl"] >= 0
    assert metrics[STEPS - 1]["gate/0"] != 0


def test_a_group_shares_the_encoding_of_its_prompt(whole):
    """One program reads the prompts, a row for each; those that train have a row for each
    completion."""
    _, rollouts, encoded = whole
    assert rollouts[0].tokens.shape == (PROMPTS * GROUP, 16)
    assert encoded.count(PROMPTS) == 1
    assert set(encoded) == {PROMPTS, PROMPTS * GROUP}


def test_the_completions_of_a_group_and_of_two_steps_differ(whole):
    tokens = np.stack([rollout.tokens for rollout in whole[1]])
    assert len(np.unique(tokens.reshape(-1, tokens.shape[-1]), axis=0)) == STEPS * PROMPTS * GROUP


@pytest.fixture(scope="module")
def parts(workplace, grpo_run, whole):
    """The same run, stopped after two steps and continued, with held-out measurements between its
    steps."""
    held_out = (
        f"--held_out={{sources: {workplace / 'data.jsonl'}, every: 2, temperature: 0.8, samples: 2,"
        " shown: 2}"
    )
    return grpo_run("parts", *UPDATES, held_out, stop_at=1), grpo_run("parts", *UPDATES, held_out)


def test_an_interrupted_run_continues_bit_for_bit(workplace, grpo_run, whole, parts):
    (metrics, rollouts), (more_metrics, more_rollouts) = parts
    assert sorted(metrics) == [0, 1]
    assert metrics | more_metrics == whole[0]
    for one, other in zip(rollouts + more_rollouts, whole[1], strict=True):
        chex.assert_trees_all_equal(one, other)
    branches = [
        nnx.state(load(workplace / "base", branch=workplace / run / "branch"))["pvm"]
        for run in ("whole", "parts")
    ]
    chex.assert_trees_all_equal(*branches)
    with pytest.raises(ValueError, match="another clip_low"):
        grpo_run("parts", *UPDATES, "--clip_low=0.1")


@pytest.mark.slow  # two processes do it by default
def test_meshes_and_parts_change_nothing_but_the_last_bits(grpo_run, whole):
    elsewhere = ("--mesh.fsdp=2", "--mesh.tensor=4", "--rollout_mesh={data: 4, fsdp: 1, tensor: 2}")
    metrics, (rollout,) = grpo_run(
        "spread",
        *UPDATES,
        *elsewhere,
        "--rollout_parts=2",
        "--accumulation=4",
        "--max_steps=1",
        spread=True,
    )
    np.testing.assert_array_equal(rollout.tokens, whole[1][0].tokens)
    same = (
        "loss",
        "grad_norm",
        "reward/mean",
        "policy/entropy",
        "policy/kl",
        "tokens",
        "patches",
        "loss_tokens",
    )
    for name in same:
        assert metrics[0][name] == pytest.approx(whole[0][0][name], rel=1e-4, abs=1e-6), name


def test_a_dry_run_takes_two_steps_and_writes_nothing(workplace, grpo_run, whole, capsys):
    """The steps of a run: the first one's rewards are those of `whole`."""
    grpo_run("dry", *UPDATES, "--dry_run")
    said = " ".join(capsys.readouterr().out.split())
    assert f"step 0: reward {whole[0][0]['reward/mean']:.3f}, loss" in said
    assert f"step 1: reward {whole[0][1]['reward/mean']:.3f}, loss" in said
    assert "step 2" not in said
    assert "16 completions of 8 prompts" in said
    assert "GiB more within a step" in said
    assert "weights that generate" in said
    assert not (workplace / "dry").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        grpo_run(
            "dry", *UPDATES, "--dry_run", f"--held_out={{sources: {workplace / 'nowhere.jsonl'}}}"
        )


def test_what_would_end_the_run_late_is_refused_at_its_start(
    workplace, grpo_run, tmp_path, monkeypatch
):
    """A solution that the last step would miss, and a checkpoint whose completions could not
    end. The data are opened once."""
    opened, begin = [], JsonFile.__init__
    monkeypatch.setattr(
        JsonFile, "__init__", lambda self, path: opened.append(path) or begin(self, path)
    )
    *records, last = (workplace / "data.jsonl").read_text().splitlines()
    data = workplace / "no_solution.jsonl"
    data.write_text("\n".join([*records, json.dumps(json.loads(last) | {"solution": ""})]))
    with pytest.raises(
        ValueError, match=rf"no_solution.jsonl:{len(records) + 1}: the solution must be"
    ):
        grpo_run("unsolved", f"--data.sources={data}")
    assert opened == [data]
    shutil.copytree(workplace / "base", tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": null}')
    with pytest.raises(ValueError, match="names no eos_token_id"):
        grpo_run("endless", f"--checkpoint={tmp_path / 'base'}")


def test_held_out_prompts_are_answered_and_graded(workplace, parts):
    values = read_values(workplace / "parts" / "log")
    steps, rewards = zip(*values["held_out/reward/mean"], strict=True)
    assert steps == (0, 2, 4)
    assert all(0 < reward < 1 for reward in rewards)
    assert rewards[0] != rewards[2]
    assert "B3 ground navy" in values["sample/1/text_summary"][0][1]
    assert "sample/2" not in values
    assert values["rollout/sample"][0][1].startswith(b"\x89PNG")
    names = {
        "reward/std",
        "reward/zero_spread",
        "completion/truncated",
        "policy/ratio",
        "gate/0",
        "time/rollout",
    }
    assert names | {
        "rollout/tokens_per_second",
        "train/tokens_per_second",
        "policy/entropy",
    } <= set(values)


def test_two_processes_compute_what_one_does(workplace, whole):
    """On meshes of four devices, another one for the rollouts, and in parts."""
    meshes = ("--mesh.fsdp=2", "--mesh.tensor=2", "--rollout_mesh={data: 4, fsdp: 1, tensor: 1}")
    started = runs.start(
        workplace,
        "two",
        *UPDATES,
        *meshes,
        "--rollout_parts=2",
        "--accumulation=2",
        processes=2,
        devices=2,
        module="train.grpo",
    )
    runs.finish(workplace, "two", started)
    values, alone = (read_values(workplace / run / "log") for run in ("two", "whole"))
    for name in ("completion/length", "reward/mean", "train/tokens"):
        assert values[name] == alone[name], name
    losses, expected = (
        np.array([value for _, value in log["train/loss"]]) for log in (values, alone)
    )
    assert_close(
        losses, expected, 2e-5, scale=1
    )  # sums of terms of the size of 1 that cancel each other
    # Means over all tokens of all completions. The divergence is that of parameters which Adam
    # moves a whole step wherever a gradient is next to nothing, whatever its sign: its last bits
    # grow from update to update.
    for name, bar in (("policy/entropy", 1e-4), ("policy/kl", 2e-3)):
        assert_close(*(np.array([value for _, value in log[name]]) for log in (values, alone)), bar)
    texts = [[text for _, text in log["rollout/sample/text_summary"]] for log in (values, alone)]
    assert texts[0] == texts[1]
