"""Paths in buckets: gs://, s3:// and az://, with the methods of pathlib.Path that this project
calls.

fsspec reads and writes what is there, as it does for Orbax, whose paths are etils.epath's on top of
it. epath's own methods are not called: to them, what is closed or cannot be reached is "not there",
and would be written over.
"""

import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, Self

import fsspec
import fsspec.config
from etils.epath.gpath import PosixGPath
from fsspec.asyn import FSTimeoutError, sync

# Orbax's paths would go through TensorFlow where it is installed, to other credentials and errors.
os.environ.setdefault("EPATH_USE_TF", "false")

SCHEMES = {"gs": "gcs", "s3": "s3", "az": "az"}
"""Of URLs, and what fsspec calls their protocol. Others write there beside us, Orbax among them:
nothing that was listed is remembered."""

for _protocol in SCHEMES.values():
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)

# What these log they raise too, and a user reads it in one line.
for _library in ("gcsfs", "google.auth"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)

CONTACT_SECONDS = 60.0

# TensorStore, which reads and writes arrays for Orbax, would wait for ever where nothing is sent.
for _limit, _number in {
    "CONNECT_TIMEOUT_SECONDS": CONTACT_SECONDS,
    "LOW_SPEED_TIME_SECONDS": CONTACT_SECONDS,
    "LOW_SPEED_LIMIT_BYTES": 1,
}.items():
    os.environ.setdefault(f"TENSORSTORE_CURL_{_limit}", f"{_number:.0f}")

_PACKAGES = {"gs": "'pvm-jax[gcs]'", "s3": "'pvm-jax[s3]'", "az": "adlfs"}
_LOG_IN = {
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "`aws configure`, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


class BucketError(OSError):
    """A bucket is closed to us, does not exist or cannot be reached."""


@contextmanager
def reaching(path: PurePath) -> Iterator[None]:
    """Turns whatever the libraries raise of what is at `path` into a BucketError of one line; that
    it is not there, or there already, stays what it is."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, BucketError):
        raise
    except ImportError as error:
        scheme = str(path).partition(":")[0]
        raise ImportError(
            f"{path}: a package that reads {scheme}:// is missing: pip install {_PACKAGES[scheme]}"
        ) from error
    except FSTimeoutError as error:
        waited = f"no answer in {CONTACT_SECONDS:.0f} s"
        raise BucketError(f"{path} cannot be reached: {waited}") from error
    except Exception as error:  # those of HTTP clients and of credentials have no base in common
        raise BucketError(f"{path} {_reason(path, error)}") from error


def _reason(path: PurePath, error: BaseException) -> str:
    said = " ".join(str(error).split()) or "no message"
    code = getattr(error, "code", None)
    denied = isinstance(error, PermissionError) or code in (401, 403) or "Forbidden" in said
    if denied or any(word in type(error).__name__ for word in ("Credentials", "Auth", "Refresh")):
        log_in = _LOG_IN.get(str(path).partition(":")[0], "the credentials of this machine")
        return f"is closed to this user ({said[:200]}): {log_in}"
    return f"cannot be reached ({type(error).__name__}: {said[:200]})"


_choosing = threading.Lock()


def _choose_credentials() -> None:
    """Decides for all of this process, Orbax's paths among it, whether gs:// is asked with the
    user's credentials or without any. gcsfs by itself asks for half a minute more whether there are
    some, goes on without those that cannot be read, and tries those that count no longer for a
    minute."""
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    options = fsspec.config.conf["gcs"]
    with _choosing:
        if "token" in fsspec.config.conf.get("gs", {}) | options:
            return
        try:
            google.auth.default()
        except DefaultCredentialsError:
            if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                raise
            options["token"] = "anon"
            return
        files = fsspec.filesystem("gcs", token="google_default")

        async def refresh() -> None:
            files.credentials.maybe_refresh()

        sync(files.loop, refresh, timeout=CONTACT_SECONDS)
        options["token"] = "google_default"


class BucketPath(PosixGPath):
    """A path in a bucket.

    Directories are names with a slash in them: they need not be made, and an empty one is none.
    What is written appears whole, when its file is closed.

    Raises:
        BucketError: from every method that asks the bucket, if it gives no answer.
    """

    @property
    def files(self) -> Any:
        """The file system of fsspec."""
        scheme = str(self).partition(":")[0]
        with reaching(self):
            if scheme == "gs":
                _choose_credentials()
            return fsspec.filesystem(SCHEMES[scheme])

    def info(self) -> dict[str, Any] | None:
        """What fsspec knows of what is here; None: there is nothing."""
        with reaching(self):
            try:
                return self._asked("info")
            except FileNotFoundError:
                return None

    def _asked(self, method: str, *arguments: Any, **options: Any) -> Any:
        """What fsspec's `method` gives for this path, if it does within CONTACT_SECONDS: the
        libraries try again for minutes, which is too long to hear that there is no network."""
        files = self.files
        ask = getattr(files, f"_{method}")  # fsspec's name of its asynchronous form
        return sync(files.loop, ask, str(self), *arguments, timeout=CONTACT_SECONDS, **options)

    def exists(self) -> bool:
        return self.info() is not None

    def is_file(self) -> bool:
        return (self.info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self.info() or {}).get("type") == "directory"

    def stat(self) -> os.stat_result:  # type: ignore[override]
        """Kind and size alone."""
        info = self.info()
        if info is None:
            raise FileNotFoundError(f"{self} does not exist")
        kind = stat.S_IFDIR if info["type"] == "directory" else stat.S_IFREG
        return os.stat_result((kind, 0, 0, 1, 0, 0, info.get("size") or 0, 0, 0, 0))

    def absolute(self) -> Self:
        return self

    def resolve(self, strict: bool = False) -> Self:
        return self

    def iterdir(self) -> Iterator[Self]:
        with reaching(self):
            names = self._asked("ls", detail=False)
        yield from (one for one in map(self._named, names) if one != self)

    def glob(self, pattern: str) -> Iterator[Self]:
        """What matches, `**` included."""
        with reaching(self):
            names = self.files.glob(f"{self}/{pattern}")
        yield from map(self._named, names)

    def rglob(self, pattern: str) -> Iterator[Self]:
        return self.glob(f"**/{pattern}")

    def _named(self, name: str) -> Self:
        return type(self)(f"{str(self).partition(':')[0]}://{name.rstrip('/')}")

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a bucket is not made, and a directory needs no making."""

    def unlink(self, missing_ok: bool = False) -> None:
        with reaching(self):
            try:
                self.files.rm_file(str(self))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def rmtree(self, missing_ok: bool = False) -> None:
        with reaching(self):
            try:
                self.files.rm(str(self), recursive=True)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def open(self, mode: str = "r", **options: Any) -> Any:  # type: ignore[override]
        with reaching(self):
            return self.files.open(str(self), mode, **options)

    def read_bytes(self) -> bytes:
        with reaching(self):
            return self.files.cat_file(str(self))

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        with self._writing():
            self.files.pipe_file(str(self), data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def create(self, data: bytes) -> None:
        """Writes a file that is not there yet. Raises FileExistsError if it is: of several who try,
        one succeeds."""
        with self._writing():
            self._asked("pipe_file", data, mode="create")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with reaching(self):
                yield
        except FileNotFoundError as error:  # nothing but the bucket must be there to write
            raise BucketError(f"{self}: there is no such bucket") from error
