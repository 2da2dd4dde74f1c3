"""What a compiled TPU step takes by the compiler's own count: cycles by part, the floor of its
matrix products, attention kernels, links between chips. An estimate: nothing ran."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, Self

from rich.table import Table

from train.fit.hlo import Hlo, Instruction, bytes_of, dimensions, unreadable
from train.fit.schedule import Schedule, Turn
from train.step.flops import peak_flops


class Chip(NamedTuple):
    """From Google's data sheets: cycles a second, bytes a second that all links of a chip together
    bring in, and that it reads from its memory."""

    clock: float
    links: float
    memory: float


CHIPS = {
    "TPU v4": Chip(1.05e9, 300e9, 1.2e12),
    "TPU v5 lite": Chip(1.5e9, 200e9, 0.82e12),
    "TPU v5": Chip(1.75e9, 600e9, 2.77e12),
    "TPU v6 lite": Chip(1.75e9, 448e9, 1.64e12),
}
PARTS = {
    "pvm_jax/model/memory.py": "branch",
    "pvm_jax/model/decoder.py": "decoder",
    "pvm_jax/model/vision.py": "tower",
    "pvm_jax/model/qwen3_vl.py": "embeddings",
    "train/step/loss.py": "head",
    "/optax/": "optimizer",
}
"""The part of a step that a line of Python belongs to: of the first of these files that is among
its callers."""
REST = "rest"
STAGES = ("forward", "recomputed", "backward")

_MOVES = {
    "bitcast",
    "broadcast",
    "concatenate",
    "constant",
    "copy",
    "dynamic-slice",
    "dynamic-update-slice",
    "get-tuple-element",
    "pad",
    "parameter",
    "reshape",
    "slice",
    "transpose",
    "tuple",
}
# Nothing runs for these, or it runs beside what does.
_FREE = {
    "AllocateBuffer",
    "AsyncCollectiveDone",
    "after-all",
    "all-gather-done",
    "all-reduce-done",
    "bitcast",
    "ConcatBitcast",
    "constant",
    "collective-permute-done",
    "copy-done",
    "copy-start",
    "get-tuple-element",
    "parameter",
    "partition-id",
    "replica-id",
    "slice-done",
    "slice-start",
    "tuple",
}
_TOLD = ("gather", "scatter", "sort")
# Matrix products of a block of queries and keys in each of the splash kernels.
PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
_BY_COLUMN = "2"  # how they name the layout [heads, H, length]


@dataclass
class Row:
    """Of one part in one stage: cycles, those of them that only copy or only convert, and the FLOPs
    of its matrix products."""

    cycles: int = 0
    copies: int = 0
    converts: int = 0
    flops: int = 0

    def __add__(self, other: "Row") -> "Row":
        return Row(
            self.cycles + other.cycles,
            self.copies + other.copies,
            self.converts + other.converts,
            self.flops + other.flops,
        )


@dataclass
class Traffic:
    """Of one kind of collective: how many, bytes that reach a chip, and those of them that travel
    while it computes."""

    count: int = 0
    bytes: float = 0
    hidden: float = 0


@dataclass(frozen=True)
class StepTime:
    """A chip's time for a step.

    Attributes:
        peak: FLOP/s of a chip.
        rows: by part and stage, without kernels.
        kernels: FLOPs of the blocks that they compute in rows of one segment, by part and stage.
            The compiler says nothing of their time.
        traffic: by kind.
        silent: how often other instructions run of whose time the compiler says nothing, by opcode.
        parts: as PARTS.
    """

    chip: Chip
    peak: float
    parts: Mapping[str, str] = field(default_factory=PARTS.copy)
    rows: dict[tuple[str, str], Row] = field(default_factory=lambda: defaultdict(Row))
    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    traffic: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    silent: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, text: str, device_kind: str, *, times: int = 1) -> Self:
        """Of a compiled program's text.

        Args:
            device_kind: as JAX names the chip.
            times: that a step runs the program.

        Raises:
            ValueError: if the text is not understood, or the chip is not known.
        """
        schedule = Schedule(Hlo.parse(text))
        return cls.of_turns(schedule, schedule.turns(), device_kind, PARTS, times=times)

    @classmethod
    def of_turns(
        cls,
        schedule: Schedule,
        turns: Iterable[Turn],
        device_kind: str,
        parts: Mapping[str, str],
        *,
        times: int = 1,
    ) -> Self:
        """Of some of a program's instructions; `parts` are as PARTS, the rest as of `of`."""
        peak = peak_flops(device_kind)
        if device_kind not in CHIPS or peak is None:
            raise ValueError(f"no clock of {device_kind!r} is known; of {', '.join(CHIPS)} it is")
        estimate = cls(CHIPS[device_kind], peak, parts)
        for turn in turns:
            estimate._add(schedule, turn, times)
        if not any(row.cycles for row in estimate.rows.values()):
            raise unreadable("it estimates no cycles")
        return estimate

    def _add(self, schedule: Schedule, turn: Turn, times: int) -> None:
        instruction = turn.instruction
        products = list(schedule.products(turn))
        traced = products[0][0] if products else instruction
        place = _place(schedule.hlo, traced, turn, self.parts)
        if 'custom_call_target="tpu_custom_call"' in instruction.rest:
            self.kernels[place] += times * turn.times * kernel_flops(instruction)
            return
        collectives = list(schedule.collectives(turn))
        for collective, beside in collectives:
            kind = self.traffic[collective.opcode.removesuffix("-start")]
            arriving = times * turn.times * arriving_bytes(collective)
            kind.count += times * turn.times
            kind.bytes += arriving
            kind.hidden += arriving if beside else 0
        if instruction.cycles is None:
            if products:
                raise unreadable(f"no estimate of the product {instruction.name}")
            if not (collectives or _kind(schedule, turn) in _FREE or _is_small(instruction)):
                self.silent[_kind(schedule, turn)] += times * turn.times
            return
        cycles = times * turn.cycles
        opcodes = {one.opcode for _, one in schedule.within(turn) if not _is_index(one)}
        moves, converts = opcodes <= _MOVES, opcodes <= _MOVES | {"convert"}
        self.rows[place] += Row(
            cycles=cycles,
            copies=cycles if moves else 0,
            converts=cycles if converts and not moves else 0,
            flops=times * sum(flops for _, flops in products),
        )

    @property
    def total(self) -> Row:
        """Of all parts, without kernels."""
        return sum(self.rows.values(), Row())

    @property
    def outside(self) -> float:
        """Seconds of all but kernels."""
        return self.total.cycles / self.chip.clock

    @property
    def kernels_at_peak(self) -> float:
        """Seconds of the kernels at the chip's peak: they take more."""
        return sum(self.kernels.values()) / self.peak

    def table(self) -> Table:
        """Seconds by part."""
        table = Table("part", "stage", "seconds", "products at peak", "ratio", "copies", "converts")
        for column in table.columns[2:]:
            column.justify = "right"
        order = {name: place for place, name in enumerate([*self.parts.values(), *STAGES])}
        for place in sorted(self.rows, key=lambda place: [order.get(x, len(order)) for x in place]):
            table.add_row(*place, *self._cells(self.rows[place]))
        table.add_section()
        table.add_row("all but kernels", "", *self._cells(self.total))
        return table

    def _cells(self, row: Row) -> list[str]:
        seconds = [x / self.chip.clock for x in (row.cycles, row.copies, row.converts)]
        floor = row.flops / self.peak
        ratio = f"{seconds[0] / floor:.2f}" if floor else ""
        total, copies, converts = (f"{x:.3f}" for x in seconds)
        return [total, f"{floor:.3f}", ratio, copies, converts]

    def summary(self) -> list[str]:
        """Lines below the table: kernels, links, what is not counted, and the whole."""
        links = "; ".join(
            f"{kind} {one.bytes / 2**30:,.1f} GiB in {one.bytes / self.chip.links:.2f} s or more,"
            f" {one.hidden / one.bytes:.0%} while the chip computes"
            for kind, one in self.traffic.items()
            if one.bytes
        )
        silent = ", ".join(f"{count:,} x {name}" for name, count in self.silent.most_common())
        return [
            f"attention kernels: {sum(self.kernels.values()) / 1e12:,.0f} TFLOP in the blocks of"
            f" rows of one example, {self.kernels_at_peak:.2f} s at peak: they take more,"
            " packed rows less",
            f"links: {links or 'nothing'}",
            *([f"not counted: {silent}"] if silent else []),
            f"a step would take {self.outside + self.kernels_at_peak:.1f} s or more with such rows:"
            " the compiler's estimate, nothing ran",
        ]


def _place(
    hlo: Hlo, instruction: Instruction, turn: Turn, parts: Mapping[str, str]
) -> tuple[str, str]:
    """Part and stage of an instruction or, where the compiler made it up, of the loop around it."""
    scope, frame = turn.scope, instruction.frame
    while frame is None and scope is not None:
        if scope.loop is not None:
            instruction = scope.loop
            frame = instruction.frame
        scope = scope.outer
    stage = "forward"
    if "rematted_computation" in instruction.op_name:
        stage = "recomputed"
    elif "transpose(" in instruction.op_name:
        stage = "backward"
    files = []
    while frame:
        file, frame = hlo.frames[frame]
        files.append(file)
    found = (part for name, part in parts.items() if any(name in file for file in files))
    return next(found, REST), stage


def _is_small(instruction: Instruction) -> bool:
    """Whether its result is a single number."""
    return "(" not in instruction.shape[:1] and prod(dimensions(instruction.shape)) == 1


def _is_index(instruction: Instruction) -> bool:
    """Whether it only says where something lies."""
    return _is_small(instruction) and instruction.opcode != "reduce"


def _kind(schedule: Schedule, turn: Turn) -> str:
    """What an instruction does, for a reader."""
    inner = [one for _, one in schedule.within(turn)]
    targets = (one.attribute(r'custom_call_target="([^"]*)"') for one in inner)
    names = [*(one.opcode for one in inner if one.opcode in _TOLD), *filter(None, targets)]
    return names[0] if names else turn.instruction.opcode


def kernel_flops(kernel: Instruction) -> int:
    """Of the blocks that one run of an attention kernel computes in rows of one segment without
    padding: more than in others.

    Raises:
        ValueError: for a kernel that is not known.
    """
    products = next((n for name, n in PRODUCTS.items() if kernel.name.startswith(name)), None)
    given = kernel.attribute(r"operand_layout_constraints=\{(.*?\})\}")
    # "block_q" and "block_kv", or "block_q_dq" and so on: one size in all kernels.
    sides = [kernel.attribute(rf'block_{of}\w*\\*": (\d+)') for of in ("q", "kv")]
    if products is None or given is None or None in sides:
        raise unreadable(f"kernel {kernel.name} is not known")
    side, kv_side = (int(length or 0) for length in sides)
    operands: dict[str, list[list[int]]] = defaultdict(list)
    for dtype, sizes in re.findall(r"(\w+)(\[[\d,]*\])", given):
        kind = "float" if dtype in ("bf16", "f32") else dtype
        operands[kind].append(dimensions(dtype + sizes))
    (heads, *of_q), (_, *of_k) = operands["float"][:2]
    of_q, of_k = (
        lengths[::-1] if kernel.attribute(rf'{name}_layout\\*": (\d)') == _BY_COLUMN else lengths
        for name, lengths in (("q", of_q), ("k", of_k))
    )
    (queries, size), (keys, _) = of_q, of_k
    # Rows stand one after another in one sequence; the list of blocks has all of a row's on one
    # axis and all rows' on the other.
    listed = side * kv_side * prod(operands["s8"][0])
    sequences = queries * keys // listed
    rows, columns = queries // sequences // side, keys // sequences // kv_side
    blocks = rows * columns
    # A third array of columns says where the keys of each query end: at its own column, where there
    # are as many.
    if queries == keys and len([one for one in operands["s32"] if len(one) == 2]) == 3:
        blocks = sum(j * kv_side < (i + 1) * side for i in range(rows) for j in range(columns))
    return 2 * products * heads * size * sequences * blocks * side * kv_side


def arriving_bytes(collective: Instruction) -> float:
    """That reach a chip, at the least.

    Raises:
        ValueError: if its groups are not understood.
    """
    kind = collective.opcode.removesuffix("-start")
    shape = collective.shape
    if collective.opcode != kind and shape.startswith("("):  # operands, results, ...
        shape = shape.split(", ", 1)[1]
    size = bytes_of(shape)
    if kind == "collective-permute":
        return size
    members = group_size(collective)
    share = (members - 1) / members
    return size * share * {"all-reduce": 2, "reduce-scatter": members}.get(kind, 1)


def group_size(collective: Instruction) -> int:
    """Chips that take part in a collective together."""
    written = r"mesh\[[^\]]*\] \{[^}]*\}|\{\{[\d,]*|\[[\d,]*\]"
    groups = collective.required(rf"replica_groups=({written})")
    if groups.startswith("mesh"):
        sizes = dict(re.findall(r"('\w+')=(\d+)", groups))
        return prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", groups.split("{")[1]))
    if groups.startswith("["):
        return int(groups.strip("[]").split(",")[-1])
    return groups.count(",") + 1
