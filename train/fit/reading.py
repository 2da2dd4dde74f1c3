"""What a compiled TPU program reads of the chip's main memory, whose arrays that are, and which of
its parameters it copies."""

from collections.abc import Iterator
from typing import NamedTuple

from train.fit.hlo import Computation, Instruction, arrays, bytes_of, in_main_memory
from train.fit.schedule import Schedule, Scope, Turn, within

# Their result is their first operand or a part of it, somewhere or somehow else.
_MOVES = {
    "bitcast",
    "concatenate",
    "convert",
    "copy",
    "copy-done",
    "copy-start",
    "dynamic-slice",
    "pad",
    "reshape",
    "slice",
    "slice-done",
    "slice-start",
    "transpose",
}
_JOINED = 'custom_call_target="ConcatBitcast"'
_PARTS = ("dynamic-slice", "gather", "slice", "slice-start")
_UPDATES = ("dynamic-update-slice", "scatter")
_NAMES = ("bitcast", "constant", "get-tuple-element", "parameter", "tuple")
"""Nothing is read for these."""


class Value(NamedTuple):
    """What an instruction gives, or one element of the tuple that it gives."""

    scope: Scope
    name: str
    element: int | None = None


def reads(schedule: Schedule, turn: Turn) -> Iterator[tuple[Value, int]]:
    """What an instruction reads from main memory when it runs once, and the bytes of it."""
    instruction, scope = turn.instruction, turn.scope
    if instruction.opcode in _NAMES or instruction.opcode.endswith("-done"):
        return
    computation = schedule.hlo.computations[scope.computation]
    for place, name in enumerate(instruction.operands):
        shape = computation.instructions[name].shape
        if not shape.startswith("(") and in_main_memory(shape):
            whole = bytes_of(shape)
            yield Value(scope, name), min(_used(schedule, computation, instruction, place), whole)


def _used(schedule: Schedule, where: Computation, user: Instruction, place: int) -> int:
    """Bytes of an operand that its user reads."""
    if user.opcode == "fusion" and user.called:
        inner = schedule.hlo.computations[user.called]
        (name,) = (
            one.name
            for one in inner.instructions.values()
            if one.opcode == "parameter" and int(one.inside) == place
        )
        return _used_of(schedule, inner, name)
    if place == 0 and user.opcode in _PARTS:
        return bytes_of(arrays(user.shape)[1 if user.opcode == "slice-start" else 0])
    if place == 0 and user.opcode in _UPDATES:
        return 0
    return bytes_of(where.instructions[user.operands[place]].shape)


def _used_of(schedule: Schedule, where: Computation, name: str) -> int:
    """Bytes of a value that its users in a fused computation read: all, where it leaves that."""
    used = bytes_of(where.root.shape) if where.root.name == name else 0
    for user in where.instructions.values():
        for place, operand in enumerate(user.operands):
            if operand == name and user.opcode == "bitcast":
                used += _used_of(schedule, where, user.name)
            elif operand == name:
                used += _used(schedule, where, user, place)
    return used


def origin(schedule: Schedule, value: Value) -> Instruction | None:
    """The program's parameter that a value is, as it was or as a loop has updated it in place, or
    that it is a copy or a part of; None for what is computed."""
    scope, name, element = value
    one = schedule.hlo.computations[scope.computation].instructions[name]
    if one.opcode == "parameter":
        if scope.outer is None:
            return one
        place = 0 if scope.loop is not None else int(one.inside)
        return origin(schedule, Value(scope.outer, scope.arguments[place], element))
    if one.opcode == "get-tuple-element":
        index = int(one.required(r"\bindex=(\d+)"))
        return origin(schedule, Value(scope, one.operands[0], index))
    if one.opcode == "tuple" and element is not None:
        return origin(schedule, Value(scope, one.operands[element]))
    if one.opcode == "while":
        return origin(schedule, Value(scope, one.operands[0], element))
    if one.opcode == "fusion" and one.called:
        inner = within(scope, one.called, one.operands)
        root = schedule.hlo.computations[one.called].root
        return origin(schedule, Value(inner, root.name, element))
    if one.opcode in _MOVES | set(_UPDATES) or _JOINED in one.rest:
        return origin(schedule, Value(scope, one.operands[0]))
    return None


def copies(schedule: Schedule, turn: Turn) -> Iterator[tuple[Instruction, int]]:
    """Parameters of the program that an instruction only moves, whole or in part, and the bytes
    that it writes of them: in another layout or type, or beside what multiplies them. What is
    fetched ahead into a chip's small memories while it computes is none."""
    instruction = turn.instruction
    done = instruction.opcode.endswith("-done") or _JOINED in instruction.rest
    if done or instruction.opcode in _NAMES:
        return
    written = arrays(instruction.shape)
    if instruction.opcode in ("copy-start", "slice-start"):
        written = [written[instruction.opcode == "slice-start"]]
        if not in_main_memory(written[0]):
            return
    several = instruction.opcode == "fusion" and instruction.shape.startswith("(")
    for place, shape in enumerate(written):
        value = Value(turn.scope, instruction.name, place if several else None)
        source = None if _updated(schedule, value) else origin(schedule, value)
        if source is not None:
            yield source, bytes_of(shape)


def _updated(schedule: Schedule, value: Value) -> bool:
    """Whether a value is one that lies where it lay, with a part written anew."""
    scope, name, element = value
    one = schedule.hlo.computations[scope.computation].instructions[name]
    if one.opcode == "fusion" and one.called:
        root = schedule.hlo.computations[one.called].root
        return _updated(
            schedule, Value(within(scope, one.called, one.operands), root.name, element)
        )
    if one.opcode == "tuple" and element is not None:
        return _updated(schedule, Value(scope, one.operands[element]))
    if one.opcode == "bitcast":
        return _updated(schedule, Value(scope, one.operands[0]))
    return one.opcode in _UPDATES
