"""Records of conversations, damaged: each is the same conversation from every format, or refused in
one line that names its place."""

import gzip
import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from convert import dataset
from pvm_jax.data.conventions import COLUMNS
from pvm_jax.data.conversations import check_learnable, open_conversations
from pvm_jax.data.messages import MARKS
from pvm_jax.data.processor import Processor
from tests.fuzz.mutations import (
    VALUES,
    Outcome,
    damaged,
    mutated,
    one_of,
    outcome,
    shuffled,
    with_nulls,
)
from tests.pvm_jax.processor_files import write_checkpoint
from tests.pvm_jax.test_chat_template import CALL, TOOLS_TEMPLATE

BASES = (
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "a boat", "weight": 1},
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "41", "tool_call_id": "c"},
            {"role": "assistant", "content": "it is 41"},
        ],
        "images": ["a.png"],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": "int"}}}],
    },
    {
        "conversations": [
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "a boat"},
        ],
        "image": "a.png",
        "id": 1,
        "system": "be brief",
    },
    {
        "prompt": [{"role": "user", "content": "<video>what?"}],
        "completion": [{"role": "assistant", "content": "a boat"}],
        "videos": [{"video": ["a.png", "b.png"], "fps": 2}],
        "tools": [],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": ["a.png", "b.png"], "timestamps": [0, 1.5]},
                    {"type": "image_url", "image_url": {"url": "b.png"}},
                    {"type": "text", "text": "what?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "a boat"}]},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "two", "loss": False},
        ],
        "solution": "a boat",
    },
)
KEYS = (*COLUMNS, *MARKS, "role", "content", "type", "text", "from", "value", "index", "fps", "id")
KEYS += ("timestamps", "url", "path", "base64", "bytes", "image_url", "tool_calls", "function", "")
KEYS += ("name", "arguments", "reasoning_content", "chosen", "solution")
WRITTEN = ("tools", "tool_calls", "chat_template_kwargs")
"""What the template writes as it is, the order of its keys too."""
OPAQUE = ("tools", "arguments", "chat_template_kwargs")
"""Of these, the nulls too: but for those of a table's structs, which has filled them in."""
CONTENTS = (
    *VALUES,
    *("<image>", "<video>", "<|im_end|>", "<|im_", "a.png", "/dev/zero", "data:,", "assistant"),
    *("ftp://b/a.png", " ", "user", "tool", "gpt", "human", "system"),
    *({"type": "text", "text": "x"}, {"type": "image"}, {"type": "image", "image": "b.png"}),
    *({"bytes": "x"}, {"url": "a.png"}, ["a.png"], ["a.png", "b.png"], CALL, [CALL]),
    *({"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}),
)
TEMPLATE = TOOLS_TEMPLATE.replace(
    "else part.text",
    "else '<|vision_start|><|video_pad|><|vision_end|>' if part.type == 'video' else part.text",
)

pytestmark = pytest.mark.filterwarnings("ignore:a video has neither fps")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("p"), TEMPLATE))


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (64, 64), (number, 90, 200)).save(tmp_path / name)
    return tmp_path


def read(stored, index, processor) -> Outcome:
    """The conversation's (tokens, learned, patches), or why it is refused, its place left out."""

    def encoded():
        with stored.naming(index):
            messages = stored[index]
            check_learnable(messages)
            example = processor.encode(messages)
            assert processor.count(messages) == (len(example.input_ids), example.num_patches)
            return example

    found = outcome(encoded, names=[stored.where(index)])
    if found.refused is not None:
        return Outcome(refused=found.refused.removeprefix(f"{stored.where(index)}: "))
    example = found.made
    pixels = [
        None if part is None else part.tobytes()
        for part in (example.pixel_values, example.pixel_values_videos)
    ]
    return Outcome((example.input_ids.tolist(), example.loss_mask.tolist(), pixels))


def all_of(path, processor):
    stored = open_conversations(path)
    return [read(stored, index, processor) for index in range(len(stored))]


def write_lines(file, records):
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def check_kept(record, made, processor):
    """Raises AssertionError unless all that is said is in the tokens, and what is learned ends as
    often as there are turns to learn."""
    tokens, learned, _ = made
    text = processor.decode(tokens, skip_special_tokens=False)
    ends = processor.decode(np.array(tokens)[learned], skip_special_tokens=False)
    column = next(name for name in ("messages", "conversations", "prompt") if record.get(name))
    turns = [dict(turn, past="completion" in record) for turn in record[column]]
    turns += record.get("completion") or []
    for turn in turns:
        said = turn.get("content") if turn.get("role") is not None else turn.get("value")
        parts = said if isinstance(said, list) else [{"text": said}]
        for words in (part.get("text") or "" for part in parts):
            for piece in words.replace("<video>", "<image>").split("<image>"):
                assert piece.strip() in text
    answers = [
        turn for turn in turns if {"assistant", "gpt"} & {turn.get("role"), turn.get("from")}
    ]
    marks = [[turn[mark] for mark in MARKS if turn.get(mark) is not None] for turn in answers]
    past = [turn.get("past", False) for turn in answers]
    expected = sum(all(m) and (bool(m) or not p) for m, p in zip(marks, past, strict=True))
    assert ends.count("<|im_end|>") == expected


def faithful_table(record):
    """`record` as a table that gives it back, as far as null is nothing; None where there is
    none."""
    if _has_null(record, within=False):
        return None
    try:
        table = pa.Table.from_pylist([record])
        back = table.to_pylist()[0]
        pq.write_table(table, pa.BufferOutputStream())
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None
    return table if json.dumps(_without_nulls(back)) == json.dumps(_without_nulls(record)) else None


def _has_null(value, *, within):
    """Whether a null stands where it is something: `within` what is OPAQUE."""
    if isinstance(value, dict):
        return any(
            (within and item is None) or _has_null(item, within=within or key in OPAQUE)
            for key, item in value.items()
        )
    return isinstance(value, list) and any(_has_null(item, within=within) for item in value)


def _without_nulls(value):
    if isinstance(value, dict):
        return {k: _without_nulls(value[k]) for k in sorted(value) if value[k] is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


CASES = [pytest.param(0, 200), pytest.param(1, 3000, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("seed", "cases"), CASES)
def test_a_damaged_record_is_the_same_in_every_format_or_refused(
    folder, processor, seed, cases, peak
):
    rng = np.random.default_rng(seed)
    records = [mutated(one_of(BASES, rng), rng, CONTENTS, KEYS) for _ in range(cases)]
    lines = write_lines(folder / "data.jsonl", records)
    expected = all_of(lines, processor)
    made = [found.made for found in expected]
    taken = [number for number in range(cases) if made[number] is not None]
    assert cases / 20 < len(taken) < cases / 2
    for number in taken:
        check_kept(records[number], made[number], processor)
    reordered = [shuffled(record, rng, WRITTEN) for record in records]
    (folder / "data.json").write_text(json.dumps(reordered, indent=1))
    assert [found.made for found in all_of(folder / "data.json", processor)] == made
    (folder / "data.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    assert all_of(folder / "data.jsonl.gz", processor) == expected
    dataset.convert(lines, folder / "shards", processor, max_rejected=1)
    assert all_of(folder / "shards", processor) == [expected[number] for number in taken]
    rejected = (folder / "shards.rejected.jsonl").read_text().splitlines()
    assert len(rejected) == cases - len(taken)
    for number, record in enumerate(records):
        if (table := faithful_table(record)) is not None:
            pq.write_table(table, folder / "data.parquet")
            stored = outcome(
                lambda: open_conversations(folder / "data.parquet"), names=[".parquet"]
            )
            if stored.made:
                found = read(stored.made, 0, processor)
                assert found.made == made[number], json.dumps(record)
            else:
                assert made[number] is None


def as_parts(record):
    """Its texts as typed parts, where no tag in them is a place."""

    def parted(turn):
        said = turn.get("content")
        if not isinstance(said, str) or "<" in said or not said:
            return turn
        return turn | {"content": [{"type": "text", "text": said}]}

    return {
        name: list(map(parted, value)) if name in ("messages", "completion") else value
        for name, value in record.items()
    }


@pytest.mark.parametrize("base", BASES)
def test_another_way_to_write_it_is_the_same_conversation(folder, processor, base):
    rng = np.random.default_rng(0)
    column = next(name for name in ("messages", "conversations", "prompt") if name in base)
    same = [
        base,
        shuffled(base, rng, WRITTEN),
        with_nulls(base, rng, KEYS, but=OPAQUE),
        as_parts(base),
        base | {column: json.dumps(base[column])},
        base | {column: list(map(json.dumps, base[column]))},
        base | {"tools": json.dumps(base.get("tools"))},
        base | {"notes": [1, {"of": "its own"}], "source": "web"},
    ]
    first, *others = all_of(write_lines(folder / "data.jsonl", same), processor)
    assert first.made
    assert others == [first] * 7
    formats = stored_as_all(folder, same, processor)
    content = "\ufeff" + "\r\n\r\n".join(json.dumps(one, ensure_ascii=False) for one in same)
    (folder / "windows.jsonl").write_bytes(content.encode())
    (folder / "windows.json").write_bytes(f"\ufeff {json.dumps(same)}\r\n".encode())
    for name in (*formats, "windows.jsonl", "windows.json"):
        assert all_of(folder / name, processor) == [first] * 8, name


def stored_as_all(folder, records, processor):
    """`records` in every format; the names."""
    lines = write_lines(folder / "data.jsonl", records)
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "data.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    table = datasets.load_dataset("json", data_files=str(lines), cache_dir=str(folder / "cache"))
    table["train"].to_parquet(folder / "data.parquet")
    table["train"].save_to_disk(folder / "saved")
    for picture in ("a.png", "b.png"):
        shutil.copy(folder / picture, folder / "saved")
    dataset.convert(lines, folder / "shards", processor)
    return ("data.jsonl", "data.json", "data.jsonl.gz", "data.parquet", "saved", "shards")


@pytest.mark.parametrize(
    ("seed", "cases"), [pytest.param(0, 100), pytest.param(1, 1000, marks=pytest.mark.slow)]
)
def test_a_damaged_file_is_read_as_far_as_it_is_whole_or_refused(
    folder, processor, seed, cases, peak
):
    rng = np.random.default_rng(seed)
    formats = stored_as_all(folder, BASES, processor)
    expected = [found.made for found in all_of(folder / "data.jsonl", processor)]
    files = [
        file for name in formats for file in sorted([folder / name, *folder.glob(f"{name}/*")])
    ]
    files = [file for file in files if file.is_file() and file.suffix != ".png"]
    for _ in range(cases):
        file = one_of(files, rng)
        content = file.read_bytes()
        file.write_bytes(damaged(content, rng))
        path = file if file.parent == folder else file.parent
        stored = outcome(lambda path=path: open_conversations(path), names=[str(path)])
        for index in range(len(stored.made or ())):
            found = read(stored.made, index, processor)
            if path.name == "shards":  # which are written with hashes
                assert found.made is None or found.made == expected[index]
        file.write_bytes(content)
