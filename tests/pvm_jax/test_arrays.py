"""Arrays that are stored apart: those of s3://, and those of other places that were copied there
and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from convert.store import open_arrays
from pvm_jax import save
from pvm_jax.checkpoint import arrays
from pvm_jax.checkpoint.arrays import STATE, orbax_context
from pvm_jax.checkpoint.directory import CheckpointError
from pvm_jax.checkpoint.store import load_branch, save_branch
from tests.bucket_server import CUT
from tests.pvm_jax.test_in_buckets import put
from tests.tiny import CONFIG, make_model
from train.run.checkpoints import TrainCheckpoints

pytestmark = [pytest.mark.parametrize("server", ["s3"], indirect=True), pytest.mark.slow]


def tree(*mesh):
    """Arrays of several kinds, cut and replicated on a mesh of devices."""
    devices = jax.make_mesh(mesh, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    values = {
        "cut": {"w": jnp.arange(96.0).reshape(8, 3, 4)},
        "zeros": jnp.zeros((4, 8), jnp.bfloat16),
        "step": jnp.int32(7),
    }
    kinds = {"cut": {"w": PartitionSpec("x")}, "zeros": PartitionSpec("y"), "step": PartitionSpec()}
    return jax.tree.map(
        lambda a, kind: jax.device_put(a, NamedSharding(devices, kind)), values, kinds
    )


def write(place, values):
    with orbax_context(place):
        ocp.save(str(place), values)


def abstract(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def read(place, like):
    with orbax_context(place):
        found = ocp.load_checkpointables(str(place), {STATE: jax.tree.map(abstract, like)})
    return found[STATE]


def fetch(bucket, target):
    """Copies everything out of it."""
    for file in bucket.glob("**"):
        if file.is_file():
            here = target / file.relative_to(bucket)
            here.parent.mkdir(parents=True, exist_ok=True)
            here.write_bytes(file.read_bytes())


def check(found, expected):
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert one.dtype == other.dtype
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)


def test_written_on_one_mesh_and_read_on_another(bucket):
    write(bucket / "a", tree(4, 2))
    check(read(bucket / "a", tree(2, 4)), tree(2, 4))
    with orbax_context(bucket / "a"):
        stored = ocp.checkpointables_metadata(str(bucket / "a")).metadata[STATE]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), stored) == jax.tree.map(
        lambda a: (a.shape, a.dtype), tree(1, 1)
    )


def test_chunks_end_where_shards_do(bucket, server, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 2 * 3 * 4 * 4)
    write(bucket / "a", tree(2, 1))
    chunks = [key for key in server.keys(bucket.name) if "cut.w/c/" in key]
    assert len(chunks) == 4
    check(read(bucket / "a", tree(8, 1)), tree(8, 1))


def test_copied_there_and_back(bucket, tmp_path):
    write(tmp_path / "a", tree(4, 2))
    put(tmp_path / "a", bucket / "copy")
    check(read(bucket / "copy", tree(2, 4)), tree(2, 4))
    write(bucket / "a", tree(4, 2))
    fetch(bucket, tmp_path / "back")
    check(read(tmp_path / "back" / "a", tree(2, 4)), tree(2, 4))


def test_a_run_goes_on_where_it_was_copied_to(bucket, tmp_path):
    state = tree(4, 2)
    with TrainCheckpoints(bucket / "steps", CONFIG, "backbone") as checkpoints:
        checkpoints.save(2, state)
    fetch(bucket, tmp_path)
    like = jax.tree.map(abstract, state)
    torn = tmp_path / "steps" / "3"  # was being written
    torn.mkdir()
    with (
        TrainCheckpoints(tmp_path / "steps", CONFIG, "backbone") as checkpoints,
        pytest.raises(CheckpointError, match=r"remove this directory: .* continues from step 2"),
    ):
        checkpoints.restore(like)
    torn.rmdir()
    with TrainCheckpoints(tmp_path / "steps", CONFIG, "backbone") as checkpoints:
        check(checkpoints.restore(like), state)
        checkpoints.save(4, state)
    put(tmp_path / "steps", bucket / "again")
    with TrainCheckpoints(bucket / "again", CONFIG, "backbone") as checkpoints:
        assert checkpoints.steps == [2, 4]
        check(checkpoints.restore(like), state)


def test_an_answer_that_fails_once_is_asked_for_again(bucket, server):
    failing = [CUT, 503]
    server.fault = lambda method, path: failing.pop() if failing and "/c/" in path else None
    write(bucket / "a", tree(4, 2))
    assert not failing
    failing += [503, CUT]
    check(read(bucket / "a", tree(4, 2)), tree(4, 2))
    assert not failing


def test_what_is_damaged_closed_or_not_there(bucket, server):
    model = make_model(CONFIG)
    closed = pytest.raises(CheckpointError, match=f"^{bucket}/b could not be written: .*403")
    server.fault = lambda method, path: 403 if "/c/" in path else None
    with closed:
        save_branch(bucket / "b", model)
    server.fault = lambda method, path: None
    assert not (bucket / "b").exists()
    save_branch(bucket / "b", model)
    load_branch(bucket / "b", model)
    file = bucket / next(key for key in server.keys(bucket.name) if "/c/" in key)
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=f"^{bucket}/b/params cannot be read: .*DATA_LOSS"):
        load_branch(bucket / "b", model)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"^{bucket}/b/params cannot be read"):
        load_branch(bucket / "b", model)
    name = file.relative_to(bucket / "b" / "params" / "state").as_posix().split("/c/")[0]
    missing = open_arrays(bucket / "b")[name.replace(".", "/")]
    with pytest.raises(ValueError, match="NOT_FOUND"):
        missing.read().result()
    with pytest.raises(OSError, match=r"^s3://none/b cannot be written .*no such bucket"):
        save("s3://none/b", model)
