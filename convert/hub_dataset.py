"""A data set of the Hub as files of this machine: which of them a subset and a split are."""

import re
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import HfUri, metadata_load

from pvm_jax.files.hub import fetch, names_of

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


class HubData(NamedTuple):
    """A part of a data set: its files here, and what it is called, its commit included."""

    files: list[Path]
    name: str


def fetch_dataset(of: HfUri, *, subset: str | None, split: str | None) -> HubData:
    """Fetches the files of one split, and where they are JSON, the pictures that may lie beside.

    Args:
        subset, split: None where there is but one, or the data set's card says which is meant.

    Raises:
        OSError: if the Hub does not give them.
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
    fetch(of, [escape(name) for name in (*chosen, *beside)], beside=folder)
    name = f"hf://datasets/{of.id}@{folder.name}/{of.path_in_repo}".rstrip("/")
    part = ", ".join(f"{key} {value}" for key, value in _named(subset=subset, split=split))
    return HubData([folder / name for name in chosen], f"{name} ({part})" if part else name)


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
