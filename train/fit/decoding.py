"""What a decoding step takes by the TPU compiler's own count, and what it reads, beside the least:
weights, caches and memories once. An estimate: nothing ran."""

from collections import Counter
from dataclasses import dataclass
from typing import Self

from train.fit.cycles import StepTime
from train.fit.hlo import Hlo, bytes_of, unreadable
from train.fit.reading import copies, origin, reads
from train.fit.schedule import Schedule

PARTS = {
    "pvm_jax/model/memory.py": "branch",
    "pvm_jax/model/attend.py": "attention",
    "pvm_jax/model/decoder.py": "decoder",
    "pvm_jax/model/qwen3_vl.py": "head",
    "pvm_jax/generation.py": "sampling",
}
"""The part of a decoding step that a line of Python belongs to, as `train.fit.cycles.PARTS`."""

LEAST_COPIED = 2**16
"""Bytes of a copy that is told; norms' weights and tokens take less."""


@dataclass(frozen=True)
class TokenTime:
    """A chip's time for one round of `decode_loop`: a token of every row.

    Attributes:
        time: of the loop's body, by PARTS.
        read: bytes of main memory that it reads.
        once: bytes of the program's parameters of which it reads anything, each part once.
        copies: bytes of copies that it makes of a parameter, from LEAST_COPIED on, by the
            parameter's name.
        copies_before: the same of what runs once, before the loop.
    """

    time: StepTime
    read: int
    once: int
    copies: Counter[str]
    copies_before: Counter[str]

    @classmethod
    def of(cls, text: str, device_kind: str) -> Self:
        """Of the compiled `decode_loop`'s text.

        Raises:
            ValueError: if the text is not understood, or the chip is not known.
        """
        schedule = Schedule(Hlo.parse(text), rounds=1)
        turns = list(schedule.turns())
        body = [turn for turn in turns if turn.scope.open]
        if not body:
            raise unreadable("no loop in it ends by what it has decoded")
        read, read_of, whole = 0, Counter[str](), {}
        copied = Counter[str](), Counter[str]()
        for turn in turns:
            for source, size in copies(schedule, turn):
                if size >= LEAST_COPIED:
                    name = source.op_name.replace("\\'", "'")
                    copied[turn.scope.open][name] += turn.times * size
        for turn in body:
            for value, size in reads(schedule, turn):
                read += turn.times * size
                if (source := origin(schedule, value)) is not None:
                    read_of[source.name] += turn.times * size
                    whole[source.name] = bytes_of(source.shape)
        return cls(
            time=StepTime.of_turns(schedule, body, device_kind, PARTS),
            read=read,
            once=sum(min(read_of[name], size) for name, size in whole.items()),
            copies=copied[True],
            copies_before=copied[False],
        )

    @property
    def seconds(self) -> float:
        """By the compiler's count."""
        return self.time.outside + self.time.kernels_at_peak

    @property
    def floor(self) -> float:
        """Seconds in which the chip reads `once`."""
        return self.once / self.time.chip.memory
