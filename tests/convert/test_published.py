"""The paper's sets as they are on the Hub, in small: rows with their columns -> shards that GRPO
and SFT read."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from convert.dataset import convert
from convert.published import PROMPTS, main
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.messages import parse
from train.grpo.prompts import read_record

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def picture(level=0):
    packed = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(packed, "PNG")
    return packed.getvalue()


@pytest.mark.parametrize("name", PROMPTS)
def test_a_set_of_prompts_becomes_shards_with_solutions(name, tmp_path):
    known, folder = PROMPTS[name], tmp_path / "hub"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    shown = ["a.png"] if name == "virl39k" else {"bytes": picture(), "path": None}
    rows = [
        {known.question: f"<image>Which {n}?", known.answer: rf"\boxed{{{n}}}", known.images: shown}
        for n in range(6)
    ]
    rows.append(dict(rows[0]) | {known.answer: ""})
    parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    target = tmp_path / "prompts.jsonl"
    main([name, str(folder), str(target), "--count", "4", "--held_out", "1"])
    convert(target, tmp_path / "shards", prompts=True)
    stored = open_conversations(tmp_path / "shards")
    assert len(stored) == 4
    assert len((tmp_path / "prompts.held_out.jsonl").read_text().splitlines()) == 1
    for index in range(4):
        messages, columns = read_record(stored, index)
        assert messages[0]["content"][1]["text"] == f"Which {columns['solution']}?"
        assert len(parse(messages, ()).images) == 1


def test_conversations_with_a_picture_are_kept(tmp_path):
    turn = {"role": "assistant", "content": [{"type": "text", "text": "Two."}]}
    asked = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}]
    (tmp_path / "a.png").write_bytes(picture())
    rows = [
        {"id": str(n), "messages": json.dumps([{"role": "user", "content": content}, turn])}
        for n, content in enumerate((asked, [{"type": "text", "text": "?"}]))
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    main(["openmmreasoner_sft", str(tmp_path), str(tmp_path / "sft.jsonl")])
    convert(tmp_path / "sft.jsonl", tmp_path / "shards")
    (stored,) = open_conversations(tmp_path / "shards")
    assert len(parse(stored, ()).images) == 1


def test_other_columns_and_too_few_records_are_named(tmp_path, refused):
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    said = refused(main, ["mmk12", str(tmp_path), str(tmp_path / "out.jsonl")])
    assert "a.parquet has no column 'question', but text" in said
    assert "no Parquet files" in refused(main, ["mmk12", str(tmp_path / "b"), str(tmp_path / "o")])
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    said = refused(main, ["mmk12", str(tmp_path / "b.parquet"), str(tmp_path / "out.jsonl")])
    assert "b.parquet cannot be read: " in said


@pytest.mark.parametrize(
    ("messages", "said"), [("{", "Expecting"), ("3", "a list of turns"), ("[3]", "a list of turns")]
)
def test_messages_that_are_none_are_named(messages, said, tmp_path, refused):
    """And nothing is written, nor anything that was there written over."""
    rows = [{"messages": "[]"}, {"messages": messages}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    target = tmp_path / "sft.jsonl"
    argv = ["openmmreasoner_sft", str(tmp_path / "a.parquet"), str(target)]
    assert f"a.parquet:1: {said}" in refused(main, argv).replace("messages must be ", "")
    assert not target.exists()
    target.write_text("mine")
    assert f"{target} exists" in refused(main, argv)
    assert target.read_text() == "mine"
