"""Paths in a bucket: what pathlib's methods do there, and what they say when the bucket fails."""

import asyncio
import json
import os
import threading
from collections.abc import Awaitable
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace

import fsspec.config
import pytest

from pvm_jax.files import bucket as module
from pvm_jax.files import lease
from pvm_jax.files.bucket import BucketError
from pvm_jax.files.cache import local_copies, local_copy
from pvm_jax.files.lock import sole_writer
from pvm_jax.files.paths import any_path
from pvm_jax.files.writing import Growing, check_writable, remove_tree, write_whole
from tests.bucket_server import CUT, both_buckets
from tests.local_server import answering


@both_buckets
def test_files_and_directories(bucket):
    file = bucket / "a" / "b.txt"
    assert not file.exists()
    assert not file.parent.is_dir()
    write_whole(file, b"four")
    file.with_name("c.txt").write_text("ö")
    assert file.is_file()
    assert not file.is_dir()
    assert file.parent.is_dir()
    assert not file.parent.is_file()
    assert file.stat().st_size == 4
    assert sorted(file.parent.iterdir()) == [file, file.with_name("c.txt")]
    assert file.with_name("c.txt").read_text() == "ö"
    assert list(bucket.glob("a/[!.]*.txt")) == sorted(bucket.rglob("*.txt"))
    file.unlink()
    file.unlink(missing_ok=True)
    check_writable(bucket / "a")
    assert [one.name for one in (bucket / "a").iterdir()] == ["c.txt"]
    remove_tree(bucket / "a")
    remove_tree(bucket / "a")
    assert not (bucket / "a").exists()


@both_buckets
def test_what_grows_is_sent_whole(bucket, tmp_path):
    for file in (bucket / "grows", tmp_path / "grows"):
        for word in (b"one ", b"two "):
            with Growing(file, every=0) as growing:
                growing.write(word)
                growing.flush()
                assert file.read_bytes().endswith(word)
        assert file.read_bytes() == b"one two "


def test_a_copy_is_of_what_is_there_now_and_leaves_when_room_is_short(
    bucket, tmp_path, monkeypatch
):
    monkeypatch.setenv("PVM_JAX_CACHE", str(tmp_path / "cache"))
    files = [bucket / name for name in "abc"]
    for file in files:
        file.write_bytes(file.name.encode() * 300)
    assert local_copy(files[0]).read_bytes() == b"a" * 300
    files[0].write_bytes(b"z")
    assert local_copy(files[0]).read_bytes() == b"z"
    (kept,) = local_copies(files[1:2])
    monkeypatch.setenv("PVM_JAX_CACHE_GIB", str(400 / 2**30))
    local_copy(files[2])
    assert kept.is_file()
    assert [copy.read_bytes() for copy in (tmp_path / "cache").iterdir()] == [b"b" * 300]
    with pytest.raises(
        OSError, match=r"copies of files in buckets may take .* \(PVM_JAX_CACHE_GIB"
    ):
        local_copies(files)
    assert local_copy(tmp_path) == tmp_path


def test_the_copies_are_looked_through_now_and_then(bucket, tmp_path, monkeypatch):
    """And what a process that was killed left of one goes first."""
    place, looks, scandir = tmp_path / "cache", [], os.scandir

    def look(folder):
        looks.append(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", look)
    monkeypatch.setenv("PVM_JAX_CACHE", str(place))
    monkeypatch.setenv("PVM_JAX_CACHE_GIB", str(20_000 / 2**30))
    place.mkdir()
    left, written = place / ".left.partial", place / ".written.partial"
    left.write_bytes(b"x" * 19_900)
    written.write_bytes(b"x")
    os.utime(left, (0, 0))
    for number in range(30):
        (bucket / str(number)).write_bytes(b"x" * 100)
        local_copy(bucket / str(number))
    assert looks.count(place) == 1 + 2900 // 200
    assert not left.exists()
    assert written.exists()
    monkeypatch.setenv("PVM_JAX_CACHE_GIB", str(1000 / 2**30))
    local_copy(bucket / "0")
    (bucket / "0").write_bytes(b"y" * 100)
    local_copy(bucket / "0")
    assert sum(file.stat().st_size for file in place.iterdir()) <= 1000


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (403, r"is closed to this user \(.*\): `gcloud auth application-default login`"),
        (401, r"is closed to this user \(.*\): `gcloud auth application-default login`"),
        (400, r"cannot be reached \(HttpError: as told, 400\)"),
    ],
)
def test_a_bucket_that_refuses_is_not_an_empty_one(bucket, storage, status, said):
    file = bucket / "a"
    file.write_bytes(b"here")
    storage.fault = lambda method, path: status
    for ask in (file.exists, file.is_dir, lambda: list(bucket.iterdir()), file.read_bytes):
        with pytest.raises(BucketError, match=f"^gs://{bucket.name}/?a? {said}"):
            ask()
    with pytest.raises(OSError, match=f"^{bucket}/out cannot be written .*: choose another place$"):
        sole_writer(bucket / "out").__enter__()


def test_an_answer_that_fails_once_is_asked_for_again(bucket, storage, monkeypatch):
    def soon(seconds: float) -> Awaitable[None]:
        return asyncio.sleep(seconds / 100)

    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=soon))  # it waits 1 s and more
    failing = [503, CUT]
    storage.fault = lambda method, path: failing.pop() if failing else None
    (bucket / "a").write_bytes(b"x" * 1000)
    failing += [CUT]
    assert (bucket / "a").read_bytes() == b"x" * 1000
    assert not failing


def test_no_bucket(storage):
    with pytest.raises(OSError, match=r"not-there/a cannot be written .*no such bucket"):
        sole_writer("gs://not-there/a").__enter__()
    assert not any_path("gs://not-there/a").exists()
    with pytest.raises(OSError, match=r"^gs://not-there/\..*: there is no such bucket"):
        check_writable(any_path("gs://not-there"))


def test_no_network_is_told_soon(bucket, storage, monkeypatch):
    monkeypatch.setattr(module, "CONTACT_SECONDS", 0.5)
    storage.fault = lambda method, path: 503
    with pytest.raises(BucketError, match=f"^{bucket}/a cannot be reached: no answer in 0 s$"):
        (bucket / "a").exists()


class Refusing(BaseHTTPRequestHandler):
    """Gives no token: at once, or not at all."""

    silent: threading.Event | None = None

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        if self.silent:
            self.silent.wait(30)
        body = b'{"error": "invalid_grant", "error_description": "revoked"}'
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class TestCredentials:
    @pytest.fixture(autouse=True)
    def asked(self, storage, monkeypatch, tmp_path):
        """As if nothing had been decided; nothing of another test's is known."""
        monkeypatch.delitem(fsspec.config.conf["gcs"], "token")
        fsspec.filesystem("gcs", token="anon").clear_instance_cache()
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
        yield
        fsspec.filesystem("gcs", token="anon").clear_instance_cache()

    def account(self, file, address):
        rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            NoEncryption,
            PrivateFormat,
        )

        key = rsa.generate_private_key(65537, 2048).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        account = {"client_email": "a@b", "token_uri": address, "private_key": key.decode()}
        file.write_text(json.dumps({"type": "service_account", "project_id": "p"} | account))

    def test_a_file_that_is_missing_or_broken(self, tmp_path):
        for said in ("account.json was not found", "account.json is not a valid json file"):
            with pytest.raises(BucketError, match=rf"^gs://b/a is closed to this user \(.*{said}"):
                any_path("gs://b/a").exists()
            (tmp_path / "account.json").write_text("{")

    def test_those_that_count_no_longer(self, tmp_path):
        with answering(Refusing) as address:
            self.account(tmp_path / "account.json", address)
            told = r"^gs://b/a is closed to this user \(Invalid Credentials, 401\): `gcloud auth"
            with pytest.raises(BucketError, match=told):
                any_path("gs://b/a").exists()

    def test_a_server_that_does_not_answer(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "CONTACT_SECONDS", 0.5)
        silent = threading.Event()
        with answering(Refusing, silent=silent) as address:
            self.account(tmp_path / "account.json", address)
            try:
                with pytest.raises(BucketError, match=r"^gs://b/a cannot be reached: no answer in"):
                    any_path("gs://b/a").exists()
            finally:
                silent.set()

    def test_none_are_asked_for_once(self, monkeypatch, bucket):
        monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
        monkeypatch.setenv("HOME", "/nowhere")
        monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
        assert not (bucket / "a").exists()
        assert fsspec.config.conf["gcs"]["token"] == "anon"
        monkeypatch.setattr("google.auth.default", lambda: pytest.fail("asked again"))
        assert not (bucket / "a").exists()


@both_buckets
class TestLock:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        monkeypatch.setattr(lease, "BEAT", 0.3)
        lost = []
        monkeypatch.setattr(os, "_exit", lost.append)
        yield
        assert not lost

    def test_a_second_writer_is_refused_and_a_third_is_not(self, bucket):
        refusal = pytest.raises(OSError, match="/run is being written by another process: wait")
        with sole_writer(bucket / "run", lock=bucket / "run" / ".lock"), refusal:
            sole_writer(bucket / "run", lock=bucket / "run" / ".lock").__enter__()
        with sole_writer(bucket / "run", lock=bucket / "run" / ".lock"):
            pass
        assert not (bucket / "run").exists()

    def test_who_was_not_heard_of_ends(self, bucket, monkeypatch, capsys):
        ended = threading.Event()

        def end(status):
            ended.set()
            raise SystemExit(status)  # of the thread

        monkeypatch.setattr(os, "_exit", end)
        with sole_writer(bucket / "a"):
            (bucket / ".a.lock").write_text("host 1 another 1")
            assert ended.wait(30)
        assert "was taken by another process" in capsys.readouterr().err
        assert (bucket / ".a.lock").read_text() == "host 1 another 1"

    def test_that_of_a_process_that_was_killed_is_taken_once(self, bucket):
        (bucket / ".a.lock").write_text("host 1 of_a_dead_process 7")
        got, go = [], threading.Event()

        def take():
            try:
                with sole_writer(bucket / "a"):
                    got.append(True)
                    go.wait(2)
            except OSError:
                got.append(False)
                go.set()

        threads = [threading.Thread(target=take) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False, True]
