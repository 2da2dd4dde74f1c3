"""The measurement: hits are hits, chance is chance, and the report says what the numbers say."""

import json
from dataclasses import replace

import numpy as np
import pytest

from demo import checkpoint, evaluate, report, task
from pvm_jax.processing import Processor

SETTINGS = evaluate.Settings(
    distances=(0, 3), scenes=3, size=2, lines=5, written_scenes=2, written_lines=3, batch_size=2, resamples=100
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    checkpoint.write_assets(path)
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    return checkpoint.make_model(checkpoint.make_config(checkpoint.make_tokenizer()), seed=0)


def test_hits_are_the_values(processor, model, monkeypatch):
    """A model that always answers with the true token at the asked column hits every value, and no other column is asked."""
    examples = SETTINGS.examples(3, SETTINGS.scenes)
    encoded = [processor.encode(example.messages(task.draw(example.scene))) for example in examples]
    asked = []

    def oracle(graphdef, params, batch, columns):
        asked.append(np.take_along_axis(batch.tokens, columns, 1))
        return asked[-1]

    monkeypatch.setattr(evaluate, "_likeliest", oracle)
    assert evaluate.sees(model, encoded, SETTINGS).all()
    for example, ids in zip(examples, np.concatenate(asked), strict=False):
        assert [processor.decode([i]) for i in ids] == [f" {value}\n" for _, _, value in example.lines]


def test_whole_measurement(processor, model, tmp_path):
    results = evaluate.evaluate({"before": model, "after": model}, processor, SETTINGS)
    for name in ("before", "after", evaluate.SHUFFLED):
        assert np.shape([results["hits"][name][d] for d in SETTINGS.distances]) == (2, 3, 5)
    assert results["hits"]["before"] == results["hits"]["after"]
    report.write_report(results, tmp_path)
    assert "null result" in (tmp_path / "results.md").read_text().splitlines()[0]
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["scenes"] == 3


def test_written_lines_are_checked():
    example = task.make_example(task.Mixture(sizes=(2,), lines=(3, 3)), 0)
    (cell, name, value), *_ = example.lines
    other = next(v for v in task.VALUES[name] if v != value)
    cells = (f"{cell} {name} {value}\n", f"{cell} {name} {value}\n", "D4 ink red\n", "A1\n", "A1 ink")
    assert evaluate.check("".join(cells), example) == (4, 2, 1, 1)
    assert evaluate.check(f"{cell} {name} {other}\n", example) == (1, 0, 0, 0)
    assert evaluate.check(example.answer, example).correct == 3


def test_another_tokenizer_is_refused(processor, model):
    example = SETTINGS.examples(0, 1)[0]
    encoded = processor.encode(example.messages(task.draw(example.scene)))
    with pytest.raises(ValueError, match="tokens"):
        evaluate.sees(model, [encoded], replace(SETTINGS, lines=4))


def test_verdict_follows_the_intervals():
    def gains(*pairs):
        return {"gain": [report.Estimate((low + high) / 2, low, high) for low, high in pairs]}

    assert report.verdict(gains((-0.1, 0.1)), (0,)).startswith("A null result")
    assert "better at 9" in report.verdict(gains((-0.1, 0.1), (0.1, 0.2)), (0, 9))
    assert "worse at 0" in report.verdict(gains((-0.2, -0.1), (-0.1, 0.2)), (0, 9))


def test_bootstrap_resamples_scenes():
    values = np.zeros((40, 10))
    values[:20] = 1
    mean, low, high = report.bootstrap(values, 1000)
    assert mean == 0.5
    assert 0.3 < low < 0.4 < 0.6 < high < 0.7  # 400 independent values would give 0.45 to 0.55
