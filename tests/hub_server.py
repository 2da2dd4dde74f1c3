"""A small Hub on localhost: what huggingface_hub asks of the real one to read repositories."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from tests.local_server import answering

REVISION = "1" * 40
TOKEN = "hf_right"


@dataclass
class Hub:
    """What is served, and what was asked.

    Attributes:
        repositories: "models/OWNER/NAME" or "datasets/OWNER/NAME" -> the folder of its files.
        private: those that only TOKEN may see.
        gated: those whose files it refuses, and names of files that it refuses.
        revision: the commit that all have; with other files it must be another.
        cut: names of files of which the next answer ends in the middle.
        made: names of models that were made -> what was asked for.
        commits: the lines of each.
        broken: whether commits fail.
        asked: "METHOD path", and what the Range header held.
    """

    address: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    revision: str = REVISION
    made: dict[str, dict] = field(default_factory=dict)
    commits: list[list[dict]] = field(default_factory=list)
    broken: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def files_given(self) -> set[str]:
        """Names of the files that were sent."""
        return {
            Path(line).name for line, _ in self.asked if line[:3] == "GET" and "/resolve/" in line
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append((f"POST {path}", None))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, b"", {"X-Error-Message": "Invalid username or password."})
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.made[name] = asked
            return self._json({"url": f"{self.hub.address}/{name}"})
        if path.endswith("/preupload/main"):
            files = [
                one | {"uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if path.endswith("/commit/main"):
            if self.hub.broken:
                return self._answer(500, b"", {})
            self.hub.commits.append([json.loads(line) for line in body.splitlines()])
            name = path.removeprefix("api/models/").removesuffix("/commit/main")
            url = f"{self.hub.address}/{name}/commit/{REVISION}"
            return self._json({"commitOid": REVISION, "commitUrl": url})
        self._json({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append((f"{self.command} {path}", self.headers.get("Range")))
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            said = "Invalid credentials in Authorization header"
            return self._answer(401, b"", {"X-Error-Message": said})
        words = path.removeprefix("api/").split("/")
        if words[0] not in ("models", "datasets"):
            words = ["models", *words]
        name, rest = "/".join(words[:3]), words[3:]
        folder = self.hub.repositories.get(name)
        if folder is None or (name in self.hub.private and given is None):
            return self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        revision = "/".join(rest[1:2])
        if revision not in ("main", "", self.hub.revision):
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if rest[:1] == ["resolve"]:
            if self.hub.gated & {name, rest[-1]}:
                return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
            return self._file(folder / "/".join(rest[2:]))
        if rest[:1] == ["tree"]:
            return self._json([_entry(folder, file) for file in _files(folder)])
        self._json({"id": name.partition("/")[2], "sha": self.hub.revision, "siblings": []})

    def _file(self, file: Path) -> None:
        if not file.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": self.hub.revision,
            "Accept-Ranges": "bytes",
        }
        start, last = 0, len(content) - 1
        if asked := self.headers.get("Range"):
            first, _, end = asked.removeprefix("bytes=").partition("-")
            start, last = int(first), min(int(end or last), last)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        self._answer(206 if asked else 200, content[start : last + 1], headers, file.name)

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], file: str = "") -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if file in self.hub.cut:
            self.hub.cut.remove(file)
            self.close_connection = True
            body = body[: len(body) // 2]
        self.wfile.write(body)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _entry(folder: Path, file: Path) -> dict[str, object]:
    oid = hashlib.sha1(file.read_bytes()).hexdigest()
    name = file.relative_to(folder).as_posix()
    return {"type": "file", "path": name, "size": file.stat().st_size, "oid": oid}


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()
    with answering(_Handler, hub=hub) as hub.address:
        yield hub


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    """A Hub that huggingface_hub asks in this process, as HF_ENDPOINT would have it, with a cache
    of its own and nobody logged in."""
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.delenv("HF_TOKEN", raising=False)
        yield hub
