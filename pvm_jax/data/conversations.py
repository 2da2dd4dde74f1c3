"""Conversations on disk, read at random: JSONL, Parquet, a directory saved by `datasets`, or shards
of `convert.dataset`.

Every format holds records {"messages": [...], "images": [...]}: chat messages as TRL and Hugging
Face have them, and the pictures that their {"type": "image"} parts show, in order. docs/data.md has
an example of each.
"""

import json
from collections.abc import Callable
from glob import has_magic
from pathlib import Path

from pvm_jax.data.json_files import JsonLines
from pvm_jax.data.messages import MARKS, Messages, is_learned
from pvm_jax.data.shards import SHARDS_INDEX, Shards
from pvm_jax.data.stored import Conversations
from pvm_jax.data.tables import ParquetFiles, SavedDataset


def open_conversations(path: str | Path, *, every_column: bool = False) -> Conversations:
    """Opens a JSONL or Parquet file, several Parquet files (`data/train-*.parquet`), or a directory
    of another format.

    Args:
        every_column: also read what a table holds besides messages and pictures
            (`Conversations.columns`).

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if what is there holds no conversation or is none of the formats.
        ImportError: if it takes pyarrow, and that is not installed.
    """
    path = Path(path)
    if has_magic(str(path)) and not path.exists():
        return ParquetFiles(path, sorted(Path(path.parent).glob(path.name)), every_column)
    if path.is_file():
        return (
            ParquetFiles(path, [path], every_column)
            if path.suffix == ".parquet"
            else JsonLines(path)
        )
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or directory of conversations")
    if (path / SHARDS_INDEX).is_file():
        return Shards(path)
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise ValueError(
            f"{path} holds several splits: choose one,"
            f" {' or '.join(str(path / split) for split in splits)}"
        )
    if (path / "state.json").is_file():
        return SavedDataset(path, every_column)
    if parquet := sorted(path.glob("*.parquet")):
        return ParquetFiles(path, parquet, every_column)
    raise ValueError(
        f"{path} is no directory of conversations: it has no {SHARDS_INDEX} (convert.dataset), no"
        " state.json (datasets.Dataset.save_to_disk) and no *.parquet files"
    )


def stored_bytes(path: str | Path) -> int:
    """Bytes of the file at `path`, or of all files in the directory."""
    path = Path(path)
    files = (
        [path]
        if path.is_file()
        else path.parent.glob(path.name)
        if has_magic(str(path))
        else path.rglob("*")
    )
    return sum(file.stat().st_size for file in files if file.is_file())


def size_of(messages: Messages, count: Callable[[Messages], tuple[int, int]]) -> tuple[int, int]:
    """(tokens, patches) by `count` (`Processor.count`). Raises ValueError for a conversation that
    teaches nothing."""
    check_learnable(messages)
    return count(messages)


def check_learnable(messages: Messages) -> None:
    """Raises ValueError unless there is an assistant turn, and one that is not marked as not to be
    learned."""
    if not any(message.get("role") == "assistant" for message in messages):
        raise ValueError("there is no assistant turn to learn from")
    if not any(map(is_learned, messages)):
        raise ValueError(
            f"every assistant turn is marked as not to be learned ({', '.join(MARKS)})"
        )
