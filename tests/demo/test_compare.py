"""The comparison: equal terms for all methods, where the branch looks, and a report of means,
spreads and paired differences."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import jax
import numpy as np
import pytest
from flax import nnx

from demo import checkpoint, compare, curves, recall, regime, trainings
from demo.compare_report import write_report
from demo.curves import AHEAD, ALONE, BETWEEN, MISLED, OTHER, WRITTEN, Curves, Measured
from demo.evaluate import EvaluationSettings, encode
from demo.run import BASE
from demo.task import draw
from demo.trainings import FAR, LONG, LOOK, METHODS, NEAR, Method, Terms, Training
from pvm_jax.config import LoRAConfig
from pvm_jax.data.processor import Processor
from pvm_jax.model.qwen3_vl import Qwen3VL, abstract_model
from pvm_jax.options import parse
from tests import tiny
from train.run.events import EventWriter
from train.sft.config import SFTConfig
from train.step.state import split_model

SETTINGS = EvaluationSettings(distances=(0, 5), scenes=2, size=2, lines=4, batch_size=2)


def commands_of(training: Training) -> list[list[str]]:
    folder = Path("out", f"seed_{training.seed}")
    steps = trainings.commands(training, Terms(), folder, Path(BASE))
    return [[str(argument) for argument in command] for _, command in steps]


def test_methods_differ_in_what_trains_alone():
    """Checkpoint, result, steps and what a method needs apart, the last commands of a seed are one
    command, on the same examples; seeds share nothing."""
    own = ("--checkpoint", "--run_dir", "--trainable", "--lora.", "--optimizer.learning_rate")
    own += ("--max_steps", "--branch", "--data.sources")
    last = {name: commands_of(Training(name, 0, 1e-3))[-1] for name in METHODS}
    assert len({tuple(a for a in one if not a.startswith(own)) for one in last.values()}) == 1
    for name, command in last.items():
        config, _ = parse(SFTConfig, command[1:], prog="train.sft", description="", examples="")
        assert config.trainable == METHODS[name].stages[-1]
        assert config.batch_size == trainings.BATCH_SIZE
        assert (config.branch is not None) == METHODS[name].looks_first
    made = [
        [c for c in commands_of(Training("LoRA", seed, 1e-3)) if c[0] == "demo.task"]
        for seed in (0, 1)
    ]
    for one, other in zip(*made, strict=True):
        assert {a.split("=")[0] for a in set(one) ^ set(other)} >= {"--mixture.seed"}


@pytest.mark.parametrize("words", [NEAR, FAR])
@pytest.mark.parametrize("replay", [True, False])
def test_all_read_as_many_tokens_and_as_much_long_text(words, replay):
    """Within a batch; and the examples of a command are as many as it reads."""
    plain, read = Path(BASE), {}
    tokens = {name: trainings.mean_tokens(name, plain) for name in (LOOK, NEAR, FAR, LONG)}
    for name in METHODS:
        training = Training(name, 0, 1e-3, words, replay)
        stages = trainings.batches(training, Terms(), plain)
        assert sum(stage[LONG] for stage in stages) == (Terms().replayed if replay else 0)
        read[name] = sum(tokens[kind] * count for stage in stages for kind, count in stage.items())
        commands = commands_of(training)
        rows = sum(int(a[8:]) for c in commands for a in c if a.startswith("--count="))
        steps = sum(int(a[12:]) for c in commands for a in c if a.startswith("--max_steps="))
        assert steps == sum(stage.total() for stage in stages)
        assert rows >= trainings.BATCH_SIZE * steps
    assert np.ptp(list(read.values())) < max(tokens.values())


def test_the_search_shortens_all_but_learning_to_look():
    search = Training("PVM looks first", 50, 1e-3, replay=False, share=0.25)
    full = replace(search, share=1.0)
    short, whole = (trainings.batches(one, Terms(), Path(BASE)) for one in (search, full))
    assert short[0] == whole[0]
    assert short[1][NEAR] == round(whole[1][NEAR] / 4)
    assert search.name != full.name


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
            name, Path("out"), 800
        )
        config, _ = parse(SFTConfig, arguments, prog=entry, description="", examples="")
        assert (config.checkpoint, config.data.sources, convert[2]) == (
            str(fresh),
            str(data),
            fresh,
        )
        assert config.max_steps == 800 * one.times
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


def test_an_unknown_table_is_named(tmp_path):
    with pytest.raises(ValueError, match="no table 'x', but near, near, without replay, far"):
        compare.main(tmp_path / "out", tmp_path / "results", only=["x"])
    assert not list(tmp_path.iterdir())


def test_all_but_full_train_as_many_parameters():
    def parameters(method: Method) -> int:
        given = parse_qs("&".join(a.removeprefix("--lora.") for a in method.arguments))
        config = checkpoint.make_config(checkpoint.make_tokenizer())
        if method.branch:
            _, *layers, _, width = method.branch
            config = config.with_pvm(tuple(map(int, layers)), int(width))
        if given:
            config = replace(
                config, lora=LoRAConfig(int(given["rank"][0]), float(given["alpha"][0]))
            )
        model = abstract_model(config)
        parts = [split_model(model, part)[1] for part in set(method.stages)]
        return sum(math.prod(x.shape) for x in jax.tree.leaves(parts))

    counts = {name: parameters(method) for name, method in METHODS.items() if name != "full"}
    assert counts == {name: pytest.approx(counts["PVM"], rel=0.03) for name in counts}


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
    assert curves.read_gates(tmp_path) == {"2": [0.0, 0.5, -0.25]}
    assert curves.read_gates(tmp_path, tmp_path / "none", tmp_path) == {"2": [0.0, 0.5, -0.25] * 2}


def measured(method: str, seed: int | None, between: float, **more) -> Measured:
    """Of two scenes, which differ by 0.2."""
    at = lambda mean: {"0": [mean - 0.1, mean + 0.1], "5": [mean / 2 - 0.1, mean / 2 + 0.1]}  # noqa: E731
    found = {BETWEEN: at(between), AHEAD: {"5": [between, between]}} | more.pop("curves", {})
    table = "" if seed is None else "near"
    return Measured(method, table, seed, None if seed is None else 1e-3, 1234, 5000, found, **more)


def test_measured_once_and_then_read(tmp_path):
    one = measured("PVM", 0, 0.5, gates={"1": [0.0]})
    assert curves.once(tmp_path / "PVM.json", lambda: one) == one
    assert curves.once(tmp_path / "PVM.json", lambda: pytest.fail("measured again")) == one


def test_a_folder_of_results_on_other_terms_is_refused(tmp_path):
    """A method that joins the others is no other term; one that is gone or changed is."""
    for methods in ({"a": 1}, {"a": 1}, {"b": 1, "a": 1}):
        compare.claim(tmp_path / "results", {"steps": 1, "methods": methods})
    for steps, methods in ((2, {"a": 1, "b": 1}), (1, {"a": 2, "b": 1}), (1, {"a": 1})):
        with pytest.raises(ValueError, match=r"on other terms \(see .*terms\.json\): give "):
            compare.claim(tmp_path / "results", {"steps": steps, "methods": methods})


def test_the_shipped_results_are_of_the_shipped_base_and_on_these_terms(tmp_path):
    shutil.copy("demo/results/terms.json", tmp_path)
    compare.claim(tmp_path, compare.terms_of(Terms(), Curves()))


def test_the_best_rate_is_that_of_the_best_mean():
    of = dict(zip(compare.RATES, (0.5, 0.75, 0.25, 0.1), strict=True))
    tried = []

    def work(training: Training, **_) -> Measured:
        tried.append(training)
        return measured("LoRA", 50, of[training.rate])

    assert compare.best_rate("LoRA", work) == 1e-3
    assert {one.seed for one in tried} == {compare.SEARCHED}
    assert tuple(one.rate for one in tried) == compare.RATES


def test_report_gives_means_spreads_and_paired_differences(tmp_path, capsys):
    other = {OTHER: {"0": [0.2, 0.2], "5": [0.1, 0.1]}}
    ones = [measured("base", None, 0.5, curves=other)]
    for seed, accuracy in enumerate((0.6, 0.8)):
        looks = {"5": {"1": [0.25, 0.35 + seed / 5]}}
        controls = {MISLED: {"5": [0.625, 0.125]}, ALONE: {"5": [0.5, 0.5]}}
        ones += [
            measured("LoRA", seed, 0.4),
            measured("full", seed, 0.3),
            measured(
                "PVM looks first",
                seed,
                accuracy,
                curves=controls,
                attention=looks,
                gates={"1": [0.0, 0.1 * (seed + 1)]},
            ),
        ]
    write_report(ones, {"looking": 3}, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| 0 | 0.500 | 0.400 ± 0.000 | 0.300 ± 0.000 | 0.700 ± 0.141 | 0.200 |" in text
    assert "| 0 words between | LoRA | +0.300 [+0.300, +0.300] | +0.200, +0.400 |" in text
    assert "| 5 words ahead | LoRA | +0.300 [+0.300, +0.300] | +0.200, +0.400 |" in text
    assert "| 5 | 0.350 ± 0.071 | 0.375 ± 0.000 | 0.500 ± 0.000 | 0.450 ± 0.141 |" in text
    assert "layer 1 +0.100, +0.200" in text
    for kind in ("png", "svg"):
        assert (tmp_path / f"near.{kind}").stat().st_size > 10_000
    kept = json.loads((tmp_path / "results.json").read_text())
    assert Measured(**kept["measured"][1]) == ones[1]
    assert text in capsys.readouterr().out


def test_what_is_measured_of_a_model(model, processor, tmp_path, monkeypatch):
    """Every curve asked for, a number for each scene; a base has what it guesses, a branch its
    controls."""
    checkpoint.write_assets(tmp_path)
    little = replace(EvaluationSettings(), lines=4, size=2, batch_size=2)
    monkeypatch.setattr(curves, "EvaluationSettings", lambda: little)
    asked = Curves(between=(0, 5), ahead=(5,), controls=(5,), written=(0,), scenes=2)
    about = {"method": "m", "table": "near", "seed": 0, "rate": None}
    found = curves.measure(model, tmp_path, asked, trained=("pvm",), about=about)
    shapes = {name: {w: len(v) for w, v in by.items()} for name, by in found.curves.items()}
    assert shapes == {
        BETWEEN: {"0": 2, "5": 2},
        AHEAD: {"5": 2},
        WRITTEN: {"0": 2},
        MISLED: {"5": 2},
        ALONE: {"5": 2},
    }
    assert list(found.attention) == ["5"]
    assert found.trained == sum(x.size for x in jax.tree.leaves(split_model(model, "pvm")[1]))
    base = curves.measure(model, tmp_path, replace(asked, written=()), trained=(), about=about)
    assert set(base.curves) == {BETWEEN, AHEAD, OTHER}
    assert base.curves[BETWEEN] == found.curves[BETWEEN]
    examples = curves.Scenes(asked, tmp_path).examples(0, 5)
    prompt = processor.decode(encode(examples[:1], processor)[0].input_ids)
    assert " ".join(examples[0].ahead) + "\nList" in prompt
    assert draw(examples[0].scene).size == (64, 64)
