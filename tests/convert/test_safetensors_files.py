"""Files of safetensors, and how tensors are shared out among them."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.safetensors_files import Planned, write_safetensors

TENSORS = {
    name: np.full(size, number, np.float32)
    for number, (name, size) in enumerate({"a": 100, "b": 900, "c": 100, "d": 100}.items())
}


def write(folder, size):
    planned = {name: Planned(value.dtype, value.shape) for name, value in TENSORS.items()}
    write_safetensors(folder, planned, iter(TENSORS.values()), size)
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("size", "files"), [("1KB", [["a"], ["b"], ["c", "d"]]), ("0.1KB", [[name] for name in "abcd"])]
)
def test_a_tensor_larger_than_a_file_has_one_of_its_own(tmp_path, size, files):
    found = [load_file(file) for file in write(tmp_path, size)]
    assert [sorted(tensors) for tensors in found] == files
    for tensors in found:
        for name, value in tensors.items():
            np.testing.assert_array_equal(value, TENSORS[name])
    index = (tmp_path / "model.safetensors.index.json").read_text()
    assert '"total_size": 4800' in index
    assert f'"b": "model-00002-of-0000{len(files)}.safetensors"' in index


def test_one_file_has_no_index(tmp_path):
    assert [file.name for file in write(tmp_path, "4.8 kb")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("size", ["", "5", "GB", "-5GB", "0MB", "5 gigabytes"])
def test_what_is_no_size_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"max_shard_size '{size}' is no size such as 5GB"):
        write(tmp_path, size)
    assert not list(tmp_path.iterdir())
