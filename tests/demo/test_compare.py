"""The comparison: equal terms for all methods, where the branch looks, and a report of means and
spreads."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from demo import checkpoint, compare, recall, regime
from demo.compare_report import Measured, write_report
from demo.evaluate import EvaluationSettings
from demo.run import BRANCH
from pvm_jax.config import LoRAConfig
from pvm_jax.data.processor import Processor
from pvm_jax.model.qwen3_vl import Qwen3VL, abstract_model
from pvm_jax.options import parse
from tests import tiny
from train.run.events import EventWriter
from train.sft.config import SFTConfig
from train.step.state import split_model

SETTINGS = EvaluationSettings(distances=(0, 5), scenes=2, size=2, lines=4, batch_size=2)


def test_methods_differ_in_what_trains_alone():
    """Checkpoint, result, steps and what a method needs apart, the commands of a seed are one
    command; seeds share nothing."""
    seeds = [dict(compare.training_steps(Path("out"), seed, 9)) for seed in (0, 1)]
    commands_of = [[[str(a) for a in command] for command in by.values()] for by in seeds]
    trainings = [
        [command for command in commands if "--config=demo/branch.yaml" in command]
        for commands in commands_of
    ]
    for commands in trainings:
        own = (
            "--checkpoint",
            "--run_dir",
            "--trainable",
            "--lora.",
            "--optimizer.learning_rate",
            "--max_steps",
            "--branch",
        )
        assert (
            len({tuple(a for a in command if not a.startswith(own)) for command in commands}) == 1
        )
        steps = [a for command in commands for a in command if a.startswith("--max_steps")]
        assert steps == ["--max_steps=9", "--max_steps=9", "--max_steps=9", "--max_steps=4"]
        assert [a for command in commands for a in command if a.startswith("--branch")] == [
            commands[-1][-1]
        ]
    for one, other in zip(*trainings, strict=True):
        differing = {a.split("=")[0] for a in set(one) ^ set(other)}
        needed = {"--seed", "--data.sources", "--run_dir"}
        assert needed <= differing <= {*needed, "--checkpoint", "--branch"}
    examples = [
        command for commands in commands_of for command in commands if command[0] == "demo.task"
    ]
    assert len({a for command in examples for a in command if a.startswith("--mixture.seed")}) == 2


def test_the_branchs_two_stages_read_no_more_tokens_than_the_others_one():
    """Counted from the configs: rows of each bucket, as often as their sizes are drawn."""
    tokens = {}
    for name in ("look", "branch"):
        buckets = yaml.safe_load(Path(f"demo/{name}.yaml").read_text())["data"]["buckets"]
        sizes = yaml.safe_load(Path(f"demo/{name}_data.yaml").read_text())["mixture"]["sizes"]
        of_size = {bucket["patches"]: bucket["tokens"] for bucket in buckets}
        tokens[name] = np.mean([of_size[4 * size**2] for size in sizes])
        assert (
            yaml.safe_load(Path(f"demo/{name}.yaml").read_text())["batch_size"]
            == compare.BATCH_SIZE
        )
    looking, beside = compare.stages(300)
    assert (
        0.9 < (looking * tokens["look"] + beside * tokens["branch"]) / (300 * tokens["branch"]) <= 1
    )


def test_variations_of_the_first_stage_change_one_thing():
    """All are runs of their own that train.sft takes; each differs from the demo's in one part."""
    plain = regime.Variation()
    runs = set()
    for name, one in regime.VARIATIONS.items():
        changed = [key for key, value in vars(one).items() if value != getattr(plain, key)]
        assert len(changed) == (
            0 if name == "as in the demo" else 2 if "examples" in name else 1
        ), name
        (fresh, convert), (data, make_data), (branch, (entry, *arguments)) = regime.commands(
            name, Path("out"), 400
        )
        config, _ = parse(SFTConfig, arguments, prog=entry, description="", examples="")
        assert (config.checkpoint, config.data.sources, convert[2]) == (
            str(fresh),
            str(data),
            fresh,
        )
        assert config.max_steps == 400 * one.times
        assert config.max_steps * config.batch_size in (3200, 6400, 12800)
        (count,) = (
            int(str(a).removeprefix("--count=")) for a in make_data if str(a).startswith("--count=")
        )
        assert (
            config.max_steps * config.batch_size <= count * config.epochs
        )  # else the run would end before its last step
        runs.add(branch)
    assert len(runs) == len(regime.VARIATIONS)


def test_an_unknown_variation_is_named(tmp_path):
    with pytest.raises(ValueError, match="no variation is called 'x'; there are: as in the demo, "):
        regime.main(tmp_path / "out", only=["x"])
    assert not (tmp_path / "out").exists()


def test_lora_has_as_many_parameters_as_the_branch():
    layers, width = (1, 2), int(BRANCH[-1])
    assert ("--pvm_layers", *map(str, layers), "--pvm_hidden_size", str(width)) == BRANCH
    given = dict(
        a.removeprefix("--lora.").split("=")
        for a in compare.METHODS["LoRA"].arguments
        if a.startswith("--lora.")
    )
    config = checkpoint.make_config(checkpoint.make_tokenizer()).with_pvm(layers, width)
    model = abstract_model(
        replace(config, lora=LoRAConfig(int(given["rank"]), float(given["alpha"])))
    )
    counts = [
        sum(math.prod(x.shape) for x in jax.tree.leaves(split_model(model, part)[1]))
        for part in ("pvm", "lora")
    ]
    assert counts[1] == pytest.approx(counts[0], rel=0.03)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    folder = tmp_path_factory.mktemp("hf")
    checkpoint.write_assets(folder)
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model() -> Qwen3VL:
    config = checkpoint.make_config(checkpoint.make_tokenizer()).with_pvm((1,), 64)
    return tiny.make_model(tiny.cut(config, layers=2), gate=1)


def test_attention_is_shared_among_the_cells(model, processor, monkeypatch):
    """All cells together have 1; keys that are alike get alike; a sharpened branch prefers one to
    another."""
    examples = SETTINGS.examples(0, 2)
    graphdef, params = nnx.split(model)
    sharp = nnx.map_state(
        lambda path, leaf: leaf * 10 if path[-2] in ("q_norm", "k_norm") else leaf, params
    )
    blind = nnx.map_state(lambda path, leaf: leaf * 0 if "vision_reducer" in path else leaf, params)

    def shares(params):
        return np.array(
            recall.attention_on_cell(nnx.merge(graphdef, params), processor, examples, SETTINGS)[
                "1"
            ]
        )

    np.testing.assert_allclose(shares(blind), 1 / 4, rtol=1e-5)
    by_cell = []
    for cell in range(4):
        monkeypatch.setattr(recall, "visual_token", lambda *_, cell=cell: cell)
        by_cell.append(shares(sharp))
    np.testing.assert_allclose(sum(by_cell), 1, rtol=1e-5)
    assert np.ptp(by_cell) > 0.1


def test_cells_are_visual_tokens_in_reading_order():
    assert [recall.visual_token(cell, 3) for cell in ("A1", "B1", "C1", "A2", "C3")] == [
        0,
        1,
        2,
        3,
        8,
    ]


def test_gates_are_read_back_from_the_log_of_a_run_that_went_on(tmp_path):
    writer = EventWriter(tmp_path, start=0)
    for step, gate in ((0, 0.0), (1, 0.5), (2, 0.75), (2, -0.25)):
        writer.scalars(step, {"gate/2": gate, "train/loss": 1.0})
    writer.close()
    assert compare.read_gates(tmp_path) == {"2": [0.0, 0.5, -0.25]}
    assert compare.read_gates(tmp_path, tmp_path / "none", tmp_path) == {"2": [0.0, 0.5, -0.25] * 2}


def test_measured_once_and_then_read(tmp_path):
    one = Measured("PVM", 0, 5, {"0": 0.5}, gates={"1": [0.0]})
    assert compare.once(tmp_path / "PVM.json", lambda: one) == one
    assert compare.once(tmp_path / "PVM.json", lambda: pytest.fail("measured again")) == one


def test_a_folder_of_results_on_other_terms_is_refused(tmp_path):
    for _ in range(2):
        compare.claim(tmp_path / "out", {"steps": 1})
    with pytest.raises(
        ValueError, match=r"on other terms \(see .*terms\.json\): give another --out"
    ):
        compare.claim(tmp_path / "out", {"steps": 2})


def test_report_gives_means_and_spreads(tmp_path, capsys):
    measured = [Measured("base", None, 0, {"0": 0.5, "5": 0.25}, shuffled={"0": 0.2, "5": 0.21})]
    for seed, accuracy in enumerate((0.6, 0.8)):
        looks = {distance: {"1": [0.25, 0.35 + seed / 5]} for distance in ("0", "5")}
        measured.append(
            Measured(
                "PVM",
                seed,
                1234,
                {"0": accuracy, "5": 0.3},
                misled={"0": 0.625, "5": 0.125},
                attention=looks,
                gates={"1": [0.0, 0.1 * (seed + 1)]},
            )
        )
    write_report(measured, SETTINGS, (1, 4), "7 steps", tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| 0 | 0.500 | 0.700 ± 0.141 | 0.200 |" in text
    assert "| trained parameters | 0 | 1,234 |  |" in text
    assert "| 5 | 0.125 ± 0.000 | 0.350 ± 0.071 | 0.450 ± 0.141 |" in text
    assert "chance: 1/4 = 0.250" in text
    assert "layer 1 +0.100, +0.200" in text
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results.json").read_text())["measured"][1]["accuracy"] == {
        "0": 0.6,
        "5": 0.3,
    }
    assert text in capsys.readouterr().out
