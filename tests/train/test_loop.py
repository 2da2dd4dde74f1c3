"""Whole runs of `train.sft` on a tiny checkpoint: results, interruption and continuation,
refusals."""

import io
import os
import shutil
import signal
from dataclasses import replace
from functools import partial

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants
from rich.console import Console

from convert import dataset, hf_to_orbax, orbax_to_hf
from pvm_jax.checkpoint.store import load, save
from pvm_jax.data.json_files import JsonFile
from pvm_jax.model.lora import is_adapter
from pvm_jax.sharding import make_mesh
from tests.close import assert_close
from tests.hub_server import REVISION, TOKEN, hub
from tests.train import runs
from train.config import Bucket, DataConfig
from train.run.dry_run import shardings_table
from train.run.events import read_values
from train.run.lifecycle import export
from train.run.log import RunLog
from train.sft import __main__ as sft
from train.sft.config import HeldOutConfig, SFTConfig
from train.sft.held_out import HeldOut
from train.sft.loop import prepare
from train.sft.program import SFTProgram

__all__ = ["hub"]
STEPS = 6
TWO_SHAPES = "--data.buckets=[{tokens: 32, patches: 8}, {tokens: 48, patches: 8}]"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with base/ (a tiny checkpoint) and data.jsonl; programs are compiled once for all
    its runs."""
    root = tmp_path_factory.mktemp("sft")
    model = runs.write_workplace(root, examples=8 * STEPS)
    model.pvm["0"].gate_alpha[...] = np.nan * model.pvm["0"].gate_alpha[...]
    save(root / "broken", model, assets=root / "hf")
    with runs.programs_kept(root):
        yield root


@pytest.fixture
def one_device():
    with runs.one_device():
        yield


@pytest.fixture
def sft_run(workplace, monkeypatch):
    """(run_dir, *arguments, stop_at, by) -> {step: loss} of the steps that the command did; stopped
    by this signal."""

    def run(run_dir, *arguments, stop_at=None, by=signal.SIGTERM):
        losses, write, add = {}, RunLog.scalars, RunLog.add

        def record(log, step, values):
            losses.update({step: float(values["train/loss"])} if "train/loss" in values else {})
            write(log, step, values)

        def stop(log, step, *args, **options):
            add(log, step, *args, **options)
            if step == stop_at:
                os.kill(os.getpid(), by)

        monkeypatch.setattr(RunLog, "scalars", record)
        monkeypatch.setattr(RunLog, "add", stop)
        with runs.raising():
            sft.main(
                runs.arguments(workplace, run_dir, "--distributed.num_processes=1", *arguments)
            )
        monkeypatch.undo()
        return losses

    return run


@pytest.mark.slow  # what it begins and ends with is shown in tests/convert
def test_a_model_and_data_of_the_hub_train_as_their_originals_and_the_result_is_pushed(
    hub, workplace, sft_run, tmp_path, monkeypatch
):
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    for file in (workplace / "data.jsonl", *workplace.glob("*.png")):
        shutil.copy(file, data)
    orbax_to_hf.convert(workplace / "base", model)
    hub.repositories |= {"models/someone/model": model, "datasets/someone/data": data}
    monkeypatch.chdir(tmp_path)
    hf_to_orbax.main(["someone/model", "checkpoint"])
    dataset.main(["someone/data", "shards", "--checkpoint", "someone/model"])
    here = sft_run("here", "--max_steps=2")
    assert len(here) == 2
    shards = [f"--checkpoint={tmp_path / 'checkpoint'}", f"--data.sources={tmp_path / 'shards'}"]
    assert sft_run("there", "--max_steps=2", *shards) == here
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    branch = ["--branch", str(workplace / "there" / "branch")]
    places = [str(tmp_path / "checkpoint"), str(tmp_path / "out")]
    orbax_to_hf.main([*places, *branch, "--push_to_hub", "someone/model"])
    card = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert f"| data.sources | hf://datasets/someone/data@{REVISION} (split train) |" in card
    assert "| trainable | pvm |" in card
    assert hub.commits


@pytest.mark.usefixtures("one_device")
def test_interrupted_run_continues_with_equal_losses(workplace, sft_run, capsys):
    """Its rows have two shapes; their images are hidden from the decoder until after the step from
    which it goes on."""
    hide = ("--data.hide_images={until: 0.7}", TWO_SHAPES)
    whole = sft_run("whole", "--checkpoint_every=100", *hide)
    assert sorted(whole) == list(range(len(whole)))
    assert step_checkpoints(workplace / "whole") == [str(len(whole))]
    assert len(whole) >= STEPS - 1
    with pytest.raises(
        FileNotFoundError, match="nowhere"
    ):  # a start that failed does not hold the directory
        sft_run("parts", *hide, f"--checkpoint={workplace / 'nowhere'}")
    before = sft_run("parts", *hide, stop_at=2)
    assert sorted(before) == [0, 1, 2]
    assert not (workplace / "parts" / "branch").exists()
    assert "stopped after step 3" in capsys.readouterr().out
    after = sft_run("parts", *hide)
    assert sorted(after) == list(range(3, len(whole)))
    assert before | after == whole
    assert len(step_checkpoints(workplace / "parts")) == 2

    base = load(workplace / "base")
    trained = [
        load(workplace / "base", branch=workplace / run / "branch") for run in ("whole", "parts")
    ]
    branches = [jax.tree.leaves(nnx.state(model)["pvm"]) for model in (base, *trained)]
    assert all(np.array_equal(a, b) for a, b in zip(*branches[1:], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(*branches[:2], strict=True))
    assert list((workplace / "whole" / "log").glob("events.*"))

    with pytest.raises(FileExistsError, match="this run is finished"):
        sft_run("whole", *hide)
    with pytest.raises(ValueError, match=r"another optimizer \(see .*run.json"):
        sft_run("whole", *hide, "--optimizer.learning_rate=1")
    with pytest.raises(ValueError, match=r"another data \(see .*run.json"):
        sft_run("whole", *hide, "--data.hide_images={until: 0.6}")


def step_checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "steps").iterdir() if path.name.isdigit())


@pytest.mark.slow  # a run of the branch is interrupted by default
@pytest.mark.usefixtures("one_device")
def test_an_interrupted_lora_run_ends_with_the_adapters_of_a_whole_one(workplace, sft_run):
    lora = ("--trainable=lora", "--lora.rank=2", "--lora.targets=.*q_proj", "--max_steps=4")
    whole = sft_run("lora", *lora)
    before = sft_run("lora_parts", *lora, stop_at=1, by=signal.SIGINT)  # Ctrl-C
    assert sorted(before) == [0, 1]
    assert before | sft_run("lora_parts", *lora) == whole
    trained = [
        load(workplace / "base", lora=workplace / run / "lora") for run in ("lora", "lora_parts")
    ]
    chex.assert_trees_all_equal(*(nnx.as_pure(nnx.state(model)) for model in trained))
    adapters = jax.tree.leaves(nnx.state(trained[0], is_adapter))
    assert adapters
    assert all(np.asarray(adapter).any() for adapter in adapters)  # B began at zero
    with pytest.raises(ValueError, match="another lora"):
        sft_run("lora", *lora, "--lora.rank=3")


def test_whole_model_is_written_when_more_than_the_branch_trains(workplace):
    data = DataConfig(str(workplace / "data.jsonl"), [Bucket(48, 8)])
    config = SFTConfig(str(workplace / "base"), "unused", data, trainable="decoder")
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = load(config.checkpoint, mesh=mesh)
        program = SFTProgram.of(config, model.config, 1, mesh)
        state, frozen = program.begin(model)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            (state, frozen), (program.state, program.frozen)
        )
        state = replace(state, params=jax.jit(partial(jax.tree.map, lambda x: x + 1))(state.params))
        export(config, mesh, program.model(state, frozen), workplace / "model")
    base, model = (nnx.as_pure(nnx.state(load(workplace / name))) for name in ("base", "model"))
    chex.assert_trees_all_equal(
        model["visual"], base["visual"]
    )  # not rounded to the run's bfloat16
    for part in ("language_model", "pvm"):
        chex.assert_trees_all_equal(
            model[part], jax.tree.map(lambda x: np.asarray(x) + 1, base[part])
        )
    assert (workplace / "model" / "tokenizer.json").exists()


@pytest.mark.usefixtures("one_device")
def test_held_out_conversations_are_measured_and_answered(workplace, sft_run):
    sft_run(
        "watched",
        f"--held_out={{sources: {workplace / 'data.jsonl'}, every: 3, samples: 3,"
        " max_new_tokens: 4}",
        "--max_steps=4",
    )
    values = read_values(workplace / "watched" / "log")
    steps, losses = zip(*values["held_out/loss"], strict=True)
    assert steps == (0, 3, 4)
    assert losses[2] < losses[0]
    assert values["update_share/0"][0] == (0, 0.0)  # a fresh gate is shut
    assert 0 < values["update_share/0"][2][1] < 1
    for number in range(3):
        assert [step for step, _ in values[f"sample/{number}"]] == [0, 3, 4]
        assert "B3 ground navy" in values[f"sample/{number}/text_summary"][0][1]
    assert "sample/3" not in values


def test_held_out_loss_is_the_mean_over_all_answer_tokens(workplace):
    """Rows that only fill the last batch count for nothing."""
    data = DataConfig(str(workplace / "data.jsonl"), [Bucket(48, 8)], packing=False)
    held_out = HeldOutConfig(str(workplace / "data.jsonl"))
    losses = []
    for batch_size in (8, 32):  # 48 examples
        config = SFTConfig(
            str(workplace / "base"),
            "unused",
            data,
            dtype="float32",
            batch_size=batch_size,
            held_out=held_out,
        )
        mesh = make_mesh(devices=jax.devices()[:1])
        with jax.set_mesh(mesh):
            work = prepare(config, mesh)
            measured = HeldOut(config, held_out, work.processor, work.model_config, work.program)
            losses.append(measured.measure(work.state, work.frozen)["held_out/loss"])
    assert_close(losses[0], losses[1], 1e-5)


@pytest.mark.usefixtures("one_device")
def test_a_dry_run_takes_two_steps_and_writes_nothing(workplace, sft_run, capsys):
    held_out = f"--held_out={{sources: {workplace / 'data.jsonl'}}}"
    sft_run("dry", "--dry_run", held_out, "--max_steps=4")
    said = capsys.readouterr().out
    assert "held-out loss" in said
    assert "step 1: loss" in said
    assert "GiB more within a step" in said
    for array in ("pvm/0/text_reducer/weight", "patches"):
        assert f" {array} " in said
    assert not (workplace / "dry").exists()


def test_a_dry_runs_table_says_what_splits_an_array(workplace):
    data = DataConfig("unused", [Bucket(48, 8)])
    model_config = load(workplace / "base").config
    program = SFTProgram.of(SFTConfig("unused", "unused", data), model_config, 1, make_mesh())
    console = Console(file=io.StringIO(), width=140)
    for tree in (program.state.params, program.abstract_batch(Bucket(48, 8), 8)):
        console.print(shardings_table("arrays", tree))
    said = console.file.getvalue().splitlines()
    line = next(line for line in said if " pvm/0/text_reducer/weight " in line)
    assert "(64, 128)" in line
    assert "- fsdp" in line
    assert "data+fsdp - -" in next(line for line in said if "│ patches " in line)


@pytest.mark.usefixtures("one_device")
def test_a_loss_that_is_not_finite_stops_the_run(workplace, sft_run):
    with pytest.raises(
        FloatingPointError, match=r"step 0: loss nan.*Its examples: .*data\.jsonl:\d+"
    ):
        sft_run("nan", f"--checkpoint={workplace / 'broken'}", "--max_steps=4")
    assert not [path for path in (workplace / "nan" / "steps").iterdir() if path.name.isdigit()]


@pytest.mark.usefixtures("one_device")
def test_data_are_opened_once(workplace, sft_run, monkeypatch):
    """Opening scans all of a file."""
    opened, begin = [], JsonFile.__init__
    monkeypatch.setattr(
        JsonFile, "__init__", lambda self, path: opened.append(path) or begin(self, path)
    )
    sft_run("once", "--max_steps=4", stop_at=0)
    assert opened == [workplace / "data.jsonl"]


def test_batch_must_divide_over_the_mesh(sft_run):
    with pytest.raises(ValueError, match="4 rows do not divide over the mesh's data x fsdp = 8"):
        sft_run("uneven", "--accumulation=2")
