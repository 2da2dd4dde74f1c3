"""What tables hold is what the JSON file of the same records holds."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pvm_jax.data.conventions import record_messages
from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.messages import ChatMessages, parse
from pvm_jax.data.shards import pack_record, unpack_record

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def asks(content, answer="a"):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


MIXED = [
    {"messages": asks("q", answer='say "a"'), "tools": None, "n": 1},
    {
        "messages": [
            *asks([{"type": "text", "text": "q"}]),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
            },
        ],
        "tools": [{"function": {"name": "f", "parameters": {"x": {"type": "int"}}}}],
        "n": 2,
    },
    {
        "messages": [
            *asks([{"type": "text", "text": "q"}]),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "g", "arguments": {"y": ["z"]}}}],
            },
        ],
        "tools": [{"function": {"name": "g", "parameters": {"y": {"items": "text"}}}}],
        "n": 3,
    },
]


def test_tables_whose_columns_are_json_give_the_same_as_the_file(tmp_path):
    """What `datasets` 5 makes of a JSONL file whose contents are now texts, now parts."""
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, MIXED)))
    table = datasets.load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache")
    )["train"]
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    nested = datasets.Features(
        {
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.Json(),
                    "tool_calls": datasets.Json(),
                }
            ),
            "tools": datasets.Json(),
            "n": datasets.Value("int64"),
        }
    )
    filled = [
        record | {"messages": [{"tool_calls": None} | turn for turn in record["messages"]]}
        for record in MIXED
    ]
    datasets.Dataset.from_list(filled, features=nested).to_parquet(tmp_path / "nested.parquet")
    expected = [parse(ChatMessages(r["messages"], {"tools": r["tools"]}), ()) for r in MIXED]
    for name in ("a.jsonl", "a.parquet", "saved", "nested.parquet"):
        stored = open_conversations(tmp_path / name, every_column=True)
        assert [parse(messages, ()) for messages in stored] == expected, name
        assert [stored.columns(index)["n"] for index in range(3)] == [1, 2, 3]
        shards = [record_messages(unpack_record(pack_record(m)), tmp_path) for m in stored]
        assert [parse(messages, ()) for messages in shards] == expected, name


def test_nulls_that_a_table_fills_in_are_gone_and_those_of_json_are_kept(tmp_path):
    """Every struct of a column has the keys of all others: of the calls' arguments, of schemas."""

    def record(name, **arguments):
        call = {"function": {"name": name, "arguments": arguments}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        schema = {"name": name, "parameters": {key: {"default": None} for key in arguments}}
        return {"messages": [USER, said], "tools": [schema], "solution": {"x": None}}

    def given(messages):
        (call,) = messages[1]["tool_calls"]
        return call["function"]["arguments"], list(messages.variables["tools"][0]["parameters"])

    rows = [record("f", x=1), record("g", y=[{"z": 2}])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "structs.parquet")
    stored = open_conversations(tmp_path / "structs.parquet", every_column=True)
    assert [given(one)[0] for one in stored] == [{"x": 1}, {"y": [{"z": 2}]}]
    assert stored.columns(0) == {"solution": {"x": None}}

    meant = [record("f", x=None, y=[{"z": None}]), record("g", y=1)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, meant)))
    table = datasets.load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache")
    )["train"]
    table.to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        stored = open_conversations(tmp_path / name)
        assert given(stored[0]) == ({"x": None, "y": [{"z": None}]}, ["x", "y"]), name
        assert stored[1].variables["tools"][0]["parameters"] == {"y": {"default": None}}


def test_a_table_with_a_misspelt_column_is_refused(tmp_path):
    rows = [{"messages": [USER, ANSWER], "imagess": ["a.png"]}]
    pq.write_table(datasets.Dataset.from_list(rows).with_format("arrow")[:], tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet:0: nothing reads 'imagess'"):
        open_conversations(tmp_path / "a.parquet")[0]
    text = pa.array([json.dumps([USER, ANSWER])])
    table = pa.Table.from_arrays([text, text], names=["messages", "messages"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has the column 'messages' twice"):
        open_conversations(tmp_path / "a.parquet")
