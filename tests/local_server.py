"""A server on localhost, for what asks a Hub or a bucket."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that was killed is none."""


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler], **bound: Any) -> Iterator[str]:
    """The address of a server that answers until the block ends, with `bound` on its handlers."""
    server = _Server(("127.0.0.1", 0), type("_Bound", (handler,), bound))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
