"""s3:// with its own client against a server on localhost, where both are installed:
pip install s3fs 'moto[server]'."""

import json

import pytest

from convert import dataset
from pvm_jax.data.conversations import open_conversations
from pvm_jax.files.lock import sole_writer
from pvm_jax.files.paths import any_path

moto = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("PVM_JAX_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield any_path("s3://bucket")
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_data_are_read_and_written(bucket):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    (bucket / "data" / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    dataset.convert("s3://bucket/data/*.jsonl", "s3://bucket/shards")
    assert [one["content"] for one in open_conversations("s3://bucket/shards")[0]] == ["?", "!"]
    refused = pytest.raises(FileExistsError, match="s3://bucket/shards exists and is not empty")
    with refused:
        dataset.convert("s3://bucket/data", "s3://bucket/shards")
    with pytest.raises(OSError, match=r"s3://none/a cannot be written .*no such bucket"):
        sole_writer("s3://none/a").__enter__()
