"""The Hugging Face Hub: what an id names, and its files as files of this machine.

All of it is huggingface_hub's: the cache, downloads that go on where they were cut off, and what
its variables say: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import (
    HfApi,
    HfUri,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    parse_hf_uri,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HfUriError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from pvm_jax.files.paths import any_path

SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")
"""A model's files that are no weights."""
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?:@.+)?")
_FILE = re.compile(r".*\.(?:jsonl?|parquet|arrow|safetensors|gz)", re.IGNORECASE)
"""Names of files, which no repository has."""
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class HubError(OSError):
    """The Hub does not give what it is asked for."""


def named_on_hub(given: object, kind: Literal["model", "dataset"] = "model") -> HfUri | None:
    """What `OWNER/NAME`, `OWNER/NAME@REVISION` or `hf://OWNER/NAME` (of a data set
    `hf://datasets/OWNER/NAME`, and a path in it) names; None: a path of this machine.

    What is here is never asked of the Hub, nor what looks as if it were: a Path, a text that begins
    with /, . or ~.

    Raises:
        ValueError: if what begins with hf:// is no such thing.
    """
    if not isinstance(given, str):
        return None
    if given.startswith(constants.HF_PROTOCOL):
        found = parse_hf_uri(given)
        if found.type != kind or (kind == "model" and found.path_in_repo):
            form = "hf://OWNER/NAME" if kind == "model" else "hf://datasets/OWNER/NAME"
            raise ValueError(f"{given} is no {kind}: give {form} or {form}@REVISION")
        return found
    if not _ID.fullmatch(given) or _FILE.fullmatch(given) or Path(given).exists():
        return None
    try:
        return parse_hf_uri(f"{constants.HF_PROTOCOL}{kind}s/{given}")
    except HfUriError:
        return None


def convert_first(path: str | Path, kind: Literal["model", "dataset"] = "model") -> str:
    """What an error of a `path` that is not here adds: what to do if the Hub's was meant. "" if it
    cannot have been, or the folder that it would be in is here."""
    if named_on_hub(str(path), kind) is None or Path(path).parent.exists():
        return ""
    command = "convert" if kind == "model" else "dataset"
    return f"; the Hub's is converted first: pvm {command} {path} DST"


def model_directory(given: str | Path, files: Sequence[str]) -> Path:
    """The directory at `given`, or one with these files of the model that it names on the Hub.

    Raises:
        HubError: if the Hub does not give them.
        ValueError: for another URL (`any_path`).
    """
    on_hub = named_on_hub(given)
    return any_path(given) if on_hub is None else fetch(on_hub, files)


def fetch(of: HfUri, files: Sequence[str], *, beside: Path | None = None) -> Path:
    """The directory, in the library's cache, that holds those of a repository's `files` (names or
    patterns; of a model, no folder's) that there are.

    Args:
        beside: what an earlier call gave: files of the same commit.

    Raises:
        HubError: saying why there are none.
    """
    revision = of.revision if beside is None else beside.name
    with asking(of):
        return Path(
            snapshot_download(
                of.id,
                repo_type=of.type,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=["*/*"] if of.type == "model" else None,
            )
        )


def fetch_one(of: HfUri, name: str, folder: Path, *, commit: str) -> Path:
    """The file `name` of a repository in `folder`, and not in the library's cache.

    Raises:
        HubError: if the Hub does not give it.
    """
    with asking(of, f"{name} is not here, and"):
        return Path(
            hf_hub_download(of.id, name, repo_type=of.type, revision=commit, local_dir=folder)
        )


def names_of(of: HfUri, fetched: Path) -> list[str]:
    """The names of all files of a repository, at the commit of which `fetch` gave a directory."""
    with asking(of):
        tree = get_cached_repo_tree(of.id, repo_type=of.type, revision=fetched.name)
        return [file.path for file in tree]


def make_model(given: str, *, private: bool) -> HfUri:
    """The model OWNER/NAME of the Hub, which is made unless it is there.

    Raises:
        HubError: if it cannot be: without a token that may write there, without a network.
        ValueError: for what is no such name.
    """
    name = given.removeprefix(constants.HF_PROTOCOL)
    try:
        of = parse_hf_uri(f"{constants.HF_PROTOCOL}models/{name}")
    except HfUriError:
        of = None
    if of is None or of.revision or of.path_in_repo:
        raise ValueError(f"--push_to_hub {given}: give OWNER/NAME of the Hub")
    with asking(of, "it is to be written, but"):
        HfApi().create_repo(of.id, private=private or None, exist_ok=True)
    return of


def check_name(flag: str, name: str) -> None:
    """Raises a ValueError that names the flag unless `name` may be a repository's."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{flag} {name}: give OWNER/NAME of the Hub: {error}") from error


def push(folder: Path, to: HfUri, *, message: str) -> None:
    """Sends the files of `folder`; weights that are there and not in it are removed.

    Raises:
        HubError: if they do not arrive.
    """
    stale = ["*.safetensors", "*.safetensors.index.json"]
    with asking(to, f"{folder} is whole and can be sent again by `hf upload`;"):
        HfApi().upload_folder(
            repo_id=to.id, folder_path=folder, commit_message=message, delete_patterns=stale
        )


@contextmanager
def asking(of: HfUri, so_far: str = "nothing of this name is here, and") -> Iterator[None]:
    """Turns whatever the library raises into a HubError that says in one line what to do."""
    try:
        yield
    except Exception as error:  # those of its HTTP client have no base of their own
        name = of.to_uri().removeprefix(f"{constants.HF_PROTOCOL}{of.type}s/")
        raise HubError(
            f"{name}: {so_far} as a {of.type} of {constants.ENDPOINT} {_reason(of, error)}"
        ) from error


def _reason(of: HfUri, error: BaseException) -> str:
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its terms at {of.to_url()}, and {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"it does not exist, or not for everyone: if it is private, {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {of.revision!r}"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return f"it cannot be reached: HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} lacks it"
    if not isinstance(error, HfHubHTTPError):
        said = str(error).splitlines()[0] if str(error) else "no message"
        return f"it cannot be reached ({type(error).__name__}: {said})"
    if error.response.status_code in (401, 403):
        return f"it is closed to this token: {_LOG_IN}"
    said = (error.server_message or error.response.reason_phrase).splitlines()[0]
    return f"it cannot be reached: the server answers {error.response.status_code} ({said})"
