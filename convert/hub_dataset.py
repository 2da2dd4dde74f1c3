"""A data set of the Hub as files of this machine: which of them a subset and a split are."""

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml
from huggingface_hub import HfUri, metadata_load

from pvm_jax.files.hub import HubError, fetch, fetch_one, names_of

_CARD = "README.md"
_READ = (".parquet", ".jsonl", ".jsonl.gz", ".json")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SPLITS = {
    "train": r"train(?:ing)?",
    "validation": r"validation|valid|val|dev",
    "test": r"test(?:ing)?|eval(?:uation)?",
}
"""What the library `datasets` takes for a split in the name of a file or folder."""
_GLOB = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}


PAUSES = (10.0, 60.0, 300.0)
"""Seconds after which the Hub is asked again for a file of which others have been read already."""


class HubData(NamedTuple):
    """A part of a data set.

    Attributes:
        of: the data set.
        folder: where the library keeps the files of its commit.
        files: their names in the repository.
        pictures: where the files are JSON, those that may lie beside.
        name: what the part is called, its commit included.
    """

    of: HfUri
    folder: Path
    files: list[str]
    pictures: list[str]
    name: str


def find_dataset(of: HfUri, *, subset: str | None, split: str | None) -> HubData:
    """Asks which files one split is.

    Args:
        subset, split: None where there is but one, or the data set's card says which is meant.

    Raises:
        HubError: if the Hub does not say.
        ValueError: if it is not said which part is meant, or none of its files is read here.
    """
    folder = fetch(of, [_CARD])
    names, called = names_of(of, folder), of.to_uri()
    if of.path_in_repo:
        if subset or split:
            raise ValueError(f"{called} says which files: leave --subset and --split out")
        chosen = _matching(names, [of.path_in_repo, f"{of.path_in_repo}/**"])
    else:
        try:
            card = metadata_load(folder / _CARD) if (folder / _CARD).exists() else None
            splits = _splits(called, names, card or {}, subset)
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{called}: the configs of its {_CARD} are not understood: give files, {_form(of)}"
            ) from error
        split = _choice(called, "split", list(splits), split, None)
        chosen = splits[split]
    chosen = sorted(name for name in chosen if Path(name).name not in _ABOUT)
    unread = [name for name in chosen if not name.endswith(_READ)]
    if unread or not chosen:
        found = f"{unread[0]} is not read" if unread else "no file is there"
        raise ValueError(f"{called}: {found}: {', '.join(_READ)} are; give files, {_form(of)}")
    beside = [] if chosen[0].endswith(".parquet") else _ending(names, _PICTURES)
    name = f"hf://datasets/{of.id}@{folder.name}/{of.path_in_repo}".rstrip("/")
    part = ", ".join(f"{key} {value}" for key, value in _named(subset=subset, split=split))
    return HubData(of, folder, chosen, beside, f"{name} ({part})" if part else name)


def fetched(data: HubData) -> list[Path]:
    """The files, with the pictures beside them. Raises HubError if the Hub does not give them."""
    names = [escape(name) for name in (*data.files, *data.pictures)]
    fetch(data.of, names, beside=data.folder)
    return [data.folder / name for name in data.files]


def one_by_one(data: HubData) -> Iterator[Path]:
    """Each of the files, in the system's directory for temporary files: fetched when it is asked
    for, removed when the next one is. From the second on, the Hub may fail for some minutes.

    Raises:
        HubError: if it does not give one.
        ValueError: if pictures lie beside the files: one would have to fetch them all.
    """
    if data.pictures:
        raise ValueError(
            f"{data.name}: {data.files[0]} may show the pictures that lie beside it, as"
            f" {data.pictures[0]}: --stream reads files that hold their pictures; leave it out"
        )
    with TemporaryDirectory() as room:
        for number, name in enumerate(data.files):
            try:
                file = _patiently_fetched(data, name, Path(room), PAUSES if number else ())
            except HubError as error:
                if not number:
                    raise
                raise HubError(
                    f"{error}. Nothing is kept of the {number} of {len(data.files)} files that were"
                    " read: the same command starts over; patterns convert them in parts"
                ) from error
            yield file
            file.unlink()


def _patiently_fetched(data: HubData, name: str, room: Path, pauses: Sequence[float]) -> Path:
    for pause in pauses:
        try:
            return fetch_one(data.of, name, room, commit=data.folder.name)
        except HubError as error:
            print(f"{error}: asking again in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)
    return fetch_one(data.of, name, room, commit=data.folder.name)


def _named(**values: str | None) -> list[tuple[str, str]]:
    return [(key, value) for key, value in values.items() if value]


def _form(of: HfUri) -> str:
    return f"hf://datasets/{of.id}/PATH, where PATH may be a pattern"


def _splits(
    called: str, names: Sequence[str], card: Mapping[str, Any], subset: str | None
) -> dict[str, Sequence[str]]:
    """{split: its files}, as the card says it, or where it does not, as the names do."""
    configs = {one.get("config_name", "default"): one for one in card.get("configs") or []}
    if not configs:
        if subset is not None:
            raise ValueError(f"{called} names no subsets in its card: leave --subset out")
        return _by_name(_ending(names, _READ))
    marked = [name for name, one in configs.items() if one.get("default") or name == "default"]
    subset = _choice(called, "subset", list(configs), subset, marked[0] if marked else None)
    files, folder = configs[subset].get("data_files"), configs[subset].get("data_dir")
    if files is None:
        inside = _matching(names, [f"{folder}/**"]) if folder else names
        return _by_name(_ending(inside, _READ))
    if isinstance(files, str) or all(isinstance(one, str) for one in files):
        files = [{"split": "train", "path": files}]
    prefix = f"{folder}/" if folder else ""
    return {
        one["split"]: _matching(names, [prefix + path for path in _listed(one["path"])])
        for one in files
    }


def _choice(called: str, what: str, there: list[str], asked: str | None, default: Any) -> str:
    if asked is None and (default is not None or len(there) == 1):
        return default or there[0]
    if asked not in there:
        has = f"has the {what}s {', '.join(there)}" if there else f"has no {what} that is read here"
        raise ValueError(f"{called} {has}: choose one with --{what}")
    return asked


def _by_name(names: Sequence[str]) -> dict[str, Sequence[str]]:
    """{split: the files whose names, or else folders, speak of it}; all of them are to train on
    where none does."""
    names = [name for name in names if Path(name).name not in _ABOUT]
    found: dict[str, Sequence[str]] = {}
    for split, words in _SPLITS.items():
        speaks = re.compile(rf"(?:^|[^a-zA-Z])(?:{words})(?:[^a-zA-Z]|$)")
        if inside := [name for name in names if speaks.search(name)]:
            found[split] = inside
    return found or ({"train": names} if names else {})


def _ending(names: Sequence[str], ends: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.lower().endswith(ends)]


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of `names` that one of the patterns is for, as globs are: only ** crosses folders."""
    parts = re.compile(r"\*\*/|\*\*|\*|\?|[^*?]+")
    every = [parts.sub(lambda m: _GLOB.get(m[0]) or re.escape(m[0]), one) for one in patterns]
    return [name for name in names if re.fullmatch("|".join(every), name)]
