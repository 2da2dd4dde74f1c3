"""A path as a user writes it."""

import os
import re
from pathlib import Path
from typing import Any

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # as Path writes it too, which keeps one slash


def local_path(path: str | Path) -> Path:
    """`path` with `~` for the home directory; what is on no local or mounted file system is
    refused.

    Raises:
        ValueError: for a URL (gs://, s3://, hf://, https://), the home of a user who is not known
            here, and an empty text, which would be the working directory.
    """
    text = str(path)
    if path == "":
        raise ValueError("a path is empty: the working directory is called .")
    if found := _URL.match(text):
        raise ValueError(
            f"{found[1]}://{text[found.end() :]} is a URL: give a path of this machine, of a"
            " mounted bucket (docs/tpu.md) or of a copy of the files"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"{text}: there is no such user here; ./{text} is a file of this name")
    return Path(expanded)


def make_local(options: Any, *names: str) -> None:
    """Puts `local_path` of these fields of a frozen dataclass in their place: str stays str; None
    stays. Raises ValueError as that does, naming the field."""
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        try:
            object.__setattr__(options, name, type(value)(local_path(value)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
