"""s3:// with its own client against a server on localhost, where both are installed:
pip install s3fs 'moto[server]'."""

import json

import pytest

from convert import dataset
from pvm_jax.data.conversations import open_conversations
from pvm_jax.files.lock import sole_writer


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_data_are_read_and_written(bucket):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    (bucket / "data" / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    dataset.convert(f"{bucket}/data/*.jsonl", bucket / "shards")
    assert [one["content"] for one in open_conversations(bucket / "shards")[0]] == ["?", "!"]
    refused = pytest.raises(FileExistsError, match=f"{bucket}/shards exists and is not empty")
    with refused:
        dataset.convert(bucket / "data", bucket / "shards")
    with pytest.raises(OSError, match=r"s3://none/a cannot be written .*no such bucket"):
        sole_writer("s3://none/a").__enter__()
