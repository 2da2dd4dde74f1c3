"""Where examples come from: sources with their weights, and files that name several."""

from dataclasses import dataclass
from typing import Any

from pvm_jax.files.json_file import is_number
from pvm_jax.files.paths import any_path, on_bucket
from pvm_jax.files.yaml_file import is_yaml, read_yaml


@dataclass(frozen=True)
class Source:
    """One of the data's sources.

    Attributes:
        path: JSONL, Parquet or tar file, `data/train-*.parquet`, a directory (what `datasets`
            saved, or convert.dataset wrote), or a mixture file that names several (docs/data.md).
        weight: how often an epoch reads the source: 2 is every example twice, 0.5 a fresh random
            half each time.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self):
        if not isinstance(self.path, str):
            raise ValueError(f"sources: a path must be a text, got {self.path!r:.80}")
        if self.path.startswith(("{", "[{")):  # what the parser did not understand
            raise ValueError(f"sources: a source is a path, or path and weight, got {self.path}")
        try:
            object.__setattr__(self, "path", str(any_path(self.path)))
        except ValueError as error:
            raise ValueError(f"sources: {error}") from error
        if not (is_number(self.weight) and self.weight > 0):
            raise ValueError(
                f"sources: the weight of {self.path} must be a finite number above 0, got"
                f" {self.weight!r}"
            )


def mixture_of(sources: str | list[str | Source]) -> list[Source]:
    """One or several sources, each with its weight; in the place of a mixture file (.yaml) what it
    names, relative paths starting from it.

    Raises:
        FileNotFoundError, ValueError: for a mixture file that is not there or none; ValueError for
            a path that is a URL.
    """
    several = [sources] if isinstance(sources, str) else sources
    given = [source if isinstance(source, Source) else Source(source) for source in several]
    return [one for source in given for one in _unfolded(source)]


def _unfolded(source: Source) -> list[Source]:
    if not is_yaml(source.path):
        return [source]
    file = any_path(source.path)
    if not file.exists():
        raise FileNotFoundError(f"sources: {file}: no such mixture file")
    content = read_yaml(file)
    entries = content.get("sources")
    if content.keys() != {"sources"} or not isinstance(entries, list) or not entries:
        raise ValueError(f"{file}: a mixture file has one key, sources: a list of paths")
    found = []
    for entry in entries:
        values: Any = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(values, dict) or not {"path"} <= values.keys() <= {"path", "weight"}:
            raise ValueError(f"{file}: a source is a path, or path and weight, got {entry!r:.80}")
        try:
            one = Source(**values)
            if is_yaml(one.path):
                raise ValueError(f"{one.path} is a mixture file too: give the paths in it")
            path = any_path(one.path)
            path = path if on_bucket(path) or path.is_absolute() else file.parent / path
            found.append(Source(str(path), one.weight * source.weight))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
    return found


def in_place(sources: str | list[str | Source]) -> str | list[str | Source]:
    """`sources`, with what mixture files name in their place: a run is told what it reads, and not
    where that was written. Raises as `mixture_of`."""
    named = [sources] if isinstance(sources, str) else sources
    paths = [one.path if isinstance(one, Source) else one for one in named]
    return [*mixture_of(sources)] if any(map(is_yaml, paths)) else sources
