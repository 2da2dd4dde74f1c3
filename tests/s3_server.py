"""moto's Amazon S3 on localhost, with the ways in which a real one fails."""

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

from tests.bucket_server import CUT

_ACCOUNT = "123456789012"  # moto's


@dataclass
class S3:
    """A server of buckets.

    Attributes:
        fault: (method, path) -> the status of an answer that fails (CUT: the connection is cut), or
            None.
    """

    scheme = "s3"
    address: str = ""
    fault: Callable[[str, str], int | None] = lambda method, path: None

    @property
    def environment(self) -> dict[str, str]:
        """By which the libraries of a process come here."""
        keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "none")
        return {"AWS_ENDPOINT_URL": self.address, "AWS_DEFAULT_REGION": "us-east-1"} | keys

    @property
    def _backend(self) -> Any:
        from moto.s3.models import s3_backends

        return s3_backends[_ACCOUNT]["aws"]

    def make(self, bucket: str) -> None:
        self._backend.create_bucket(bucket, "us-east-1")

    def remove(self, bucket: str) -> None:
        self._backend.get_bucket(bucket).keys.clear()
        self._backend.delete_bucket(bucket)

    def keys(self, bucket: str) -> list[str]:
        """Of everything in `bucket`."""
        return list(self._backend.buckets[bucket].keys)

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        """A WSGI application: moto's, unless the answer is to fail."""
        status = self.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if status is None:
            return self._moto(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if status == CUT:
            start_response("200 OK", [("Content-Length", "1000")])
            return _half(environ["werkzeug.socket"])
        said = b"<Error><Code>%s</Code><Message>as told</Message></Error>"
        code = {403: b"AccessDenied", 503: b"SlowDown"}[status]
        start_response(f"{status} as told", [("Content-Type", "application/xml")])
        # HEAD is answered without a body: one that arrives with its header is an error to aiohttp.
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [said % code]

    def __post_init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._moto = DomainDispatcherApplication(create_backend_app)


def _half(connection: socket.socket) -> Iterator[bytes]:
    yield b"half"
    connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving() -> Iterator[S3]:
    """A server that answers until the block ends."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: object) -> None:
            pass

    storage = S3()
    server = make_server("127.0.0.1", 0, storage, threaded=True, request_handler=Quiet)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    storage.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield storage
    finally:
        server.shutdown()
        thread.join()
