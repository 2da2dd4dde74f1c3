"""The command, from a checkpoint and a file of conversations to a page that needs no network; and
what it must fit in."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from demo.checkpoint import make_config, make_tokenizer, write_assets
from demo.task import Mixture, draw, make_example
from pvm_jax import Batch, Processor, abstract_model, load, save
from pvm_jax.__main__ import main
from pvm_jax.measure import dilution, lens, reading
from pvm_jax.measure.accuracy import prompt_of, write
from pvm_jax.measure.decision import FinalAnswer
from pvm_jax.measure.report import figures
from pvm_jax.measure.report.command import Request, make_task
from pvm_jax.measure.report.sections import MEASUREMENTS
from pvm_jax.measure.report.sections import cost as cost_section
from pvm_jax.measure.report.sections import looked as looked_section
from pvm_jax.measure.report.sections.decision import measure_decision
from tests import tiny
from tests.close import assert_close
from tests.tiny import randomized


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The demo's model with one layer, an open branch, and nothing learned."""
    return save_random(tmp_path_factory.mktemp("tiny"), 0.1)


def save_random(folder: Path, scale: float, layers: int = 1) -> Path:
    """A checkpoint in `folder`; another scale of its parameters makes another model."""
    config = write_assets(folder / "assets").with_pvm((0,), 32)
    text = {"hidden_size": 64, "intermediate_size": 64}
    config = tiny.cut(config, layers=layers, text=text, vision={"out_hidden_size": 64})
    save(folder / "checkpoint", randomized(config, scale), assets=folder / "assets")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three conversations, the second about two pictures, one of them not square."""
    folder = tmp_path_factory.mktemp("data")
    conversations = []
    for number in range(3):
        example = make_example(Mixture(sizes=(2,), lines=(2, 4), digits="heldout"), number)
        draw(example.scene).save(folder / f"{number}.png")
        messages = example.messages(f"{number}.png")
        if number == 1:
            Image.new("RGB", (96, 32), (200, 40, 40)).save(folder / "wide.png")
            wide = {"type": "image", "image": "wide.png", "boxes": [[0, 0, 32, 32]]}
            messages[0]["content"].insert(1, wide)
        conversations.append(messages)
    return write_data(folder / "data.jsonl", conversations)


def write_data(path: Path, conversations: Sequence[Sequence[Mapping]]) -> Path:
    path.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    )
    return path


def read_data(path: Path) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def arguments(checkpoint: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "measure",
        "--checkpoint",
        str(checkpoint),
        "--data",
        str(data),
        "--output",
        str(out),
        *more,
    ]


def check_origin_and_samples(content: Mapping, page: str) -> None:
    origin = content["origin"]
    assert list(origin)[:5] == ["date", "version", "command", "device", "conversations"]
    assert re.fullmatch(
        r"float32, backbone [0-9a-f]{16}, branch [0-9a-f]{16}", origin["with the branch"]
    )
    assert re.fullmatch(r"float32, backbone [0-9a-f]{16}", origin["without"])
    assert origin["conversations"].startswith("3, identity ")
    assert origin["command"].startswith(("python -m pytest", "pytest", "-c"))  # as it was typed
    assert all(escape(value) in page for value in origin.values())
    samples = content["sections"]["samples"]["samples"]
    assert [list(one["answers"]) for one in samples] == [["true", "with the branch", "without"]] * 3
    assert page.count('src="data:image/png') == 4  # one conversation shows two images


def test_one_command_writes_a_page_that_stands_alone(
    checkpoint, data, tmp_path, monkeypatch, capsys
):
    """All measurements; every figure has numbers and is drawn; nothing is fetched from
    anywhere."""
    monkeypatch.setattr(cost_section, "cost", partial(cost_section.cost, rounds=2))
    options = ["--fillers", "0", "10", "--max-new-tokens", "6", "--looks", "3"]
    options += ["--batch-size", "3"]  # all conversations: every batch has the same shape
    main(arguments(checkpoint, data, tmp_path, *options))
    said = capsys.readouterr().out
    assert f"The report: {tmp_path / 'report.html'}" in said
    # Random weights guess.
    assert "at the floor: at no number of tokens of filler is any model right more often" in said
    assert "10 tokens of filler ahead of the image: with the branch minus without, pai" in said

    page = (tmp_path / "report.html").read_text()
    fetched = re.findall(
        r"""(?:src|href)\s*=\s*["']([^"']*)|url\(\s*["']?([^"')]*)|@import""", page
    )
    assert fetched
    assert all((a or b).startswith(("#", "data:")) for a, b in fetched)
    assert "<script" not in page
    assert 'name="viewport"' in page

    content = json.loads((tmp_path / "report.json").read_text())
    assert list(content["sections"]) == list(MEASUREMENTS)
    figures_of = {key: section["figures"] for key, section in content["sections"].items()}
    drawn = [key for panels in figures_of.values() for key in panels]
    assert page.count("<figure ") == page.count("<svg ") == len(drawn) == len(set(drawn))
    files = {file.name for file in (tmp_path / "figures").iterdir()}
    assert files == {f"{key}.{kind}" for key in drawn for kind in ("svg", "pdf", "png")}
    check_origin_and_samples(content, page)
    for key, panels in figures_of.items():
        for name, panel in panels.items():
            if key == "looked":
                branch, decoder = (sum(np.sum(m) for m in maps) for maps in panel["maps"].values())
                assert_close(branch, 1, 1e-5)  # rounded in the report
                assert 0 < decoder < 1
            else:
                assert panel["series"], name
                for series in panel["series"].values():
                    assert len(series["x"]) == len(series["mean"]) > 0, name
                    assert all(value is not None for value in series["mean"]), name
    for maps in figures_of["looked"]["looked_1"]["maps"].values():
        assert [np.shape(m) for m in maps] == [(2, 2), (1, 3)]
    _, weights, _, memory, _ = content["sections"]["cost"]["table"]
    assert weights[1] != weights[2]
    # Sixteen columns, each a key and a value of 32 numbers and a segment id.
    assert memory[1:] == ["4.06 KiB", "0"]
    assert set(figures_of["evidence"]) == {"evidence_image", "evidence_marked"}
    assert set(figures_of["dilution"]["dilution"]["series"]) >= {"with the branch", "without"}
    assert set(figures_of["dependency"]["dependency"]["series"]) == {
        "with the branch, image hidden",
        "with the branch, image hidden from the branch alone",
        "with the branch, image hidden from the decoder alone",
        "without, image hidden",
    }
    filler = figures_of["ablations"]["filler"]["series"]
    assert set(filler) == {"with the branch", "without", "another image"}
    assert figures_of["ablations"]["ahead"]["series"]["without"]["x"] == [0, 10]


def test_only_what_is_asked_for_is_measured_and_compared_with_another_checkpoint(
    data, tmp_path, monkeypatch, capsys
):
    """Whatever the other one's folder is called. Another test looks at what is drawn."""
    drawn = figures.Drawing("<svg></svg>", b"", b"")
    monkeypatch.setattr("pvm_jax.measure.report.page.draw", lambda panel: drawn)
    checkpoint = save_random(tmp_path / "first", 0.1, layers=2)
    assert save_random(tmp_path, 0.2, layers=2) == tmp_path / "checkpoint"
    monkeypatch.chdir(tmp_path)
    main(arguments(checkpoint, data, tmp_path, "--only", "lens", "--against", "checkpoint"))
    sections = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert list(sections) == ["lens"]
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("3 conversations, 2 models (checkpoint, against checkpoint), 1 measure")
    assert "1/1 measured lens" in said
    series = sections["lens"]["figures"]["lens_kl"]["series"]
    assert list(series) == ["checkpoint", "against checkpoint"]
    assert series["checkpoint"]["mean"] != series["against checkpoint"]["mean"]
    main(
        arguments(
            checkpoint,
            data,
            tmp_path / "shared",
            "--only",
            "lens",
            "--against",
            "checkpoint",
            "--tensor",
            "2",
        )
    )
    again = json.loads((tmp_path / "shared" / "report.json").read_text())["sections"]["lens"][
        "figures"
    ]["lens_kl"]["series"]
    for name, one_device in series.items():
        assert_close(np.array(again[name]["mean"]), np.array(one_device["mean"]), 1e-5)


def test_early_decisions_are_of_the_answers_that_have_a_final_one(checkpoint, data):
    """Each model's own; where none has one, words say so, and nothing is drawn."""
    asked, model = request(checkpoint, data, max_new_tokens=6), load(checkpoint)
    task = replace(make_task(asked, Processor.from_pretrained(checkpoint)), stop_tokens=())
    none = measure_decision({"it": model}, task)
    assert not none.panels
    assert none.facts == ["0 of the 3 answers of it have a final answer, behind '<answer>'"]
    texts = iter([FinalAnswer(3, 4), None, FinalAnswer(4, 5)])
    found = measure_decision({"it": model}, replace(task, final=lambda ids: next(texts)))
    assert found.panels[0].series[0].y[-1].mean == 1  # all of the text is there
    assert found.facts[0].startswith("2 of the 3 answers of it have a final answer")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--fillers", "-5", "9"], "--fillers must be 0 or more, got -5"),
        (["--limit", "1"], r"data\.jsonl: exchanging pictures takes at least two conversations"),
        (["--max-new-tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (
            ["--look-at", "0:1", "1-2"],
            "--look_at takes CONVERSATION:TOKEN, both counted from 0, .*; got '1-2'",
        ),
        (["--look-at", "3:0"], "--look_at 3:0: there are 3 conversations"),
        (
            ["--look-at", "0:4", "--max-new-tokens", "4"],
            "--look_at 0:4: .* an answer is written up to 4 tokens",
        ),
        (["--final-after", ""], "--final_after is the text that the final answer follows"),
        (["--branch", "nowhere"], "nowhere"),
        (["--tensor", "9"], "tensor must be 1 to 8"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(
    checkpoint, data, tmp_path, monkeypatch, refused, wrong, named
):
    monkeypatch.setattr(
        "pvm_jax.measure.report.command.measure", lambda *_: pytest.fail("measured")
    )
    assert re.search(named, refused(main, arguments(checkpoint, data, tmp_path, *wrong)))
    assert not (tmp_path / "report.html").exists()


def test_a_conversation_without_an_image_or_an_answer_is_named_by_its_line(
    checkpoint, data, tmp_path, refused
):
    user, assistant = (
        {"role": "user", "content": "List"},
        {"role": "assistant", "content": "A1 ink red\n"},
    )
    asks = read_data(data)[0][:-1]
    for messages, why in (
        ([user, assistant], "there is no image to look at"),
        ([user, assistant, *asks], "there is no image to look at"),
        (asks, "there is no assistant turn"),
    ):
        bad = write_data(data.with_name("bad.jsonl"), [*read_data(data), messages])
        said = refused(main, arguments(checkpoint, bad, tmp_path, "--only", "dilution"))
        assert f"bad.jsonl:4: {why}" in said


def request(checkpoint: Path, data: Path, **more) -> Request:
    rest = {
        "branch": None,
        "lora": None,
        "against": None,
        "dtype": None,
        "only": (),
        "limit": 9,
        "fillers": (0,),
        "looks": 0,
    }
    rest |= {"look_at": (), "max_new_tokens": None, "batch_size": 3, "tensor": 1}
    return Request(checkpoint=checkpoint, data=data, output=checkpoint, **rest | more)


def test_what_follows_the_last_answer_is_not_read(checkpoint, data):
    """A user turn with another image, unanswered."""
    processor, conversations = Processor.from_pretrained(checkpoint), read_data(data)
    open_ended = write_data(
        data.with_name("open.jsonl"), [[*one, *conversations[0][:-1]] for one in conversations]
    )
    for given, wanted in zip(
        *(make_task(request(checkpoint, file), processor).examples for file in (open_ended, data)),
        strict=True,
    ):
        np.testing.assert_array_equal(given.input_ids, wanted.input_ids)
        np.testing.assert_array_equal(given.pixel_values, wanted.pixel_values)
        prompt, _ = prompt_of(given)
        assert prompt.num_patches == given.num_patches


def test_looks_are_at_what_the_model_writes_itself(checkpoint, data, monkeypatch):
    """Not at the true answer: chosen tokens where they were asked for, its last where it stops
    before; else ever later ones."""
    processor, model, seen, looked = (
        Processor.from_pretrained(checkpoint),
        load(checkpoint),
        [],
        looked_section.looked,
    )
    monkeypatch.setattr(
        looked_section, "looked", lambda *given, **how: seen.append(given) or looked(*given, **how)
    )
    chosen = make_task(
        request(checkpoint, data, look_at=("2:1", "0:5"), max_new_tokens=6), processor
    )
    spread = make_task(request(checkpoint, data, looks=3, max_new_tokens=6), processor)
    written = write(model, chosen.examples, stop_tokens=(), max_new_tokens=6, rows=3).tokens
    stop = int(written[0][0])
    until = [*written[2], stop].index(stop)
    for task, stop_tokens, looks in (
        (chosen, (), [(2, 1), (0, 5)]),
        (chosen, (stop,), [(2, min(1, until)), (0, 0)]),
        (spread, (), [(0, 1), (1, 3), (2, 5)]),
    ):
        section = looked_section.measure_looks(
            {"checkpoint": model}, replace(task, stop_tokens=stop_tokens)
        )
        _, examples, columns = seen.pop()
        for (number, token), panel, example, (column,) in zip(
            looks, section.panels, examples, columns, strict=True
        ):
            prompt, true = prompt_of(task.examples[number])
            assert column == len(prompt.input_ids) + token
            own = written[number][: token + 1]
            np.testing.assert_array_equal(
                example.input_ids[: column + 1], [*prompt.input_ids, *own]
            )
            assert not np.array_equal(own, true[: token + 1])
            assert (
                panel.text
                == f"Token {token} of what it wrote in conversation {number}, both counted from 0."
            )


@pytest.mark.parametrize("there", ["a file", "a folder that takes none"])
def test_an_output_that_cannot_be_written_is_refused_before_it_measures(
    checkpoint, data, tmp_path, monkeypatch, refused, there
):
    monkeypatch.setattr(
        "pvm_jax.measure.report.command.measure", lambda *_: pytest.fail("measured")
    )
    (tmp_path / "file").touch()
    out = (
        tmp_path / "file" / "report" if there == "a file" else Path("/proc/self")
    )  # root may write to any other
    assert str(out) in refused(main, arguments(checkpoint, data, out, "--only", "lens"))


def test_without_matplotlib_it_says_what_to_install_before_it_measures(
    checkpoint, data, tmp_path, monkeypatch, refused
):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    monkeypatch.setattr(
        "pvm_jax.measure.report.command.measure", lambda *_: pytest.fail("measured")
    )
    said = refused(main, arguments(checkpoint, data, tmp_path, "--only", "lens"))
    assert "pip install 'pvm-jax[measure]'" in said


@pytest.mark.parametrize("measurement", [dilution, lens], ids=["dilution", "lens"])
def test_8192_tokens_are_measured_in_under_2_gib(measurement):
    """Compiled at the demo's size: arguments, results and all that the program holds in between."""
    config = make_config(make_tokenizer()).with_pvm((1, 2), 128)
    batch = Batch.empty(config, rows=1, length=8192, patches=64)
    graphdef, params = nnx.split(abstract_model(config))
    columns = np.zeros((1, 8000), np.int32)
    compiled = reading.run_program.lower(
        graphdef, nnx.as_pure(params), batch, columns, measurement.program, 256
    ).compile()
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert 2**20 < total < 2 * 2**30
