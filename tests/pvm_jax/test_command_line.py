"""`python -m pvm_jax generate`: one question, a chat, a file of questions."""

import io
import json
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from convert.hf_to_orbax import convert
from demo.checkpoint import write_assets
from demo.task import Mixture, draw, make_example
from pvm_jax.__main__ import main
from pvm_jax.checkpoint.store import load, save
from pvm_jax.data.processor import Processor
from pvm_jax.data.side_files import read_stop_tokens
from pvm_jax.model.qwen3_vl import Qwen3VL
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """One layer with a silent branch, untrained; it reads the demo's tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny.randomized(tiny.cut(write_assets(folder / "hf").with_pvm((0,), 32)))
    with_gate(model, 0)
    save(folder / "checkpoint", model, assets=folder / "hf")
    return folder / "checkpoint"


def with_gate(model: Qwen3VL, gate: float) -> None:
    for branch in model.pvm.values():
        branch.gate_alpha[...] = jnp.full(1, gate)


@pytest.mark.slow  # of the shipped model it is shown in test_examples.py, of the command below
def test_the_command_line_reads_a_real_image(tmp_path, capsys):
    """The shipped model lists a grid of digits that it was not trained on; most of what it says is
    there."""
    demo_checkpoint = tmp_path / "checkpoint"
    convert(Path(__file__).parents[2] / "demo" / "base", demo_checkpoint)
    scene = make_example(Mixture(sizes=(2,), digits="heldout", seed=5), 0).scene
    draw(scene).save(tmp_path / "grid.png")
    arguments = [
        "generate",
        "--checkpoint",
        str(demo_checkpoint),
        "--image",
        str(tmp_path / "grid.png"),
    ]
    main([*arguments, "--max-new-tokens", "48", "List ground mark ink digit"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) >= 8
    right = [len(words) == 3 and scene.value(words[0], words[1]) == words[2] for words in lines]
    assert sum(right) >= 0.75 * len(lines)
    assert read_stop_tokens(demo_checkpoint)


def _line(index: int, text: str = "List ground", **part) -> str:
    image = {"type": "image", "image": f"{index}.png"} | part
    content = [image, {"type": "text", "text": text}]
    answer = {"role": "assistant", "content": "what it should say"}
    messages = [{"role": "user", "content": content}, answer]
    return json.dumps({"id": f"q{index}", "messages": messages, "solution": 7}) + "\n"


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Three pictures, and questions.jsonl about them."""
    folder = tmp_path_factory.mktemp("questions")
    for index in range(3):
        draw(
            make_example(Mixture(sizes=(1 + index % 2,), digits="heldout", seed=index), 0).scene
        ).save(folder / f"{index}.png")
    (folder / "questions.jsonl").write_text("".join(_line(index) for index in range(3)))
    return folder


def test_a_file_of_questions_is_answered_and_resumed(
    checkpoint, questions, tmp_path, monkeypatch, capsys, refused
):
    """Two samples a line. Started again behind a torn line, with other batches, the file is what it
    was."""
    output = tmp_path / "answers.jsonl"
    arguments = [
        "generate",
        "--checkpoint",
        str(checkpoint),
        "--input",
        str(questions / "questions.jsonl"),
    ]
    arguments += [
        "--output",
        str(output),
        "--max-new-tokens",
        "6",
        "--num-samples",
        "2",
        "--temperature",
        "1",
    ]
    decode = Processor.decode
    monkeypatch.setattr(
        Processor, "decode", lambda *args: "“\u2028" + decode(*args)
    )  # a line's end to some, but not to JSON
    main([*arguments, "--batch-size", "2"])
    written = output.read_bytes()
    lines = [json.loads(line) for line in written.split(b"\n")[:-1]]
    assert re.search(r"3 answered: \d+ tokens in .* holds all 3", capsys.readouterr().err)
    assert [(line["source"], line["index"], len(line["answers"])) for line in lines] == [
        (f"{questions / 'questions.jsonl'}:{index + 1}", index, 2) for index in range(3)
    ]
    assert all(answer for line in lines for answer in line["answers"])
    assert [line["record"] for line in lines] == [
        {"id": f"q{index}", "solution": 7} for index in range(3)
    ]
    assert {line["question"] for line in lines} == {"List ground"}
    for torn in (b"\n", "“".encode()[:2]):  # the second in the middle of a character
        output.write_bytes(written[: written.index(torn, written.index(b"\n") + 1) + len(torn) - 1])
        main([*arguments, "--batch-size", "1"])
        assert output.read_bytes() == written
    for other in (["--pvm", "off"], ["--seed", "1"], ["--temperature", "0.5"]):
        said = refused(main, [*arguments, *other])
        assert f"answers.jsonl:1 was answered with another {other[0][2:]}" in said
    for foreign in (
        b'{"index": 7}\n',
        b'{"index": 7}',
        (questions / "questions.jsonl").read_bytes(),
    ):
        output.write_bytes(foreign)
        assert "answers.jsonl:1 answers no conversation of" in refused(main, arguments)
        assert output.read_bytes() == foreign


def test_without_the_branch_and_on_two_devices(checkpoint, questions, tmp_path, capsys):
    """`--pvm off` says what the base does, whose branch is silent; `--tensor 2` what one device
    does."""
    model = load(checkpoint)
    with_gate(model, 4)
    save(tmp_path / "loud", model, assets=checkpoint)
    ask = [
        "generate",
        "--image",
        str(questions / "0.png"),
        "--max-new-tokens",
        "12",
        "List ground",
        "--checkpoint",
    ]
    said = []
    shared = ["loud", "--tensor", "2", "--max-new-tokens", "1"]  # more are shown by test_model.py
    for more in (["loud"], shared, ["loud", "--pvm", "off"], [checkpoint]):
        main([*ask, str(tmp_path / more[0]), *more[1:]])
        said.append(capsys.readouterr().out)
    assert said[0].startswith(said[1].strip())
    assert said[1].strip()
    assert said[0] != said[2] == said[3]


def test_a_file_of_questions_is_refused_by_its_line(checkpoint, questions, tmp_path, refused):
    (questions / "bad.jsonl").write_text(_line(0) + _line(1, image="nowhere.png"))
    arguments = [
        "generate",
        "--checkpoint",
        str(checkpoint),
        "--input",
        str(questions / "bad.jsonl"),
    ]
    more = ["--output", str(tmp_path / "bad.jsonl"), "--max-new-tokens", "2"]
    assert re.search(r"bad\.jsonl:2.*nowhere\.png", refused(main, [*arguments, *more]))


def test_a_chat_takes_images_in_later_turns(checkpoint, questions, monkeypatch, capsys):
    """The first answer is the single question's; a refused line leaves the chat going; a later turn
    brings an image."""
    arguments = [
        "generate",
        "--checkpoint",
        str(checkpoint),
        "--image",
        str(questions / "0.png"),
    ]
    arguments += ["--max-new-tokens", "12"]  # as another test: compiled once
    main([*arguments, "List ground"])
    single = capsys.readouterr().out
    lines = [
        "List ground",
        "/image nowhere.png",
        "/what",
        f"/image {questions / '1.png'}",
        "List mark",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    main([*arguments, "--chat"])
    said = capsys.readouterr()
    assert said.out.startswith(single)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([lines[0], lines[-1]])))
    main([*arguments, "--chat"])
    assert said.out != capsys.readouterr().out  # the second answer is about the second image
    assert "nowhere.png" in said.err
    assert "/what is no command" in said.err
    assert said.err.count("first after") == 2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ([], "--chat and --input, got none"),
        (["What?", "--chat"], "got question and chat"),
        (["--input", "a.jsonl"], "--output go together"),
        (["What?", "--num-samples", "2"], "--num_samples goes with --input"),
        (
            ["--input", "a.jsonl", "--output", "b.jsonl", "--num-samples", "2"],
            "--num_samples needs a --temperature above 0",
        ),
        (["What?", "--tensor", "9"], "tensor must be 1 to 8"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(checkpoint, refused, wrong, named):
    assert named in refused(main, ["generate", "--checkpoint", str(checkpoint), *wrong])


def test_the_command_line_names_what_is_wrong(checkpoint, tmp_path, refused):
    ask = ["generate", "--checkpoint", str(checkpoint), "What?"]
    assert "no.png" in refused(main, [*ask, "--image", str(tmp_path / "no.png")])
    assert "is no LoRA adapter" in refused(main, [*ask, "--lora", str(checkpoint)])
    nowhere = ["generate", "--checkpoint", str(tmp_path / "nowhere"), "What?"]
    assert "nowhere" in refused(main, nowhere)
