"""Reads back what a run wrote for TensorBoard."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def read_values(directory: Path) -> dict[str, list[tuple[int, object]]]:
    """{tag: [(step, value), ...]} of all event files in `directory`, in the order in which they were written.

    A scalar's value is a float, a text's its string, an image's the bytes of its PNG.
    """
    values: dict[str, list[tuple[int, object]]] = {}
    for event in _events(directory):
        for value in event.summary.value:
            values.setdefault(value.tag, []).append((event.step, _content(value)))
    return values


def read_starts(directory: Path) -> list[int]:
    """The steps at which the processes of a run went on, in their order."""
    return [event.step for event in _events(directory) if event.HasField("session_log")]


def _events(directory: Path) -> Iterator[Event]:
    for file in sorted(directory.glob("events.*")):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content.ljust(place + 8, b"\xff"), place)
            if place + length + 16 > len(content):
                break  # the process was killed while it wrote
            yield Event.FromString(content[place + 12 : place + 12 + length])  # a checksum after length and record
            place += length + 16


def _content(value) -> object:
    kind = value.WhichOneof("value")
    if kind == "tensor":
        return value.tensor.string_val[0].decode()
    return value.image.encoded_image_string if kind == "image" else value.simple_value
