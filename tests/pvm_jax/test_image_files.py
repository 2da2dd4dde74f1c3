"""Where a picture's path leads."""

import json

import pytest

from pvm_jax.data.conversations import open_conversations
from pvm_jax.data.image_files import encoded_bytes


def test_a_tilde_is_the_home_directory_as_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a.png").write_bytes(b"at home")
    (tmp_path / "~a.png").write_bytes(b"a name")
    for path, found in (("~/a.png", b"at home"), ("~a.png", b"a name")):
        content = [{"type": "image", "image": path}, {"type": "video", "video": [{"path": path}]}]
        record = {"messages": [{"role": "user", "content": content}]}
        (tmp_path / "data.jsonl").write_text(json.dumps(record))
        ((message,),) = open_conversations(tmp_path / "data.jsonl")
        image, video = message["content"]
        assert encoded_bytes(image["image"]) == encoded_bytes(video["video"][0]) == found
    with pytest.raises(FileNotFoundError, match=r"^~/b.png does not exist$"):
        encoded_bytes("~/b.png")
