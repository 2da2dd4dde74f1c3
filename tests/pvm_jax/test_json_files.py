"""JSON files of every kind give the same records; a broken one is refused with what to do."""

import gzip
import json
import os

import pytest

from pvm_jax.data.conversations import open_conversations, stored_files


def turn(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


LINES = [json.dumps({"messages": [turn("user", f'{n}? [{{\\"')], "n": n}) for n in range(4)]


def write_files(folder):
    """The same four records in every kind of JSON file."""
    text = "\n".join(LINES)
    (folder / "a.jsonl").write_text(text)
    (folder / "windows.json").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (folder / "array.json").write_text(json.dumps(list(map(json.loads, LINES)), indent=2) + "\n")
    (folder / "bom.json").write_bytes(b"\xef\xbb\xbf [" + ",".join(LINES).encode() + b"]")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "array.json.gz").write_bytes(gzip.compress((folder / "array.json").read_bytes()))
    (folder / "parts").mkdir()
    for number in (0, 1):
        half = "\n".join(LINES[2 * number : 2 * number + 2])
        (folder / "parts" / f"{number}.jsonl").write_text(half)


def test_every_json_file_gives_the_same_records(tmp_path):
    write_files(tmp_path)
    expected = [json.loads(line)["messages"] for line in LINES]
    opened = {
        str(path): open_conversations(path)
        for path in [*tmp_path.glob("*.*"), tmp_path / "parts", tmp_path / "parts" / "*.jsonl"]
    }
    opened["**"] = open_conversations(tmp_path / "**" / "[01].jsonl")
    opened["list"] = open_conversations(
        [tmp_path / "parts/0.jsonl", str(tmp_path / "parts/1.jsonl")]
    )
    assert len(opened) == 10
    for name, conversations in opened.items():
        assert [conversations[index] for index in (3, 0, 2, 1)] == [
            expected[index] for index in (3, 0, 2, 1)
        ], name
        assert conversations.columns(2) == {"n": 2}
    assert opened[str(tmp_path / "array.json")].where(2).endswith("array.json[2]")
    assert opened["list"].where(2) == f"{tmp_path}/parts/1.jsonl:1"
    parts = [tmp_path / "parts" / f"{number}.jsonl" for number in (0, 1)]
    assert stored_files(tmp_path / "**" / "[01].jsonl") == parts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[" + LINES[0].encode(), r"a.json\[1\]: an array must hold .* cut off"),
        ("a.json", b"[" + LINES[0].encode() + b", 3]", r"a.json\[1\]: an array must hold objects"),
        ("a.json", b"[{} {}]", "an array must hold objects, commas between them"),
        ("a.json", b"[[{}]]", "an array must hold objects"),
        ("a.json", b"[{}] x", "an array must hold objects"),
        ("a.json", b"[]", "is empty"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "a.jsonl.gz cannot be unpacked"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd123", "compressed by zstd: unpack it, or use gzip"),
        ("a.jsonl", b"{\n}", r"a.jsonl:1: .*: a line is one record \(an array is a .json file\)"),
        ("a.jsonl", b'{"messages": "\xff"}', "a.jsonl:1: it is no JSON in UTF-8"),
    ],
)
def test_a_broken_json_file_is_refused_with_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_conversations(tmp_path / name)[0]


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="is no regular file"):
        open_conversations(tmp_path / "pipe.jsonl")


@pytest.mark.parametrize(
    "name", ["b.json", "b.JSONL", "b.json.gz", "b.jsonl.zst", "b.csv", "b.arrow"]
)
def test_a_directory_of_which_a_part_would_not_be_read_is_refused(tmp_path, name):
    for kept in ("a.jsonl", "dataset_info.json", ".b.json", "b.png", "b.json.txt", name):
        (tmp_path / kept).write_text(LINES[0])
    with pytest.raises(
        ValueError, match=rf"has {name}, which .* its \*.jsonl files: give a pattern \('"
    ):
        open_conversations(tmp_path)
    assert len(open_conversations(tmp_path / "*.jsonl")) == 1
    (tmp_path / name).unlink()
    assert len(open_conversations(tmp_path)) == 1
