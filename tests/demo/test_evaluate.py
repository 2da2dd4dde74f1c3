"""The demo's measurement: what counts are the values, and a written line is right if the scene says
so."""

import numpy as np
import pytest

from demo import checkpoint, evaluate, task
from pvm_jax.data.processor import Processor
from pvm_jax.measure import accuracy
from pvm_jax.measure.reading import find_answers

SETTINGS = evaluate.EvaluationSettings(
    distances=(0, 3),
    ahead=(0, 3),
    scenes=3,
    size=2,
    lines=5,
    long_scenes=4,
    shortest=2,
    distance=7,
    looks=3,
    batch_size=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    checkpoint.write_assets(path)
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


def test_hits_are_the_values(processor, monkeypatch):
    """Right where the value stands, and wrong at every other token, is a hit on every line."""
    examples = SETTINGS.examples(3, SETTINGS.scenes)
    encoded = evaluate.encode(examples, processor)
    answers = find_answers(encoded)
    said = [
        [processor.decode([e.input_ids[c]]) for c in columns]
        for e, columns in zip(encoded, answers.columns, strict=True)
    ]

    def sees(*_, **__):
        values = [{f" {value}\n" for _, _, value in example.lines} for example in examples]
        right = [[text in those for text in row] for row, those in zip(said, values, strict=True)]
        return accuracy.TeacherForced(np.array(right, np.float32), np.zeros((3, len(said[0]))))

    monkeypatch.setattr(evaluate, "teacher_forced", sees)
    hits = evaluate.sees(None, encoded, SETTINGS)
    assert hits.shape == (3, 5)
    assert hits.all()


def test_the_task_counts_values_alone(processor, folder):
    built = evaluate.make_task(folder, processor, SETTINGS)
    assert [len(built.fillers[distance]) for distance in SETTINGS.distances] == [3, 3]
    added = [
        len(a.input_ids) - len(b.input_ids)
        for a, b in zip(built.fillers[3], built.fillers[0], strict=True)
    ]
    assert added == [3, 3, 3]
    assert [len(built.ahead[words][0].input_ids) for words in (0, 3)] == [
        len(built.fillers[words][0].input_ids) for words in (0, 3)
    ]
    answers = find_answers(built.examples)
    assert (
        7 <= answers.lengths.min() <= answers.lengths.max() <= 16
    )  # 2 to 5 lines of three tokens, and the turn's end
    counted = built.counting(np.ones(answers.columns.shape))
    lines = [len(example.lines) for example in SETTINGS.examples(7, 4, 2)]
    np.testing.assert_array_equal(np.nansum(counted, axis=1), lines)
    for number, token in built.looks:
        assert counted[number, token] == 1


def test_written_lines_are_checked(processor):
    example = task.make_example(task.Mixture(sizes=(2,), lines=(3, 3)), 0)
    (cell, name, value), *_ = example.lines
    other = next(v for v in task.VALUES[name] if v != value)
    lines = (
        f"{cell} {name} {value}\n",
        f"{cell} {name} {value}\n",
        "D4 ink red\n",
        "A1\n",
        "A1 ink",
    )
    scores = grades("".join(lines), example, processor)
    assert scores[np.isfinite(scores)].tolist() == [
        1,
        0,
        0,
        0,
    ]  # right; a pair again; not of this grid; no value; unfinished
    assert np.flatnonzero(np.isfinite(scores))[0] == evaluate.TOKENS_PER_LINE - 1
    wrong = grades(f"{cell} {name} {other}\n", example, processor)
    assert wrong[np.isfinite(wrong)].tolist() == [0]
    assert np.nansum(grades(example.answer, example, processor)) == 3


def grades(text, example, processor) -> np.ndarray:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return evaluate.grade(np.array(ids), example, processor)


def test_another_tokenizer_is_refused(processor):
    encoded = evaluate.encode(SETTINGS.examples(0, 1), processor)
    with pytest.raises(ValueError, match="tokens"):
        evaluate.value_places(encoded[0], 4)
