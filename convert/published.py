"""The data of the paper, as they are on the Hub -> JSONL that everything here reads: `python -m
convert.published`.

docs/datasets.md has the steps, and what is our choice where nothing was published.
"""

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from pvm_jax import options
from pvm_jax.data.conversations import stored_files
from pvm_jax.data.tables import pyarrow
from pvm_jax.files.paths import local_path, make_paths

EXAMPLES = """
examples:
  python -m convert.published mmk12 downloads/mmk12/data data/mmk12.jsonl --count 900 --held_out 25
  python -m convert.published openmmreasoner_sft downloads/sft data/sft.jsonl --count 526000
"""


@dataclass(frozen=True)
class Published:
    """A set of prompts.

    Attributes:
        hub: its id on the Hub.
        question, answer, images: its columns.
    """

    hub: str
    question: str
    answer: str
    images: str


PROMPTS = {
    "mmk12": Published("FanqingM/MMK12", "question", "answer", "image"),
    "thinklite_hard": Published("russwang/ThinkLite-VL-hard-11k", "problem", "answer", "image"),
    "virl39k": Published("TIGER-Lab/ViRL39K", "question", "answer", "image"),
    "wemath2_pro": Published("We-Math/We-Math2.0-Pro", "question", "answer", "image"),
}
SFT = {"openmmreasoner_sft": "OpenMMReasoner/OpenMMReasoner-SFT-874K"}
"""Conversations."""

_BOXED = re.compile(r"\s*\\boxed\{(.*)\}\s*", re.DOTALL)
_TAG = re.compile(r"\s*<image>\s*")


@dataclass(frozen=True)
class PublishedOptions:
    """Which set, and how much of it.

    Attributes:
        name: mmk12, thinklite_hard, virl39k, wemath2_pro or openmmreasoner_sft.
        src: its Parquet files, downloaded: a directory, a file or a pattern; relative paths of
            pictures start from there.
        dst: JSONL file to write; not there yet.
        count: records drawn without repetition; all by default.
        held_out: that many more, into DST with `.held_out` before its suffix.
        seed: of the draw.
    """

    name: str
    src: Path
    dst: Path
    _: KW_ONLY
    count: int | None = None
    held_out: int = 0
    seed: int = 0

    def __post_init__(self):
        make_paths(self, "src", "dst", of=local_path)
        if self.name not in {**PROMPTS, **SFT}:
            raise ValueError(f"name must be one of {', '.join([*PROMPTS, *SFT])}, got {self.name}")
        if (self.count is not None and self.count < 1) or self.held_out < 0:
            raise ValueError("--count must be at least 1, and --held_out at least 0")
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {self.seed}")


@options.command
def main(argv: Sequence[str]) -> None:
    """Parses `argv` (default: the process's arguments) and writes the file."""
    given, _ = options.parse(
        PublishedOptions,
        argv,
        prog="python -m convert.published",
        description=__doc__ or "",
        examples=EXAMPLES,
        by_place=["name", "src", "dst"],
    )
    write(given)


def write(given: PublishedOptions) -> None:
    """Writes what is drawn of the set, in its order, and says how much there was.

    Raises:
        FileNotFoundError, ValueError: if the files are missing, have other columns, or fewer
            records than are asked for.
        FileExistsError: if what is to be written is there.
    """
    beside = given.dst.with_name(f"{given.dst.stem}.held_out{given.dst.suffix}")
    targets = [given.dst, beside] if given.held_out else [given.dst]
    for target in targets:
        if target.exists():
            raise FileExistsError(f"{target} exists: choose another place or remove it")
    chosen = [place for place, record in enumerate(_records(given)) if record]
    everything, wanted = len(chosen), (given.count or 0) + given.held_out
    if wanted > everything or not everything:
        raise ValueError(
            f"{given.src}: {everything:,} records of {given.name} show a picture and have an"
            f" answer, {wanted:,} are asked for"
        )
    drawn = np.random.default_rng(given.seed).permutation(chosen)
    aside = set(drawn[: given.held_out].tolist())
    end = None if given.count is None else wanted
    kept = set(drawn[given.held_out : end].tolist())
    given.dst.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = [stack.enter_context(_growing(target)) for target in targets]
        for place, record in enumerate(_records(given)):
            if place in kept or place in aside:
                file = files[0] if place in kept else files[-1]
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    print(f"{given.dst}: {len(kept):,} of {everything:,} records, {len(aside):,} held out")


@contextmanager
def _growing(target: Path) -> Iterator[TextIO]:
    """A file beside `target`, which takes its place when the block ends well."""
    aside = target.with_name(f".{target.name}.partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            yield file
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _records(given: PublishedOptions) -> Iterator[dict[str, Any] | None]:
    """Every row as a record; None for one that is left out."""
    files = [file for file in stored_files(given.src) if file.suffix == ".parquet"]
    if not files:
        raise FileNotFoundError(f"{given.src}: no Parquet files (hf download --repo-type dataset)")
    folder = given.src if given.src.is_dir() else given.src.parent
    prompts = PROMPTS.get(given.name)
    for file in files:
        for place, row in enumerate(_rows(file, given.name)):
            try:
                record = _prompt(row, prompts, folder) if prompts else _answered(row, folder)
            except ValueError as error:
                raise ValueError(f"{file}:{place}: {error}") from error
            yield record


def _rows(file: Path, name: str) -> Iterator[dict[str, Any]]:
    """Those of a Parquet file of the set `name`."""
    parquet, prompts = pyarrow("parquet"), PROMPTS.get(name)
    needed = (prompts.question, prompts.answer, prompts.images) if prompts else ("messages",)
    try:
        with parquet.ParquetFile(file) as opened:
            columns = opened.schema_arrow.names
            if all(one in columns for one in needed):
                for batch in opened.iter_batches(256):
                    yield from batch.to_pylist()
                return
    except (pyarrow("lib").ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    missing = next(one for one in needed if one not in columns)
    raise ValueError(
        f"{file} has no column {missing!r}, but {', '.join(columns)}: it is another version of"
        f" {name} than is known here"
    )


def _prompt(row: Mapping[str, Any], names: Published, folder: Path) -> dict[str, Any] | None:
    """A question with its solution. `\\boxed{}` around an answer is taken off, as are places of
    pictures in the text: they stand before it."""
    found = row[names.images]
    pictures = [_picture(one, folder) for one in (found if isinstance(found, list) else [found])]
    answer = "" if row[names.answer] is None else str(row[names.answer])
    if boxed := _BOXED.fullmatch(answer):
        answer = boxed[1]
    question = _TAG.sub(" ", str(row[names.question] or "")).strip()
    if not answer.strip() or not question or not pictures or None in pictures:
        return None
    shown = [{"type": "image", "image": picture} for picture in pictures]
    content = [*shown, {"type": "text", "text": question}]
    others = {name: row[name] for name in ("id", "qid", "question_id") if row.get(name) is not None}
    return others | {"messages": [{"role": "user", "content": content}], "solution": answer.strip()}


def _answered(row: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """A conversation that shows a picture: what we call visually centred."""
    found = row.get("images") or row.get("image") or []
    pictures = [_picture(one, folder) for one in (found if isinstance(found, list) else [found])]
    messages = row["messages"]
    messages = json.loads(messages) if isinstance(messages, str) else messages
    if not isinstance(messages, list) or not all(isinstance(one, Mapping) for one in messages):
        raise ValueError(f"messages must be a list of turns, got {messages!r:.80}")
    messages, shown = _with_places(messages, folder)
    if not pictures and not shown:
        return None
    others = {name: row[name] for name in ("id", "source") if row.get(name) is not None}
    return others | {"messages": messages} | ({"images": pictures} if pictures else {})


def _with_places(messages: Sequence[Mapping[str, Any]], folder: Path) -> tuple[list[Any], int]:
    """The messages with absolute paths of their pictures, and how many parts show one."""
    shown, turns = 0, []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, Mapping) for part in content):
                raise ValueError(f"a turn's content must be a list of parts, got {content!r:.80}")
            parts = [{key: one for key, one in part.items() if one is not None} for part in content]
            for part in parts:
                if str(part.get("type")).startswith("image"):
                    shown += 1
                    for key in ("image", "url", "path"):
                        if key in part:
                            part[key] = _picture(part[key], folder)
                    if isinstance(part.get("image_url"), Mapping):
                        part["image_url"] = {"url": _picture(part["image_url"].get("url"), folder)}
            content = parts
        turns.append(dict(message) | {"content": content})
    return turns, shown


def _picture(value: Any, folder: Path) -> str | None:
    """As JSON holds it: a data URL, or an absolute path."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return f"data:image;base64,{base64.b64encode(value).decode()}"
    if not isinstance(value, str) or not value:
        return None
    return value if value.startswith("data:") else str((folder / value).absolute())


if __name__ == "__main__":
    main()
