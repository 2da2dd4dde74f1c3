"""Conversations in WebDataset's tar files: the members of one name are a record.

`000017.json` is the record of sample 000017, in any of the conventions; `000017.jpg`,
`000017.1.png` and `000017.mp4` are its pictures and videos.
"""

import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pvm_jax.data.messages import IMAGE_KEYS, VIDEO_KEYS
from pvm_jax.data.stored import Parts
from pvm_jax.data.video_files import VIDEO_SUFFIXES
from pvm_jax.files.cache import local_copies
from pvm_jax.files.json_file import once

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Member(NamedTuple):
    """A file within a tar file."""

    name: str
    start: int
    size: int

    @property
    def suffix(self) -> str:
        """As `.jpg`, in small letters."""
        return os.path.splitext(self.name)[1].lower()


class TarFiles(Parts):
    """Tar files, their members read at random where they lie. Opening them reads every member's
    header; a large set is to be converted (`python -m convert.dataset`)."""

    def __init__(self, path: Path, files: Sequence[Path]):
        """Reads the files' headers. Raises ValueError for a compressed or broken file, and a sample
        without a record."""
        self.path = path
        self._samples: list[tuple[str, list[Member]]] = []
        self._descriptors, lengths = [], []
        for file in local_copies(files):
            found = _samples(file)
            self._samples += found
            lengths.append([len(found)])
            self._descriptors.append(os.open(file, os.O_RDONLY))
        self.set_parts(files, lengths)

    def where(self, index: int) -> str:
        return f"{self._files[self.place_of(index)[0]]}:{self._samples[index][0]}"

    def _record(self, index: int) -> Any:
        descriptor = self._descriptors[self.place_of(index)[0]]
        _, members = self._samples[index]
        (text,) = (member for member in members if member.suffix == ".json")
        try:
            record = json.loads(_content(descriptor, text), object_pairs_hook=once)
        except ValueError as error:
            raise ValueError(f"{text.name} is no JSON in UTF-8: {error}") from error
        if not isinstance(record, Mapping):
            raise ValueError(f"{text.name} must hold an object, a record of messages")
        shown = {
            member.name: {"bytes": _content(descriptor, member), "path": member.name}
            for member in members
            if member.suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
        }
        return _with_members(dict(record), shown)


def _with_members(record: dict[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the pictures and videos that it names, and with all of them beside the
    messages if it names none."""
    by_name = {name.rpartition("/")[2]: member for name, member in shown.items()} | dict(shown)
    named = []

    def filled(value: Any) -> Any:
        if isinstance(value, str) and value in by_name:
            named.append(value)
            return by_name[value]
        if isinstance(value, list):
            return [filled(one) for one in value]
        if isinstance(value, Mapping):
            keys = ("content", *IMAGE_KEYS, *VIDEO_KEYS)
            return {key: filled(one) if key in keys else one for key, one in value.items()}
        return value

    columns = ("image", "images", "video", "videos", "messages", "conversations", "prompt")
    record = {key: filled(value) if key in columns else value for key, value in record.items()}
    if named:
        return record
    for column, suffixes in (("images", IMAGE_SUFFIXES), ("videos", VIDEO_SUFFIXES)):
        found = [shown[name] for name in shown if os.path.splitext(name)[1].lower() in suffixes]
        if found:
            if record.get(column) or record.get(column[:-1]):
                raise ValueError(
                    f"its {column} name none of the members that lie beside it, as"
                    f" {next(iter(shown))}"
                )
            record[column] = found
    return record


def _samples(file: Path) -> list[tuple[str, list[Member]]]:
    """(key, members) of every sample of a tar file, in its order."""
    samples: dict[str, list[Member]] = {}
    try:
        with tarfile.open(file, "r:") as opened:
            for info in opened:
                folder, _, name = info.name.rpartition("/")
                if not info.isfile() or name.startswith("."):
                    continue
                if info.issparse():
                    raise ValueError(f"{file}: {info.name} is sparse: pack it anew")
                key = f"{folder}/{name.partition('.')[0]}".lstrip("/")
                member = Member(info.name, info.offset_data, info.size)
                samples.setdefault(key, []).append(member)
    except tarfile.TarError as error:
        raise ValueError(
            f"{file} is no whole tar file without compression ({error}): unpack a .tar.gz to a .tar"
        ) from error
    for key, members in samples.items():
        if sum(member.suffix == ".json" for member in members) != 1:
            names = ", ".join(member.name for member in members)
            raise ValueError(
                f"{file}: sample {key} needs one .json member, its record of messages; it has"
                f" {names}"
            )
    return list(samples.items())


def _content(descriptor: int, member: Member) -> bytes:
    content = os.pread(descriptor, member.size, member.start)
    if len(content) < member.size:
        raise ValueError(f"{member.name} is cut off")
    return content
