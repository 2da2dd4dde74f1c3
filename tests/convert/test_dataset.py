"""`convert.dataset`: what it writes, what it rejects and says of it, and that a failed or
interrupted run leaves nothing."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert import dataset, shard_writer
from convert.dataset import convert
from convert.summary import histogram
from demo.mixed_images import make_processor
from pvm_jax.data.conversations import open_conversations, size_of
from pvm_jax.data.image_files import read_image
from pvm_jax.data.processor import Processor
from tests.full_disk import full_disk
from train.config import Bucket, DataConfig
from train.data import sizes
from train.data.loading import load_training_data
from train.data.sizes import measure


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor"))[0]


def picture(folder, name, side=40):
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(folder / name)
    return {"type": "image", "image": name}


def conversation(*content, answer="List navy"):
    return {
        "messages": [
            {"role": "user", "content": list(content)},
            {"role": "assistant", "content": answer},
        ]
    }


def write(folder: Path, records) -> Path:
    file = folder / "data.jsonl"
    file.write_text(
        "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
    )
    return file


@pytest.fixture
def good(tmp_path):
    """Thirty conversations: with an image, with two and a video, with none."""
    records = []
    for number in range(10):
        image, other = (picture(tmp_path, f"{number}_{k}.png", 40 + 30 * number) for k in range(2))
        video = {"type": "video", "video": [image["image"]] * 2, "fps": 2}
        text = {"type": "text", "text": f"List {number}"}
        records += [
            conversation(image, text),
            conversation(image, text, other, video),
            conversation(text),
        ]
    return write(tmp_path, records)


def shown(conversations):
    """All messages, pictures as their pixels."""

    def plain(value):
        if isinstance(value, dict) and value.get("type") == "image":
            return np.asarray(read_image(value["image"])).tobytes()
        if isinstance(value, dict) and value.get("type") == "video":
            return [np.asarray(read_image(frame)).tobytes() for frame in value["video"]], value[
                "fps"
            ]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return [plain(list(messages)) for messages in conversations]


def test_shards_give_the_conversations_of_their_source(
    good, tmp_path, processor, monkeypatch, capsys
):
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 4000)
    monkeypatch.setattr(dataset, "CHUNK", 1)
    before = shown(open_conversations(good))
    convert(good, tmp_path / "shards", processor, threads=2)
    for image in tmp_path.glob("*.png"):
        image.unlink()
    shards = open_conversations(tmp_path / "shards")
    assert shown(shards) == before
    files = sorted((tmp_path / "shards").glob("*.array_record"))
    assert len(files) > 2
    assert shards.where(0) == f"{files[0]}:0"
    assert shards.where(29).startswith(f"{files[-1]}:")
    assert [tuple(size) for size in shards.sizes] == [
        processor.count(messages) for messages in shards
    ]
    said = capsys.readouterr().out
    assert "30 examples with 50 images" in said
    assert "patches a token" in said
    assert not (tmp_path / "shards.rejected.jsonl").exists()


def test_training_measures_shards_only_if_another_processor_did(
    good, tmp_path, processor, monkeypatch
):
    convert(good, tmp_path / "shards", processor)
    convert(good, tmp_path / "unmeasured")
    template = processor.chat_template.replace("Picture ", "Image ")
    other = Processor(
        processor.tokenizer, template, processor.image_settings, processor.video_settings
    )
    config = None

    def report(path, processor):
        data = DataConfig(str(path), [Bucket(4096, 8192)], videos=True)
        return load_training_data(data, processor, config, batch_size=1).report

    measured = []
    monkeypatch.setattr(
        sizes, "measure", lambda source, *_, **__: measured.append(source.path.name) or source.sizes
    )
    assert "Measured here" not in report(tmp_path / "shards", processor)
    assert measured == []
    assert f"another tokenizer or image settings: {tmp_path / 'shards'}" in report(
        tmp_path / "shards", other
    )
    assert measured == ["shards"]
    monkeypatch.undo()
    assert report(tmp_path / "unmeasured", processor) == report(tmp_path / "shards", processor)


def bad_records(folder):
    (folder / "broken.png").write_bytes((folder / "fine.png").read_bytes()[:-200])
    (folder / "text.png").write_text("no image")
    text = {"type": "text", "text": "List"}
    long = conversation({"type": "text", "text": "road " * 200})
    video = {"type": "video", "video": ["fine.png"] * 2}
    large = conversation(text)
    large["messages"][0]["number"] = 2**70
    return {
        "0.png does not exist": conversation({"type": "image", "image": "0.png"}, text),
        "broken.png cannot be decoded": conversation(
            {"type": "image", "image": "broken.png"}, text
        ),
        "text.png cannot be read as an image": conversation(
            {"type": "image", "image": "text.png"}, text
        ),
        "2 image parts for the 1 pictures": conversation({"type": "image"}, {"type": "image"})
        | {"images": ["fine.png"]},
        "there is no assistant turn": {"messages": [{"role": "user", "content": "?"}]},
        "Expecting": '{"messages": ',
        "unknown part type 'audio'": conversation({"type": "audio", "audio": "a.wav"}),
        "<|im_end|>": conversation({"type": "text", "text": "<|im_end|>"}),
        "too long: 212 tokens": long,
        "timestamps must be seconds, one for each frame, got 2": conversation(
            video | {"timestamps": 2}
        ),
        "timestamps must be seconds, one for each frame, got [None, 1]": conversation(
            video | {"timestamps": [None, 1]}
        ),
        "content must be a string": {
            "messages": [{"role": "user", "content": 5}, long["messages"][1]],
            "images": ["fine.png"],
        },
        "'bytes' must be bytes, got str": conversation(
            {"type": "image", "image": {"bytes": "abc"}}, text
        ),
        "'bytes' must be bytes, got list": conversation(
            {"type": "image", "image": {"bytes": [1, 2]}}, text
        ),
        "not valid Unicode": conversation({"type": "text", "text": "\ud800"}),
        "nothing reads the key 'number'": large,
        "nested too deeply": '{"messages": ' + "[" * 100_000,
    }


def test_every_rejected_example_is_reported_with_its_reason_and_the_rest_written(
    tmp_path, processor
):
    fine = conversation(picture(tmp_path, "fine.png", 200), {"type": "text", "text": "List"})
    bad = bad_records(tmp_path)
    file = write(tmp_path, [fine, *bad.values(), fine])
    convert(file, tmp_path / "shards", processor, max_tokens=200, max_rejected=0.9, threads=3)
    assert len(open_conversations(tmp_path / "shards")) == 2
    report = [
        json.loads(line) for line in (tmp_path / "shards.rejected.jsonl").read_text().splitlines()
    ]
    assert [entry["example"] for entry in report] == [
        f"{file}:{line}" for line in range(2, 2 + len(bad))
    ]
    for entry, reason in zip(report, bad, strict=True):
        assert reason in entry["reason"]
        assert "data.jsonl" not in entry["reason"]


def test_without_a_processor_images_are_checked_too(tmp_path):
    fine = conversation(picture(tmp_path, "fine.png", 200), {"type": "text", "text": "List"})
    records = list(bad_records(tmp_path).values())
    convert(write(tmp_path, [fine, *records]), tmp_path / "shards", max_rejected=0.9)
    assert len(open_conversations(tmp_path / "shards")) == 4  # what needs the tokenizer passes


def test_training_that_reads_a_bad_record_names_it(tmp_path, processor):
    picture(tmp_path, "fine.png", 200)
    bad = bad_records(tmp_path)
    for converted_alone in (
        "too long: 212 tokens",
        "broken.png cannot be decoded",
    ):
        del bad[converted_alone]
    for reason, record in bad.items():
        conversations = open_conversations(write(tmp_path, [record]))
        with pytest.raises(ValueError, match=f"data.jsonl:1: .*{re.escape(reason)}"):
            measure(conversations, partial(size_of, count=processor.count), 1, videos=False)


def test_more_rejects_than_allowed_are_an_error_and_leave_the_report_alone(tmp_path, processor):
    fine = conversation(picture(tmp_path, "fine.png", 200), {"type": "text", "text": "List"})
    file = write(tmp_path, [fine] * 97 + ["{"] * 3)
    with pytest.raises(
        ValueError, match=r"3 of 100 examples were rejected.*share of 0.02.*shards.rejected.jsonl"
    ):
        convert(file, tmp_path / "shards", processor, max_rejected=0.02)
    assert len((tmp_path / "shards.rejected.jsonl").read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir() if "shards" in path.name) == [
        "shards.rejected.jsonl"
    ]
    convert(file, tmp_path / "shards", processor, max_rejected=0.03)
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(file, tmp_path / "shards", processor)


def test_the_most_frequent_reasons_are_said_with_their_counts(tmp_path, processor, capsys):
    fine = conversation({"type": "text", "text": "List"})
    missing = [conversation({"type": "image", "image": f"{n}.png"}) for n in range(9)]
    kinds = [
        *({"messages": []}, {"messages": 3}, {"messages": [3]}, [], {"messages": [fine]}),
        fine | {"audios": ["a"]},
    ]
    file = write(tmp_path, [fine, *missing, *kinds, *["{"] * 4])
    convert(file, tmp_path / "shards", processor, max_rejected=1)
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if "19 examples rejected" in line) + 1
    counts = [line.split(":")[0].strip() for line in lines[start : start + 6]]
    assert (counts[0], counts[1], len(counts)) == ("9", "4", 6)
    assert lines[start].endswith("0.png does not exist")
    assert lines[start + 5].endswith("for other reasons")
    assert sum(map(int, counts)) == 19
    with pytest.raises(ValueError, match=r"(?s)the reason of each is in .*\n +9: .*\n +4: "):
        convert(file, tmp_path / "none", processor)


def test_several_files_become_one_directory(tmp_path, processor):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [conversation({"type": "text", "text": f"List {name}"})])
    dataset.main([str(tmp_path / "*" / "data.jsonl"), str(tmp_path / "shards")])
    shards = open_conversations(tmp_path / "shards")
    assert [messages[0]["content"][0]["text"] for messages in shards] == ["List a", "List b"]


def test_what_an_interrupted_run_leaves_does_not_open(good, tmp_path, monkeypatch):
    """The folder as it is at every record that is written, as `kill -9` would leave it."""
    write_record, seen = shard_writer.ShardWriter.write, []

    def look(writer, record):
        with pytest.raises(ValueError, match="is no directory of conversations"):
            open_conversations(writer.directory)
        seen.append(writer.directory)
        write_record(writer, record)
        if len(seen) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(shard_writer.ShardWriter, "write", look)
    with pytest.raises(KeyboardInterrupt):
        convert(good, tmp_path / "shards", threads=2)
    assert not seen[0].exists()
    assert not (tmp_path / "shards").exists()


def test_a_shard_that_was_cut_off_is_refused(good, tmp_path):
    convert(good, tmp_path / "shards")
    index = tmp_path / "shards" / "dataset.json"
    index.write_text(index.read_text().replace('"examples": 30', '"examples": 31'))
    with pytest.raises(ValueError, match=r"the shards hold 30 records, dataset.json says 31"):
        open_conversations(tmp_path / "shards")
    (tmp_path / "shards" / "shard-00000.array_record").unlink()
    with pytest.raises(ValueError, match="names files that are missing"):
        open_conversations(tmp_path / "shards")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset.json", b"{}", "dataset.json: shards is missing"),
        ("dataset.json", b'{"shards": [{"file": "../a", "examples": 1}]}', "of this directory"),
        ("sizes.npy", b"x", "sizes.npy is no whole array"),
        ("sizes.npy", None, r"sizes.npy must hold 30 pairs of int32, .* got \[2\] of float64"),
        ("shard-00000.array_record", b"x" * 70_000, "array_record is no whole shard"),
    ],
)
def test_a_damaged_file_of_shards_is_named(good, tmp_path, processor, name, content, message):
    convert(good, tmp_path / "shards", processor)
    file = tmp_path / "shards" / name
    if content is None:
        np.save(file, np.zeros(2))
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_conversations(tmp_path / "shards")


def test_the_command_says_what_is_wrong(tmp_path, refused):
    said = refused(dataset.main, [str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert "nowhere: no such file or directory" in said
    said = refused(dataset.main, ["a", "b", "--max-tokens", "100"])
    assert "--max_tokens needs --checkpoint" in said
    assert "--threads must be at least 1" in refused(dataset.main, ["a", "b", "--threads", "0"])
    assert "is a share, 0 to 1" in refused(dataset.main, ["a", "b", "--max_rejected", "-1"])


def test_a_full_disk_is_named_and_leaves_nothing(good, tmp_path, refused):
    with full_disk():
        said = refused(dataset.main, [str(good), str(tmp_path / "shards")])
    assert said.startswith(f"error: {tmp_path / 'shards'} cannot be written (")
    assert "File too large" in said
    assert not [path for path in tmp_path.iterdir() if "shards" in path.name]


def test_histogram_counts_by_powers_of_two():
    lines = histogram([3, 4, 5, 8, 8, 64])
    assert [line.split()[3:5] for line in lines] == [
        ["4:", "2"],
        ["8:", "3"],
        ["16:", "0"],
        ["32:", "0"],
        ["64:", "1"],
    ]
