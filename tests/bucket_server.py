"""A small Google Cloud Storage on localhost: what gcsfs, google-cloud-storage and TensorStore ask
of the real one to read and write objects, and the ways in which it fails.

(gcp-storage-emulator gives no generations, without which TensorStore reads nothing.)
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from itertools import count
from threading import Lock
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.local_server import answering

CUT = 0
"""In place of a status: the connection ends in the middle of the answer."""

_S3 = pytest.param("s3", marks=pytest.mark.slow)  # each request takes moto milliseconds
both_buckets = pytest.mark.parametrize("server", ["storage", _S3], indirect=True)
"""Of a test: its bucket is one of gs://, and among the slow tests one of s3:// too."""


@dataclass
class Storage:
    """What is stored, and how it fails.

    Attributes:
        buckets: name -> key -> (generation, content).
        fault: (method, path) -> the status of an answer that fails (CUT: the connection is cut), or
            None.
        asked: "METHOD path" of every request.
    """

    scheme = "gs"
    address: str = ""
    buckets: dict[str, dict[str, tuple[int, bytes]]] = field(default_factory=dict)
    fault: Callable[[str, str], int | None] = lambda method, path: None
    asked: list[str] = field(default_factory=list)
    uploads: dict[str, tuple[str, str, str, bytearray]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    generations: Iterator[int] = field(default_factory=lambda: count(1_000_000))

    @property
    def environment(self) -> dict[str, str]:
        """By which the libraries of a process come here."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "NO_GCE_CHECK": "true",
            "GCE_METADATA_HOST": "127.0.0.1:9",
            "GCE_METADATA_ROOT": "127.0.0.1:9",
            "GOOGLE_CLOUD_PROJECT": "none",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def make(self, bucket: str) -> None:
        self.buckets[bucket] = {}

    def remove(self, bucket: str) -> None:
        del self.buckets[bucket]

    def keys(self, bucket: str) -> list[str]:
        """Of everything in `bucket`."""
        return list(self.buckets[bucket])

    def files(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Keys below `prefix` and what they hold."""
        return {
            key[len(prefix) :]: content
            for key, (_, content) in self.buckets[bucket].items()
            if key.startswith(prefix)
        }


class _Failed(Exception):
    def __init__(self, status: int):
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    storage: Storage
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: value[0] for key, value in parse_qs(url.query).items()}
        path = re.sub(r"^(/upload|/download)?(/storage/v1)?", "", url.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        self.storage.asked.append(f"{self.command} {unquote(path)}")
        self.fails = self.storage.fault(self.command, unquote(path))
        if self.fails:
            return self._answer(self.fails, b'{"error": {"message": "as told"}}')
        bucket, objects, key = path.removeprefix("/b/").partition("/o")
        try:
            with self.storage.lock:
                self._object(unquote(bucket), key.removeprefix("/") if objects else None)
        except _Failed as error:
            self._answer(error.status, json.dumps({"error": {"message": self.path}}).encode())

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _object(self, bucket: str, key: str | None) -> None:
        """What is asked of an object, of all of them ("") or of the bucket itself (None)."""
        if bucket not in self.storage.buckets:
            raise _Failed(404)
        stored = self.storage.buckets[bucket]
        if self.path.startswith("/upload"):
            return self._upload(bucket)
        if key is None:
            return self._json({"kind": "storage#bucket", "name": bucket, "location": "US"})
        if not key:
            return self._list(bucket, stored)
        generation, content = self._get(stored, key)
        if self.command == "DELETE":
            del stored[unquote(key)]
            return self._answer(204, b"")
        if self.query.get("alt") != "media":
            return self._json(_resource(bucket, unquote(key), generation, content))
        headers = {"x-goog-generation": str(generation), "ETag": f'"{generation}"'}
        start, last = 0, len(content) - 1
        if asked := self.headers.get("Range"):
            first, _, end = asked.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(len(content) - int(end), 0)
            last = min(int(end), last) if first and end else last
            if start >= len(content):
                raise _Failed(416)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        self._answer(206 if asked else 200, content[start : last + 1], headers)

    def _get(self, stored: dict[str, tuple[int, bytes]], key: str) -> tuple[int, bytes]:
        """Generation and content. Raises as the conditions of the request say."""
        found = stored.get(unquote(key))
        given = self.query.get("ifGenerationMatch")
        if found is None:
            raise _Failed(404 if given in (None, "0") else 412)
        if given not in (None, str(found[0])):
            raise _Failed(412)
        if self.query.get("ifGenerationNotMatch") == str(found[0]):
            raise _Failed(304)
        return found

    def _list(self, bucket: str, stored: dict[str, tuple[int, bytes]]) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        after, before = self.query.get("startOffset", ""), self.query.get("endOffset")
        items, prefixes = [], set()
        for key in sorted(stored):
            if not key.startswith(prefix) or key < after or (before and key >= before):
                continue
            head, found, _ = key[len(prefix) :].partition(delimiter or "\0")
            if delimiter and found:
                prefixes.add(prefix + head + delimiter)
            else:
                items.append(_resource(bucket, key, *stored[key]))
        items = items[: int(self.query.get("maxResults", len(items)))]
        self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _upload(self, bucket: str) -> None:
        kind = self.query.get("uploadType")
        if "upload_id" in self.query:
            return self._go_on(self.query["upload_id"])
        if kind == "media":
            return self._json(self._put(bucket, self.query["name"], self.body))
        if kind == "multipart":
            mark = (
                b"--" + self.headers["Content-Type"].partition("boundary=")[2].strip("'\"").encode()
            )
            _, about, content = self.body[: self.body.rindex(mark)].split(mark, 2)
            key = self.query.get("name") or json.loads(_after_header(about))["name"]
            return self._json(self._put(bucket, key, _after_header(content)[:-1]))
        key = self.query.get("name") or json.loads(self.body)["name"]
        self._condition(bucket, key)
        name = str(next(self.storage.generations))
        condition = self.query.get("ifGenerationMatch", "")
        self.storage.uploads[name] = (bucket, key, condition, bytearray())
        where = f"{self.storage.address}/upload/storage/v1/b/{bucket}/o?upload_id={name}"
        self._answer(200, b"", {"Location": where})

    def _go_on(self, name: str) -> None:
        bucket, key, condition, content = self.storage.uploads[name]
        if self.command == "DELETE":
            return self._answer(499, b"")
        place = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers["Content-Range"])
        assert place
        if place[1]:
            content[int(place[1]) :] = self.body
        if place[3] == "*" or len(content) < int(place[3]):
            return self._answer(308, b"", {"Range": f"bytes=0-{len(content) - 1}"})
        if condition:
            self.query["ifGenerationMatch"] = condition
        self._json(self._put(bucket, key, bytes(content)))

    def _condition(self, bucket: str, key: str) -> None:
        generation, _ = self.storage.buckets[bucket].get(key, (0, b""))
        if self.query.get("ifGenerationMatch") not in (None, str(generation)):
            raise _Failed(412)

    def _put(self, bucket: str, key: str, content: bytes) -> dict[str, object]:
        self._condition(bucket, key)
        generation = next(self.storage.generations)
        self.storage.buckets[bucket][key] = generation, content
        return _resource(bucket, key, generation, content)

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if status in (204, 304):
            body = b""  # a client that keeps the connection would read it as the next answer
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.fails == CUT and self.fails is not None:
            self.close_connection = True
            body = body[: len(body) // 2]
        if self.command != "HEAD":
            self.wfile.write(body)


def _after_header(part: bytes) -> bytes:
    return re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]


def _resource(bucket: str, key: str, generation: int, content: bytes) -> dict[str, object]:
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": key,
        "generation": str(generation),
        "metageneration": "1",
        "size": str(len(content)),
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
        "contentType": "application/octet-stream",
    }


@contextmanager
def serving(*buckets: str) -> Iterator[Storage]:
    """A storage with these buckets that answers until the block ends."""
    storage = Storage(buckets={bucket: {} for bucket in buckets})
    with answering(_Handler, storage=storage) as storage.address:
        yield storage
