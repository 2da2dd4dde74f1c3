"""s3:// with its own client against moto's server: what the slow tests show of it at length."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import dataset
from pvm_jax.data.conversations import open_conversations
from pvm_jax.files.bucket import BucketError
from pvm_jax.files.lock import sole_writer
from tests.pvm_jax.test_arrays import read, write

pytestmark = pytest.mark.parametrize("server", ["s3"], indirect=True)


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


def test_arrays_are_written_and_read(bucket):
    written = {"w": jax.device_put(jnp.arange(8.0), jax.devices()[0])}
    write(bucket / "a", written)
    np.testing.assert_array_equal(read(bucket / "a", written)["w"], written["w"])


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_closed_to_us(bucket, server, method):
    (bucket / "a").write_bytes(b"here")
    server.fault = lambda asked, path: 403 if asked == method else None
    ask = (bucket / "a").exists if method == "HEAD" else (bucket / "a").read_bytes
    with pytest.raises(BucketError, match=f"^{bucket}/a is closed to this user"):
        ask()
