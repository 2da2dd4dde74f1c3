"""Every format of conversations on disk gives the same messages; what is wrong with a record is
said with its place."""

import io
import json
import sys

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pvm_jax.data import tables
from pvm_jax.data.conversations import open_conversations, stored_files
from pvm_jax.data.image_files import read_image


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def turn(role, *parts):
    return {
        "role": role,
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else part for part in parts
        ],
    }


IMAGE = {"type": "image"}
RECORDS = [
    *(
        {
            "messages": [turn("user", IMAGE, f"{n}?", IMAGE), turn("assistant", "red")],
            "shades": [n, n + 1],
        }
        for n in range(7)
    ),
    {
        "messages": [turn("user", "no picture"), turn("assistant", "none"), turn("user", "?")],
        "shades": [],
    },
]


def as_jsonl(folder):
    lines = []
    for number, record in enumerate(RECORDS):
        names = [f"{number}_{shade}.png" for shade in record["shades"]]
        for name, shade in zip(names, record["shades"], strict=True):
            (folder / name).write_bytes(png(shade))
        lines.append(json.dumps({"messages": record["messages"], "images": names}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def as_dataset():
    rows = [
        {
            "messages": record["messages"],
            "images": [{"bytes": png(shade), "path": f"{shade}.png"} for shade in record["shades"]],
        }
        for record in RECORDS
    ]
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


def as_parquet(folder):
    dataset = as_dataset()
    for number, rows in enumerate([range(5), range(5, 8)]):
        pq.write_table(
            dataset.select(rows).with_format("arrow")[:],
            folder / f"train-{number}.parquet",
            row_group_size=2,
        )
    return folder


def as_one_parquet_file(folder):
    as_dataset().to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def as_saved_dataset(folder):
    as_dataset().save_to_disk(folder, num_shards=2)
    return folder


FORMATS = [as_jsonl, as_parquet, as_one_parquet_file, as_saved_dataset]


def shown(messages):
    """Messages with each picture replaced by its shade of red."""

    def part(part):
        if part["type"] == "image":
            return np.asarray(read_image(part["image"]))[0, 0, 0]
        return part["text"]

    return [(message["role"], [part(p) for p in message["content"]]) for message in messages]


def expected(record):
    shades = iter(record["shades"])
    return [
        (
            message["role"],
            [
                next(shades) if part["type"] == "image" else part["text"]
                for part in message["content"]
            ],
        )
        for message in record["messages"]
    ]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_messages_in_any_order(tmp_path, write):
    conversations = open_conversations(write(tmp_path))
    assert len(conversations) == len(RECORDS)
    for index in [7, 0, 5, 4, 6, 1, 3, 2]:
        assert shown(conversations[index]) == expected(RECORDS[index]), index
    assert shown(conversations[-1]) == expected(RECORDS[-1])
    with pytest.raises(IndexError):
        conversations[8]


@pytest.mark.parametrize(
    ("write", "place"),
    [
        (as_jsonl, "data.jsonl:7"),
        (as_parquet, "train-1.parquet:1"),
        (as_one_parquet_file, "data.parquet:6"),
        (as_saved_dataset, "data-00001-of-00002.arrow:2"),
    ],
)
def test_a_record_is_named_by_its_file_and_place(tmp_path, write, place):
    conversations = open_conversations(write(tmp_path))
    assert conversations.where(6).endswith(f"/{place}")
    with pytest.raises(ValueError, match=f"{place}: wrong"), conversations.naming(6):
        raise ValueError("wrong")
    with pytest.raises(ValueError, match=f"{place}: KeyError: 'wrong'"), conversations.naming(6):
        raise KeyError("wrong")


def test_several_files_can_be_chosen_by_a_pattern(tmp_path):
    as_parquet(tmp_path)
    (tmp_path / "test-0.parquet").write_bytes(b"not read")
    assert len(open_conversations(tmp_path / "train-*.parquet")) == len(RECORDS)
    assert len(open_conversations(tmp_path / "train-1.parquet")) == 3
    (tmp_path / ".train-0.parquet.lock").touch()
    train = [tmp_path / f"train-{number}.parquet" for number in (0, 1)]
    assert stored_files(tmp_path / "train-*.parquet") == train
    assert stored_files(train[0]) == train[:1]
    assert stored_files(tmp_path) == [tmp_path / "test-0.parquet", *train]


def test_parquet_keeps_few_row_groups_in_memory(tmp_path, monkeypatch):
    """Those that were read last, in the room of two: here of records 0 and 1, 2 and 3, 4, 5 and
    6."""
    groups, read_row_group = [], pq.ParquetFile.read_row_group

    def read(file, *args, **options):
        groups.append(read_row_group(file, *args, **options))
        return groups[-1]

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    conversations = open_conversations(as_parquet(tmp_path))
    assert shown(conversations[0]) == expected(RECORDS[0])
    monkeypatch.setattr(tables, "ROW_GROUP_CACHE_BYTES", 2 * groups[0].nbytes)
    for index, reads in ((1, 1), (2, 2), (4, 3), (5, 4), (6, 4), (4, 4), (2, 5)):
        assert shown(conversations[index]) == expected(RECORDS[index])
        assert len(groups) == reads


def test_a_single_image_column_and_messages_as_json_are_read(tmp_path):
    messages = [{"role": "user", "content": "?"}, turn("assistant", "red")]
    rows = [{"messages": json.dumps(messages), "image": {"bytes": png(9), "path": None}}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    user, _ = open_conversations(tmp_path / "data.parquet")[0]
    assert shown([user]) == [("user", [9, "?"])]


def test_without_pyarrow_it_is_said_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "data.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'pvm-jax\[data\]'"):
        open_conversations(tmp_path / "data.parquet")


def write_line(folder, record):
    (folder / "data.jsonl").write_text(
        json.dumps(record) if not isinstance(record, str) else record
    )
    return open_conversations(folder / "data.jsonl")


def test_pictures_stand_before_the_first_user_turn_where_no_message_shows_them(tmp_path):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "!"},
    ]
    system, user, assistant = write_line(
        tmp_path, {"messages": messages, "images": ["a.png", "b.png"]}
    )[0]
    assert (system["content"], assistant["content"]) == ("s", "!")
    assert [part.get("image", part.get("text")) for part in user["content"]] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
        "?",
    ]


def test_image_paths_are_relative_to_the_file(tmp_path):
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}},
        {"type": "image", "image": "/elsewhere/b.png"},
        {"type": "image", "url": "file:///elsewhere/b.png"},
        {"type": "image", "image": "data:image/png;base64,AAAA"},
        {"type": "video", "video": ["c.png", "d.png"]},
        {"type": "text", "text": "?"},
    ]
    (message,) = write_line(tmp_path, {"messages": [{"role": "user", "content": content}]})[0]
    a, c, d = (str(tmp_path / name) for name in ("a.png", "c.png", "d.png"))
    assert [
        next(value for key, value in part.items() if key != "type") for part in message["content"]
    ] == [
        a,
        a,
        {"bytes": None, "path": a},
        *("/elsewhere/b.png", "file:///elsewhere/b.png", "data:image/png;base64,AAAA", [c, d], "?"),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "Expecting property name"),
        ("", "is empty"),
        (" \n\n", "is empty"),
        ('{"messages": [], "messages": []}', "1: the key 'messages' stands twice"),
        ("[" * 100_000, "1: lists and objects are nested too deeply"),
        ([], "not an object"),
        ({"message": []}, "not an object"),
        ({"messages": 3}, "messages must be a list"),
        ({"messages": [3]}, "messages must be a list"),
        (
            {"messages": [turn("user", IMAGE, IMAGE)], "images": ["a"]},
            "2 image parts for the 1 pictures",
        ),
        ({"messages": [turn("user", IMAGE)]}, "1 image parts for the 0 pictures"),
        (
            {"messages": [turn("user", {"type": "image", "image": "a"})], "images": ["a"]},
            "0 image parts for the 1 pictures",
        ),
        ({"messages": [turn("assistant", "a")], "images": ["a"]}, "there is no user turn"),
        (
            {"messages": [turn("user", IMAGE)], "images": ["a"], "image": "a"},
            "both an 'images' and an 'image'",
        ),
        ({"messages": [turn("user", IMAGE)], "images": "a"}, "'images' must be a list"),
    ],
)
def test_a_bad_record_is_named(tmp_path, record, message):
    with pytest.raises(ValueError, match=rf"data.jsonl.*{message}"):
        write_line(tmp_path, record)[0]


def test_blank_lines_are_skipped_and_counted(tmp_path):
    lines = [json.dumps({"messages": [turn("user", f"{n}?")]}) for n in range(3)]
    conversations = write_line(tmp_path, f"\n{lines[0]}\r\n\r\n \t\n{lines[1]}\n{lines[2]}\n\n  ")
    assert [shown(messages) for messages in conversations] == [
        [("user", [f"{n}?"])] for n in range(3)
    ]
    assert [conversations.where(index).rpartition(":")[2] for index in range(3)] == ["2", "5", "6"]


def test_what_is_no_format_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        open_conversations(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"mmk12: .*: python -m convert\.published --help"):
        open_conversations("mmk12")
    with pytest.raises(FileNotFoundError, match="no such file of conversations"):
        open_conversations(tmp_path / "train-*.parquet")
    with pytest.raises(
        ValueError, match=r"has no dataset.json .*, no state.json .* no \*.parquet, \*.jsonl"
    ):
        open_conversations(tmp_path)
    datasets.DatasetDict({"train": as_dataset(), "test": as_dataset()}).save_to_disk(
        tmp_path / "both"
    )
    with pytest.raises(
        ValueError, match=r"several splits: choose one, .*both/test or .*both/train"
    ):
        open_conversations(tmp_path / "both")
    assert len(open_conversations(tmp_path / "both" / "test")) == len(RECORDS)
    (tmp_path / "both" / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ValueError, match="names files that are missing"):
        open_conversations(tmp_path / "both" / "test")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"broken.parquet cannot be read"):
        open_conversations(tmp_path / "broken.parquet")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"no column 'messages' .*, only text"):
        open_conversations(tmp_path / "text.parquet")


def test_pictures_of_several_files_are_beside_each(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        record = {"messages": [turn("user", IMAGE)], "images": ["x.png"]}
        (tmp_path / name / "data.jsonl").write_text(json.dumps(record))
    both = open_conversations(tmp_path / "*" / "data.jsonl")
    shown = [messages[0]["content"][0]["image"] for messages in both]
    assert shown == [str(tmp_path / name / "x.png") for name in ("a", "b")]


def test_a_place_is_named_once(tmp_path):
    conversations = write_line(tmp_path, "{")
    with pytest.raises(ValueError, match=r"^\S+data.jsonl:1: Expecting"), conversations.naming(0):
        conversations[0]
