"""The generator: the answer is what the picture shows, and nothing but what was asked for
changes."""

import json

import numpy as np
import pytest

from demo.task import (
    ATTRIBUTES,
    CELL,
    GROUNDS,
    INKS,
    MARK_COLOUR,
    Mixture,
    digit_indices,
    draw,
    main,
    make_example,
)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_answer_matches_pixels(size):
    example = make_example(Mixture(sizes=(size,), lines=(1000, 1000)), 3)
    pixels = np.asarray(draw(example.scene))
    assert pixels.shape == (size * CELL, size * CELL, 3)
    assert len(example.lines) == size * size * len(ATTRIBUTES)
    for line in example.answer.splitlines():
        cell, attribute, value = line.split()
        row, column = int(cell[1]) - 1, "ABCD".index(cell[0])
        area = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        if attribute == "ground":
            assert tuple(area[3, 3]) == GROUNDS[value]
        if attribute == "mark":
            half = CELL // 2
            edges = {
                "top": area[0, half],
                "right": area[half, -1],
                "bottom": area[-1, half],
                "left": area[half, 0],
            }
            marked = [edge for edge, pixel in edges.items() if tuple(pixel) == MARK_COLOUR]
            assert marked == ([] if value == "none" else [value])
        if attribute == "ink":
            distance = {
                name: np.abs(area.astype(int) - colour).sum(-1).min()
                for name, colour in INKS.items()
            }
            assert min(distance, key=lambda name: distance[name]) == value


def test_digit_is_its_class():
    from sklearn.datasets import load_digits

    classes = load_digits().target
    scene = make_example(Mixture(sizes=(4,)), 0).scene
    for row in range(4):
        for column in range(4):
            assert scene.values[row][column]["digit"] == str(classes[scene.glyphs[row][column]])


def test_no_pair_twice_and_counts():
    mixture = Mixture(sizes=(2, 3), lines=(4, 20), filler=(2, 5), attributes=("ink", "digit"))
    for index in range(50):
        example = make_example(mixture, index)
        pairs = [(cell, attribute) for cell, attribute, _ in example.lines]
        assert len(set(pairs)) == len(pairs) <= 20
        assert {attribute for _, attribute in pairs} <= {"ink", "digit"}
        assert 2 <= len(example.filler) <= 5
        assert example.prompt.split("\n")[-1] == "List ink digit"


def test_example_is_a_function_of_seed_and_index():
    assert make_example(Mixture(), 7) == make_example(Mixture(), 7)
    assert make_example(Mixture(), 7) != make_example(Mixture(), 8)
    assert make_example(Mixture(), 7) != make_example(Mixture(seed=1), 7)


def test_filler_changes_distance_alone():
    near, far = (make_example(Mixture(filler=(words, words)), 7) for words in (0, 40))
    assert (near.scene, near.lines) == (far.scene, far.lines)
    assert len(far.filler) == 40


def test_words_ahead_make_the_text_as_long_and_leave_image_and_question_together():
    plain, longer = (make_example(Mixture(ahead=(words, words)), 7) for words in (0, 40))
    assert (plain.scene, plain.lines, plain.prompt) == (longer.scene, longer.lines, longer.prompt)
    kinds = [part["type"] for part in longer.messages("a.png")[0]["content"]]
    assert kinds == ["text", "image", "text"]
    assert len(longer.messages("a.png")[0]["content"][0]["text"].split()) == 40
    assert [part["type"] for part in plain.messages("a.png")[0]["content"]] == ["image", "text"]


def test_parts_share_no_digit_image():
    train, heldout = digit_indices("train"), digit_indices("heldout")
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 1797
    for digits, indices in (("train", train), ("heldout", heldout)):
        glyphs = {
            g
            for i in range(20)
            for row in make_example(Mixture(digits=digits), i).scene.glyphs
            for g in row
        }
        assert glyphs <= set(indices)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"sizes": (5,)}, "sizes"),
        ({"lines": (3, 2)}, "lines"),
        ({"lines": (0, 2)}, "lines"),
        ({"ahead": (3, 2)}, "ahead"),
        ({"attributes": ("colour",)}, "colour"),
    ],
)
def test_bad_mixture_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Mixture(**wrong)


def test_written_data(tmp_path):
    main(tmp_path / "a", count=5, mixture=Mixture(sizes=(2,)))
    main(tmp_path / "b", count=5, mixture=Mixture(sizes=(2,)))
    names = sorted(
        path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()
    )
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for line in (tmp_path / "a" / "data.jsonl").read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (tmp_path / "a" / user["content"][0]["image"]).is_file()
        assert assistant["content"].endswith("\n")
    with pytest.raises(FileExistsError):
        main(tmp_path / "a", count=5)
