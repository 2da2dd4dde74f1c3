"""A path as a user writes it: of this machine, or of a bucket."""

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, cast

from pvm_jax.files.bucket import SCHEMES, BucketPath

BUCKETS = tuple(f"{scheme}://" for scheme in SCHEMES)
"""How a bucket's path begins."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # as Path writes it too, which keeps one slash

_FROM_HUB = "; the Hub's come here by pvm convert OWNER/NAME DST, and pvm dataset OWNER/NAME DST"


def any_path(path: str | PurePath) -> Path:
    """`path` with `~` for the home directory; of gs://, s3:// and az:// a BucketPath, which has the
    methods of Path (and is called one here, so that they are used alike).

    Raises:
        ValueError: for another URL (hf://, https://), the home of a user who is not known here, and
            an empty text, which would be the working directory.
    """
    text = str(path)
    if path == "":
        raise ValueError("a path is empty: the working directory is called .")
    if found := _URL.match(text):
        url = f"{found[1]}://{text[found.end() :]}"
        if found[1] not in SCHEMES:
            on_hub = found[1] == "hf" or url.startswith("https://huggingface.co/")
            raise ValueError(
                f"{url} is a URL: give a path of this machine, of a bucket (gs://, s3://, az://) or"
                f" of a copy of the files{_FROM_HUB if on_hub else ''}"
            )
        bucket, _, key = text[found.end() :].strip("/").partition("/")
        if not bucket:
            raise ValueError(f"{url} names no bucket")
        key = posixpath.normpath(f"/{key}")  # a bucket would take .. for a name
        return cast(Path, BucketPath(f"{found[1]}://{bucket}{key}"))
    if text.endswith(":") and text[:-1] in SCHEMES:  # as Path writes gs://
        raise ValueError(f"{text}// names no bucket")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"{text}: there is no such user here; ./{text} is a file of this name")
    return Path(expanded)


def local_path(path: str | PurePath) -> Path:
    """`any_path` of what must be of this machine. Raises ValueError for a bucket's too."""
    found = any_path(path)
    if on_bucket(found):
        raise ValueError(f"{found} is in a bucket: this must be a path of this machine")
    return found


def checkpoint_path(path: str | PurePath) -> Path:
    """`any_path` of a checkpoint. Raises ValueError for az://, which TensorStore cannot read."""
    found = any_path(path)
    if str(found).startswith("az://"):
        raise ValueError(
            f"{found}: checkpoints and runs are in gs://, s3:// and on file systems, since"
            " TensorStore, which stores arrays, knows no az://: copy the checkpoint to one of these"
        )
    return found


def on_bucket(path: PurePath) -> bool:
    """Whether `any_path` gave a path in a bucket."""
    return isinstance(path, BucketPath)


def make_paths(options: Any, *names: str, of: Callable[[str | PurePath], Path] = any_path) -> None:
    """Puts `of` these fields of a frozen dataclass in their place: str stays str; None stays.
    Raises ValueError as that does, naming the field."""
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        try:
            found = of(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        object.__setattr__(options, name, str(found) if isinstance(value, str) else found)
