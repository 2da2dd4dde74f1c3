"""What a compiled TPU program runs, and how often: its loops, branches and fusions taken apart."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from train.fit.hlo import Computation, Hlo, Instruction, dimensions, flops, unreadable

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
# A value goes through these unchanged.
_SAME = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape")


class Scope(NamedTuple):
    """A computation that runs.

    Attributes:
        arguments: the names, in `outer`, of what its parameters are; of a loop's body, at the
            start.
        loop: the `while` that repeats it, if one does.
        times: how often it runs in one run of the program.
        open: whether it is in a loop of which only the data tell the end.
    """

    computation: str
    arguments: list[str]
    outer: "Scope | None"
    loop: Instruction | None
    times: int
    open: bool = False


class Turn(NamedTuple):
    """An instruction that takes its turn on the chip, and how often it does."""

    instruction: Instruction
    scope: Scope

    @property
    def times(self) -> int:
        return self.scope.times

    @property
    def cycles(self) -> int:
        """In one run of the program; 0 where the compiler says nothing."""
        return (self.instruction.cycles or 0) * self.times


@dataclass(frozen=True)
class Schedule:
    """The instructions of a program, in the order of their turns.

    Attributes:
        rounds: that a loop of the program's own makes of which only the data tell the end; None:
            such a loop is not understood.
    """

    hlo: Hlo
    rounds: int | None = None

    def turns(self) -> Iterator[Turn]:
        """Every instruction that runs, of the dearest branch where there are several.

        Raises:
            ValueError: for a loop whose condition does not tell its trip count, unless `rounds`
                does.
        """
        return self._turns(Scope(self.hlo.entry, [], None, None, 1))

    def _turns(self, scope: Scope) -> Iterator[Turn]:
        for instruction in self.hlo.computations[scope.computation].instructions.values():
            if instruction.opcode == "while":
                yield from self._turns(self._body(instruction, scope))
            elif instruction.opcode == "conditional":
                yield from max(self._branches(instruction, scope), key=_cycles)
            elif instruction.opcode == "call":
                called = instruction.required(r"to_apply=%([\w.\-]+)")
                yield from self._turns(within(scope, called, instruction.operands))
            else:
                yield Turn(instruction, scope)

    def _branches(self, instruction: Instruction, scope: Scope) -> Iterator[list[Turn]]:
        names = instruction.required(r"branch_computations=\{([^}]*)\}")
        for name, argument in zip(names.split(", "), instruction.operands[1:], strict=True):
            yield list(self._turns(within(scope, name[1:], [argument])))

    def _body(self, loop: Instruction, scope: Scope) -> Scope:
        """Of a `while` in `scope`."""
        trips = self.trips(loop, scope)
        known = trips is not None
        if trips is None:
            trips = self.rounds if scope.outer is None else None
        if trips is None:
            raise unreadable(f"loop {loop.name}: its condition does not tell its trip count")
        body = loop.required(r"body=%([\w.\-]+)")
        times, open_ = scope.times * trips, scope.open or not known
        return Scope(body, loop.operands, scope, loop, times, open_)

    def trips(self, loop: Instruction, scope: Scope) -> int | None:
        """How often the body of a `while` in `scope` runs, by its condition; None if that is no
        comparison of a counter with a number."""
        condition = self.hlo.computations[loop.required(r"condition=%([\w.\-]+)")]
        body = Scope(loop.required(r"body=%([\w.\-]+)"), loop.operands, scope, loop, scope.times)
        counter, limit = self._comparison(condition, body)
        start = _whole(self._element(scope, loop.operands[0], counter))
        step = self._step(body, counter)
        if start is None or not step or limit is None:
            return None
        return max(-(-(limit - start) // step), 0)

    def _comparison(self, condition: Computation, body: Scope) -> tuple[int, int | None]:
        """The counter's place in the loop's tuple, and the number that it stays below."""
        root, named = condition.root, condition.instructions
        while root.opcode == "fusion" and root.called:  # of the comparison alone
            inner = self.hlo.computations[root.called]
            arguments = [named[name] for name in root.operands]
            named = {
                name: arguments[int(one.inside)] if one.opcode == "parameter" else one
                for name, one in inner.instructions.items()
            }
            root = inner.root
        if root.opcode != "compare" or root.attribute(r"direction=(\w+)") != "LT":
            return 0, None
        counter, limit = (named[name] for name in root.operands)
        index = counter.attribute(r"\bindex=(\d+)")
        if index is None:
            return 0, None
        if limit.opcode == "get-tuple-element":
            limit = self._carried(body, int(limit.attribute(r"\bindex=(\d+)") or 0))
        return int(index), _whole(limit)

    def _step(self, body: Scope, counter: int) -> int | None:
        """What the body adds to its counter."""
        computation = self.hlo.computations[body.computation]
        added = self._plain(computation, computation.root.operands[counter])
        if added.opcode != "add":
            return None
        steps = [
            self.constant(body, name)
            for name in added.operands
            if not self._is_element(computation, name, counter)
        ]
        return _whole(steps[0]) if len(steps) == 1 else None

    def _plain(self, computation: Computation, name: str) -> Instruction:
        """Where a value comes from that is only copied."""
        instruction = computation.instructions[name]
        while instruction.opcode in _SAME:
            instruction = computation.instructions[instruction.operands[0]]
        return instruction

    def constant(self, scope: Scope, name: str) -> Instruction | None:
        """The constant that a value is, perhaps by way of loops that pass it on; None if none."""
        instruction = self.hlo.computations[scope.computation].instructions[name]
        if instruction.opcode == "constant":
            return instruction
        if instruction.opcode in _SAME:
            return self.constant(scope, instruction.operands[0])
        if instruction.opcode == "get-tuple-element":
            index = int(instruction.attribute(r"\bindex=(\d+)") or 0)
            return self._element(scope, instruction.operands[0], index)
        return None

    def _element(self, scope: Scope, name: str, index: int) -> Instruction | None:
        """The same of an element of a tuple."""
        source = self.hlo.computations[scope.computation].instructions[name]
        if source.opcode == "tuple":
            return self.constant(scope, source.operands[index])
        if source.opcode in _SAME:
            return self._element(scope, source.operands[0], index)
        if source.opcode == "parameter" and scope.outer is not None:
            if scope.loop is not None:
                return self._carried(scope, index)
            return self._element(scope.outer, scope.arguments[int(source.inside)], index)
        return None

    def _carried(self, body: Scope, index: int) -> Instruction | None:
        """The same of an element of a loop's tuple that its body passes on as it is."""
        if body.outer is None or not self._keeps(body.computation, index):
            return None
        return self._element(body.outer, body.arguments[0], index)

    def _keeps(self, body: str, index: int) -> bool:
        """Whether a loop's body passes an element of its tuple on as it is."""
        computation = self.hlo.computations[body]
        return self._is_element(computation, computation.root.operands[index], index)

    def _is_element(self, computation: Computation, name: str, index: int) -> bool:
        """Whether a value is this element of the computation's own tuple."""
        taken = self._plain(computation, name)
        if taken.opcode != "get-tuple-element":
            return False
        source = computation.instructions[taken.operands[0]]
        place = int(taken.required(r"\bindex=(\d+)"))
        if source.opcode == "while":  # which may pass it on too
            given = computation.instructions[source.operands[0]]
            return (
                given.opcode == "tuple"
                and self._keeps(source.required(r"body=%([\w.\-]+)"), place)
                and self._is_element(computation, given.operands[place], index)
            )
        return source.opcode == "parameter" and place == index

    def products(self, turn: Turn) -> Iterator[tuple[Instruction, int]]:
        """The matrix products within an instruction that runs, each with its FLOPs in one run of
        the program."""
        for computation, instruction in self.within(turn):
            if instruction.opcode in ("convolution", "dot"):
                shapes = [
                    dimensions(computation.instructions[name].shape)
                    for name in instruction.operands
                ]
                yield instruction, turn.times * flops(instruction, *shapes)

    def collectives(self, turn: Turn) -> Iterator[tuple[Instruction, bool]]:
        """What begins within an instruction that runs to move data between chips, and whether other
        work goes on meanwhile."""
        for computation, instruction in self.within(turn):
            opcode = instruction.opcode.removesuffix("-start")
            alone = computation is self.hlo.computations[turn.scope.computation]
            if opcode in COLLECTIVES and (alone or _begins(computation)):
                yield instruction, not alone or opcode != instruction.opcode

    def within(self, turn: Turn) -> Iterator[tuple[Computation, Instruction]]:
        """The instruction or, of a fusion, those that were fused."""

        def walk(computation: Computation, instruction: Instruction):
            if instruction.opcode == "fusion" and instruction.called:
                inner = self.hlo.computations[instruction.called]
                for one in inner.instructions.values():
                    yield from walk(inner, one)
            else:
                yield computation, instruction

        yield from walk(self.hlo.computations[turn.scope.computation], turn.instruction)


def within(scope: Scope, computation: str, arguments: list[str]) -> Scope:
    """Of a computation that runs once where it is called."""
    return Scope(computation, arguments, scope, None, scope.times, scope.open)


def _whole(constant: Instruction | None) -> int | None:
    """A constant's value, if it is a whole number."""
    if constant is None or constant.opcode != "constant":
        return None
    return int(constant.inside) if re.fullmatch(r"-?\d+", constant.inside) else None


def _cycles(turns: list[Turn]) -> int:
    return sum(turn.cycles for turn in turns)


def _begins(computation: Computation) -> bool:
    return 'custom_call_target="AsyncCollectiveStart"' in computation.root.rest
