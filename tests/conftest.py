"""Every test runs on eight simulated CPU devices, in float32 at full precision."""

import gc
import os
import signal

from tests.xla_flags import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has them from the process that started it
    os.environ["XLA_FLAGS"] = xla_flags()
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# What takes seconds to import is imported by the fixtures: the process that only hands the tests
# out to xdist's workers reads this file too.
if TYPE_CHECKING:
    from pvm_jax import Qwen3VL
    from pvm_jax.options import Main
    from tests.bucket_server import Storage
    from tests.s3_server import S3

# Tests send it: a shell starts jobs in the background with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"

gc.set_threshold(
    200_000, 20, 100
)  # programs are many objects that stay: a tenth of the time went into counting them


def pytest_collection_finish() -> None:
    """What was imported stays, too."""
    gc.freeze()


@pytest.fixture(params=["shape_8b", "shape_4b"])
def golden(request) -> Path:
    """One of the reference checkpoints with what the authors' code computed
    (tests/golden/README.md)."""
    return GOLDEN / request.param


@pytest.fixture(scope="session")
def golden_checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The reference checkpoints, converted."""
    from convert.hf_to_orbax import convert

    root = tmp_path_factory.mktemp("golden")
    for shape in ("shape_8b", "shape_4b"):
        convert(GOLDEN / shape, root / shape)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def loaded() -> "dict[str, Qwen3VL]":
    """The reference models that a test has asked for."""
    return {}


@pytest.fixture
def golden_model(golden, golden_checkpoints, loaded) -> "Qwen3VL":
    """The model of `golden`, through conversion and loading; its arrays are all tests'."""
    from flax import nnx

    from pvm_jax import load

    if golden.name not in loaded:
        loaded[golden.name] = load(golden_checkpoints[golden.name])
    return nnx.merge(*nnx.split(loaded[golden.name]))


@pytest.fixture
def refused(capsys):
    """(command's entry, its arguments) -> the one line with which it refuses them."""

    def refused(main: "Main", argv: Sequence[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.count("error: ") == 1
        *_, line = said.splitlines()
        assert line.startswith("error: ")
        return line

    return refused


@pytest.fixture(scope="session")
def storage(tmp_path_factory) -> "Iterator[Storage]":
    """A storage to which gs:// leads in this process and in those that it starts; all tests share
    it, since the libraries ask once where it is."""
    import fsspec.config

    from tests.bucket_server import serving

    with serving() as storage, pytest.MonkeyPatch.context() as patch:
        for name, value in storage.environment.items():
            patch.setenv(name, value)
        patch.setenv("PVM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(fsspec.config.conf["gcs"], "token", "anon")
        pytest.importorskip("gcsfs", reason="gs:// is read by gcsfs")
        yield storage


@pytest.fixture(scope="session")
def s3() -> "Iterator[S3]":
    """A server to which s3:// leads in this process and in those that it starts."""
    pytest.importorskip("moto.server", reason="s3:// in the tests leads to moto's server")
    s3fs = pytest.importorskip("s3fs", reason="s3:// is read by s3fs")

    from tests.s3_server import serving

    with serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def server(request) -> "Storage | S3":
    """Of `bucket`: a test of both kinds is marked with tests.both_buckets."""
    return request.getfixturevalue(getattr(request, "param", "storage"))


@pytest.fixture
def bucket(server, storage) -> Iterator[Path]:
    """A bucket of its own."""
    from pvm_jax.files.paths import any_path

    name = f"bucket-{next(storage.generations)}"
    server.make(name)
    yield any_path(f"{server.scheme}://{name}")
    server.fault = lambda method, path: None
    server.remove(name)
