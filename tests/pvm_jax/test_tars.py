"""WebDataset's tar files as conversations."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.image_files import read_image
from pvm_jax.data.messages import parse


def picture(level):
    packed = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(packed, "PNG")
    return packed.getvalue()


def write(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def record(**columns):
    content = columns.pop("content", "How many?")
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Two."}]
    return json.dumps({"messages": messages} | columns).encode()


@pytest.fixture
def tars(tmp_path):
    named = {"type": "image", "image": "b.1.png"}
    write(
        tmp_path / "0.tar",
        {
            "./a.json": record(solution="2"),
            "./a.png": picture(10),
            "x/b.json": record(content=[named]),
            "x/b.1.png": picture(20),
        },
    )
    write(tmp_path / "1.tar", {"c.png": picture(30), "c.json": record(image="c.png")})
    return tmp_path


@pytest.mark.parametrize("pattern", ["*.tar", ""])
def test_members_of_one_name_are_a_record_with_its_pictures(tars, pattern):
    conversations = open_conversations(tars / pattern)
    assert len(conversations) == 3
    shown = [parse(messages, ()).images for messages in conversations]
    levels = [[np.asarray(read_image(source))[0, 0, 0] for _, source in one] for one in shown]
    assert levels == [[10], [20], [30]]
    assert conversations.columns(0) == {"solution": "2"}
    assert [conversations.where(index).rpartition("/")[2] for index in (0, 2)] == [
        "a",
        "1.tar:c",
    ] or conversations.where(2).endswith("1.tar:c")


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"a.png": b""}, r"sample a needs one \.json member.*it has a\.png"),
        ({"a.json": b"{", "a.png": b""}, r"t\.tar:a: a\.json is no JSON"),
        ({"a.json": b"[]"}, r"a\.json must hold an object"),
        ({"a.json": record(image="b.png"), "a.png": b""}, "name none of the members"),
    ],
)
def test_what_is_no_record_is_named(tmp_path, members, told):
    write(tmp_path / "t.tar", members)
    with pytest.raises(ValueError, match=told):
        open_conversations(tmp_path / "t.tar")[0]


def test_a_compressed_or_cut_tar_is_refused(tmp_path):
    write(tmp_path / "t.tar", {"a.json": record()}, "w:gz")
    with pytest.raises(ValueError, match="no whole tar file without compression"):
        open_conversations(tmp_path / "t.tar")
    whole = write(tmp_path / "u.tar", {"a.json": record(), "a.png": picture(1) * 100})
    whole.write_bytes(whole.read_bytes()[:2600])
    with pytest.raises(ValueError, match=r"u\.tar"):
        list(open_conversations(whole))
