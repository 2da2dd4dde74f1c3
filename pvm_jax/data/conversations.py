"""Conversations on disk, read at random: JSON files, Parquet, WebDataset's tar files, a directory
saved by `datasets`, or shards of `convert.dataset`.

Every format holds records, as {"messages": [...], "images": [...]}: chat messages as TRL and
Hugging Face have them, and the pictures that their {"type": "image"} parts show, in order.
docs/data.md has an example of each, and the other conventions.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path, PurePath
from typing import Any

from pvm_jax.data.json_files import JsonFile
from pvm_jax.data.messages import MARKS, Messages, is_learned
from pvm_jax.data.shards import SHARDS_INDEX, Shards
from pvm_jax.data.stored import Conversations, Joined
from pvm_jax.data.tables import SAVED_INDEX, ParquetFiles, SavedDataset
from pvm_jax.data.tars import TarFiles
from pvm_jax.files.hub import convert_first
from pvm_jax.files.paths import any_path, on_bucket
from pvm_jax.files.yaml_file import is_yaml

_IN_DIRECTORIES = (".jsonl", ".jsonl.gz")
_MAY_HOLD_DATA = re.compile(
    r".*\.(?:jsonl?|ndjson|parquet|arrow|csv|tsv)(?:\.(?:gz|zst|bz2|xz|zip))?", re.IGNORECASE
).fullmatch
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json")
"""What `datasets` and LLaMA-Factory write about data."""


def open_conversations(
    path: str | Path | Sequence[str | Path], *, every_column: bool = False
) -> Conversations:
    """Opens a JSON or Parquet file, a directory of another format, or several of these: a pattern
    (`data/train-*.jsonl`) or a list.

    Args:
        every_column: also read what a table holds besides messages and pictures
            (`Conversations.columns`).

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if what is there holds no conversation or is none of the formats.
        ImportError: if it takes pyarrow, and that is not installed.
    """
    if not isinstance(path, str | PurePath):
        given = [any_path(one) for one in path]
        if not given:
            raise ValueError("no path of conversations is given")
        if len(given) != 1:
            return _several(Path(", ".join(map(str, given))), given, every_column)
        (path,) = given
    path = any_path(path)
    if has_magic(str(path)) and not path.exists():
        return _several(path, _matching(path), every_column)
    if path.is_file():
        return _several(path, [path], every_column)
    if path.is_dir():
        return _directory(path, every_column)
    if path.exists():
        raise ValueError(f"{path} is no regular file, nor a directory: copy it into one")
    then = convert_first(path, "dataset")
    if path.name == str(path) and not path.suffix:
        then = "; published data sets are made first: python -m convert.published --help"
    raise FileNotFoundError(f"{path}: no such file or directory of conversations{then}")


def _several(path: Path, members: Sequence[Path], every_column: bool) -> Conversations:
    """`members`, called `path` together."""
    if not members:
        raise FileNotFoundError(f"{path}: no such file of conversations")
    if all(member.suffix == ".parquet" and member.is_file() for member in members):
        return ParquetFiles(path, members, every_column)
    if all(member.suffix == ".tar" and member.is_file() for member in members):
        return TarFiles(path, members)
    if members == [path]:
        if is_yaml(path):
            raise ValueError(
                f"{path}: a mixture file is for the sources of a run alone: give a path in it"
            )
        return JsonFile(path)
    return Joined(path, [open_conversations(one, every_column=every_column) for one in members])


def _directory(path: Path, every_column: bool) -> Conversations:
    if (path / SHARDS_INDEX).is_file():
        return Shards(path)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(str(file.parent) for file in path.glob(f"*/{SAVED_INDEX}"))
        which = " or ".join(splits) or "of which none is there"
        raise ValueError(f"{path} holds several splits: choose one, {which}")
    if (path / SAVED_INDEX).is_file():
        return SavedDataset(path, every_column)
    visible = sorted(path.glob("[!.]*"))
    there = [file for file in visible if _MAY_HOLD_DATA(file.name) and file.is_file()]
    files = [file for file in there if file.suffix == ".parquet"]
    lines = [file for file in there if file.name.endswith(_IN_DIRECTORIES)]
    if files and lines:
        raise ValueError(f"{path} has *.parquet and *.jsonl files: choose one by a pattern")
    files = files or lines or [file for file in visible if file.suffix == ".tar"]
    if not files:
        raise ValueError(
            f"{path} is no directory of conversations: it has no {SHARDS_INDEX} (convert.dataset),"
            f" no {SAVED_INDEX} (datasets.Dataset.save_to_disk) and no *.parquet, *.jsonl or *.tar"
            " files"
        )
    unread = [file.name for file in there if file not in files and file.name not in _ABOUT_DATA]
    if unread:
        pattern = "*.jsonl" if lines else "*.parquet"
        raise ValueError(
            f"{path} has {unread[0]}, which may hold data too, beside its {pattern} files: give a"
            f" pattern ('{path / pattern}'), or a list of files"
        )
    return _several(path, files, every_column)


def _matching(path: Path) -> list[Path]:
    if on_bucket(path):
        *_, bucket, _, _ = path.parents
        return sorted(bucket.glob(str(path.relative_to(bucket))))
    return [Path(found) for found in sorted(glob(str(path), recursive=True))]


def stored_files(path: str | Path) -> list[Path]:
    """The file at `path`, or those of the pattern or in the directory, but hidden ones; sorted."""
    path = any_path(path)
    if path.is_dir():
        files = list(path.glob("[!.]*"))
    else:
        files = [path] if path.is_file() else _matching(path)
    return sorted(file for file in files if file.is_file())


def size_of(messages: Messages, count: Callable[[Messages], tuple[int, int]]) -> tuple[int, int]:
    """(tokens, patches) by `count` (`Processor.count`). Raises ValueError for a conversation that
    teaches nothing."""
    check_learnable(messages)
    return count(messages)


def check_learnable(messages: Messages) -> None:
    """Raises ValueError unless there is an assistant turn, and one that is not marked as not to be
    learned; and for one that would teach to say nothing."""
    if not any(message.get("role") == "assistant" for message in messages):
        raise ValueError("there is no assistant turn to learn from")
    learned = [number for number, message in enumerate(messages) if is_learned(message)]
    if not learned:
        raise ValueError(
            f"every assistant turn is marked as not to be learned ({', '.join(MARKS)})"
        )
    if empty := [number for number in learned if _says_nothing(messages[number])]:
        raise ValueError(
            f"messages[{empty[0]}]: the answer is empty: leave the turn out, or mark it as not to"
            " be learned (weight: 0)"
        )


def _says_nothing(message: Mapping[str, Any]) -> bool:
    """Whether a turn holds white space at most, and neither a call of a tool nor a thought."""
    content = message.get("content", "")
    parts = content if isinstance(content, list | tuple) else ["" if content is None else content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    besides = [message[key] for key in message if key not in ("role", "content", "name", *MARKS)]
    return not any(besides) and all(isinstance(text, str) and not text.strip() for text in texts)
