"""What a training step takes of each device, as a table, a verdict and advice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jax.sharding import Mesh
from rich.table import Table

from train.config import Bucket
from train.fit.cycles import StepTime
from train.grpo.config import GRPOConfig
from train.sft.config import SFTConfig


def largest(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Those that no other bucket covers: where these fit, all do."""

    def covers(one: Bucket, other: Bucket) -> bool:
        return one != other and one.tokens >= other.tokens and one.patches >= other.patches

    return [bucket for bucket in buckets if not any(covers(other, bucket) for other in buckets)]


def table_of(parts: Mapping[str, int], total: int) -> Table:
    """Bytes of a device by part, and in all."""
    table = Table("part", "a chip")
    table.columns[1].justify = "right"
    for name, size in parts.items():
        table.add_row(name, gib(size))
    table.add_section()
    table.add_row("total", gib(total))
    return table


@dataclass(frozen=True)
class Footprint:
    """What a run's step takes of each device, in rows of one bucket: bytes, unless said otherwise.

    Attributes:
        rows: that a device computes at the same time (a group of `tensor` devices, where there is
            one).
        frozen, params, moments, batch: the step's arguments, by their shapes.
        temporaries: what lives within a step: activations, gradients, gathered weights.
        usable: what a program may take of a device.
        refusal: what the compiler said where it refused; None where it compiled.
        seconds: of compilation.
        flops: FLOPs of a step without padding, one example and one image a row: no step of this
            shape has more.
        program: the compiled program's text, where it compiled.
        runs: of the program in a step.
    """

    config: SFTConfig | GRPOConfig
    bucket: Bucket
    mesh: Mesh
    rows: int
    frozen: int
    params: int
    moments: int
    batch: int
    temporaries: int
    usable: int
    refusal: str | None
    seconds: float
    flops: float
    program: str | None = field(default=None, repr=False)
    runs: int = 1

    @property
    def batches(self) -> int:
        """The step's own and the next one, which comes while it runs (`train.sft.loop`)."""
        return 2 * self.batch

    @property
    def total(self) -> int:
        return self.frozen + self.params + self.moments + self.batches + self.temporaries

    @property
    def fits(self) -> bool:
        return self.refusal is None and self.total <= self.usable

    def table(self) -> Table:
        """Bytes of a device by part."""
        parts = {
            f"frozen parameters, {self.config.dtype}": self.frozen,
            "trained parameters, float32": self.params,
            "optimizer state": self.moments,
            "batch, and the next one": self.batches,
            "temporaries: activations, gradients, gathered weights": self.temporaries,
        }
        return table_of(parts, self.total)

    def verdict(self) -> list[str]:
        """Lines below the table: work, whether it fits and, if not, what to change."""
        lines = [
            f"compiled in {self.seconds:.0f} s; at most {self.flops / 1e12:,.0f} TFLOP a step"
            " (remat not counted)"
        ]
        left = self.usable - self.total
        if self.fits:
            return [*lines, f"fits: {gib(left)} of {gib(self.usable)} are left"]
        over = (
            f"{gib(-left)} more than the usable {gib(self.usable)}"
            if left < 0
            else f"the compiler refuses: {self.refusal}"
        )
        return [
            *lines,
            f"does not fit: {over}. What would help, by this program's own figures:",
            *self.advice(),
        ]

    def time(self) -> list[Table | str]:
        """What a step would take by the TPU compiler's own count; nothing for other devices, and
        where it did not compile.

        Raises:
            ValueError: if the compiled program is not understood.
        """
        device = self.mesh.devices.flat[0]
        if self.program is None or device.platform != "tpu":
            return []
        estimate = StepTime.of(self.program, device.device_kind, times=self.runs)
        return [estimate.table(), *estimate.summary()]

    def advice(self) -> list[str]:
        """What to change so that the step fits, the harmless first, with an estimate of what it
        saves."""
        config, shape, over = self.config, self.mesh.shape, self.total - self.usable
        # Micro-batches sum their gradients up beside their own. All other temporaries grow with the
        # rows.
        gradients = self.params * (1 if config.accumulation == 1 else 2)
        by_rows = max(self.temporaries - gradients, 0)
        by_chips = self.frozen + self.params + self.moments + gradients
        found: list[tuple[str, int | None]] = []
        if config.remat != "full":
            found.append(("remat: full", None))
        if config.dtype == "float32":
            found.append(("dtype: bfloat16", (self.frozen + by_rows) // 2))
        if self.rows > 1:
            parts = next(
                (k for k in _divisors(self.rows) if by_rows * (k - 1) // k >= over), self.rows
            )
            change = (
                f"accumulation: {config.accumulation * parts}, {self.rows // parts} rows at a time"
                f" in place of {self.rows}"
            )
            found.append((change, by_rows * (parts - 1) // parts))
        if (copies := shape["data"]) > 1:
            change = f"mesh: {{data: 1, fsdp: -1}}, parameters in {copies} times as many parts"
            found.append((change, by_chips * (copies - 1) // copies))
        if self.rows == 1 and shape["fsdp"] > 1:
            tensor = shape["tensor"] * 2
            change = (
                f"mesh.tensor: {tensor} and accumulation: {config.accumulation * 2}, {tensor} chips"
                " share the work on each row"
            )
            found.append((change, None))
        if (room := self.usable - (self.total - by_chips)) > 0:
            chips = -(-by_chips * self.mesh.size // room)
            what = "parameters, gradients and optimizer state"
            found.append(
                (
                    (
                        f"{chips} such chips: {what} take {gib(by_chips)} of each of the"
                        f" {self.mesh.size}"
                    ),
                    over,
                )
            )
        if config.trainable in ("decoder", "all"):
            rest = self.params // 2 if config.dtype == "bfloat16" else self.params
            found.append(("trainable: pvm or lora", by_chips - self.frozen - rest))
        if [bucket for bucket in config.data.buckets if bucket.tokens < self.bucket.tokens]:
            largest = f"{{tokens: {self.bucket.tokens}, patches: {self.bucket.patches}}}"
            found.append((f"data.buckets without {largest}: longer examples are left out", None))
        return [
            f"  - {change} "
            + (
                "(not estimated)"
                if saves is None
                else f"(about {gib(saves)} less{', enough' * (saves >= over)})"
            )
            for change, saves in found
        ]


def _divisors(number: int) -> list[int]:
    return [k for k in range(2, number + 1) if number % k == 0]


def gib(size: int) -> str:
    """Bytes in GiB, to print."""
    return f"{size / 2**30:.2f} GiB"
