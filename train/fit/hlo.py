"""The text of a compiled TPU program, in parts: computations, instructions, shapes, and the lines
of Python that they come from. What cannot be read is an error, never a zero."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple, Self

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^()]*)\)(.*)", re.S)
_TABLE = re.compile(r"(FileNames|FunctionNames|FileLocations|StackFrames)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_LAID_OUT = re.compile(r"\b[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?")
_CYCLES = re.compile(r'"estimated_cycles":"(-?\d+)"')
_BYTES = {
    "token": 0,
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}


@dataclass(frozen=True)
class Instruction:
    """One line of the program.

    Attributes:
        shape: of its result, as written.
        inside: what stands between its parentheses: operands, or a constant's value.
        rest: its attributes, as written.
    """

    name: str
    opcode: str
    shape: str
    inside: str
    rest: str

    @cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)

    @property
    def cycles(self) -> int | None:
        """What the compiler expects it to take; None where it says nothing."""
        found = _CYCLES.search(self.rest)
        return max(int(found[1]), 0) if found else None

    @property
    def op_name(self) -> str:
        """JAX's name of what it was traced from; empty where the compiler made it up."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def frame(self) -> int | None:
        """The line of Python that it was traced from, by its number in `Hlo.frames`."""
        found = self.attribute(r"stack_frame_id=(\d+)")
        return int(found) if found else None

    @property
    def called(self) -> str | None:
        """The computation that a fusion or a call runs."""
        return self.attribute(r"\b(?:calls|to_apply)=%([\w.\-]+)")

    def attribute(self, pattern: str) -> str | None:
        """What the group of a pattern matches in the attributes."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    def required(self, pattern: str) -> str:
        """The same, where there must be one.

        Raises:
            ValueError: if there is none.
        """
        found = self.attribute(pattern)
        if found is None:
            raise unreadable(f"{self.opcode} {self.name} without {pattern}")
        return found


class Computation(NamedTuple):
    """Instructions by name, in the order in which they run."""

    instructions: dict[str, Instruction]
    root: Instruction


class SourceLine(NamedTuple):
    """A line of Python: its file, and the number of the frame that called it, 0 for none."""

    file: str
    caller: int


@dataclass(frozen=True)
class Hlo:
    """A compiled program.

    Attributes:
        entry: the computation that the program is.
        frames: lines of Python by number.
    """

    entry: str
    computations: dict[str, Computation]
    frames: dict[int, SourceLine] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of `jax.stages.Compiled.as_text()`.

        Raises:
            ValueError: if it is not a whole scheduled program.
        """
        if "is_scheduled=true" not in text.partition("\n")[0]:
            raise unreadable("it is of no scheduled program")
        tables, lines = _split(text)
        entry, computations = None, {}
        for header, body in lines:
            found = _COMPUTATION.match(header)
            if found is None:
                raise unreadable(f"no computation: {header[:100]!r}")
            computations[found[2]] = _computation(body)
            entry = found[2] if found[1] else entry
        if entry is None:
            raise unreadable("it has no entry")
        return cls(entry, computations, _frames(tables))


def unreadable(what: str) -> ValueError:
    """The error that says what was not understood."""
    return ValueError(f"the compiled program's text is not understood: {what}")


def dimensions(shape: str) -> list[int]:
    """Of an array."""
    found = _ARRAY.search(shape)
    if found is None:
        raise unreadable(f"no shape of an array: {shape!r}")
    return [int(size) for size in found[2].split(",") if size]


def bytes_of(shape: str) -> int:
    """Of an array or of all arrays of a tuple, without what a layout pads.

    Raises:
        ValueError: for an element type that has no size here.
    """
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        if dtype not in _BYTES:
            raise unreadable(f"no size of {dtype!r} is known")
        total += _BYTES[dtype] * prod(int(size) for size in sizes.split(",") if size)
    return total


def arrays(shape: str) -> list[str]:
    """The shapes of a tuple's arrays, or of one array, with their layouts."""
    return _LAID_OUT.findall(shape)


def in_main_memory(shape: str) -> bool:
    """Whether an array lies in the chip's main memory: its layout names none of the others."""
    return "S(" not in shape


def flops(product: Instruction, left: list[int], right: list[int]) -> int:
    """Multiplications and additions of a `convolution` or `dot` of arrays of these shapes.

    A convolution's window may be there to take a product's batch in it: of its places, those that
    meet no number do not count.

    Raises:
        ValueError: if its attributes are not understood.
    """
    result = dimensions(product.shape)
    if product.opcode == "dot":
        contracted = product.required(r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2 * prod(result) * prod(left[int(i)] for i in contracted.split(",") if i)
    labels = product.required(r"dim_labels=(\w+_\w+->\w+)")
    lhs, rhs, out = re.split(r"_|->", labels)
    window = product.attribute(r"window=\{([^}]*)\}") or ""
    taps = [
        _taps(place, window, left[lhs.index(str(place))], result[out.index(str(place))])
        for place in range(len(lhs) - 2)
    ]
    groups = int(product.attribute(r"batch_group_count=(\d+)") or 1)
    depth = right[rhs.index("i")]
    return 2 * left[lhs.index("b")] // groups * result[out.index("f")] * depth * prod(taps)


def _taps(place: int, window: str, size: int, results: int) -> int:
    """Pairs of a result and a number that meet along one axis of a window."""
    given = dict(part.split("=") for part in window.split())
    if given.keys() - {"size", "stride", "pad", "lhs_dilate", "rhs_dilate", "rhs_reversal"}:
        raise unreadable(f"window {window!r}")

    def of(key: str, default: int = 1) -> int:
        return int(given[key].split("x")[place]) if key in given else default

    low = int(given["pad"].split("x")[place].split("_")[0]) if "pad" in given else 0
    dilated = (size - 1) * of("lhs_dilate") + 1
    places = (
        result * of("stride") + tap * of("rhs_dilate") - low
        for result in range(results)
        for tap in range(of("size"))
    )
    return sum(0 <= at < dilated and at % of("lhs_dilate") == 0 for at in places)


def _split(text: str) -> tuple[dict[str, list[str]], list[tuple[str, list[str]]]]:
    """The tables before the program, and the program's computations: header and lines, a broken
    line whole again."""
    tables: dict[str, list[str]] = {}
    computations: list[tuple[str, list[str]]] = []
    table, body = None, None
    for line in text.split("\n")[1:]:
        if body is not None and line.startswith("}") and not line.startswith("}}"):
            body = None
        elif body is not None:
            if line.startswith(("  %", "  ROOT %")):
                body.append(line)
            elif body:
                body[-1] += line
            else:
                raise unreadable(f"no instruction: {line[:100]!r}")
        elif found := _TABLE.match(line):
            table = tables.setdefault(found[1], [])
        elif line.endswith("{"):
            body = []
            computations.append((line, body))
        elif line and table is not None:
            table.append(line)
    if body is not None:
        raise unreadable("it ends within a computation")
    return tables, computations


def _computation(lines: list[str]) -> Computation:
    instructions, root = {}, None
    for line in lines:
        found = _INSTRUCTION.match(line)
        if found is None:
            raise unreadable(f"no instruction: {line[:100]!r}")
        instruction = Instruction(found[2], found[4], found[3], found[5], found[6])
        instructions[found[2]] = instruction
        root = instruction if found[1] else root
    if root is None:
        raise unreadable("a computation without a root")
    return Computation(instructions, root)


def _frames(tables: dict[str, list[str]]) -> dict[int, SourceLine]:
    """Of the tables before the program."""

    def rows(name: str) -> Iterator[tuple[int, str]]:
        for line in tables.get(name, []):
            number, _, row = line.partition(" ")
            yield int(number), row

    def numbers(row: str) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}

    files = {number: row.strip('"') for number, row in rows("FileNames")}
    places = {number: numbers(row) for number, row in rows("FileLocations")}
    found = {}
    for number, row in rows("StackFrames"):
        frame = numbers(row)
        file = files[places[frame["file_location_id"]]["file_name_id"]]
        found[number] = SourceLine(file, frame["parent_frame_id"] - 1)  # written as the number + 1
    return found
