"""Does a run fit? Compiles its real step for a TPU slice that is not here, or for more GPUs than are: no weights, no data."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path

import yaml
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from pvm_jax.config import ModelConfig
from pvm_jax.sharding import make_mesh
from train.config import Bucket, SFTConfig, parse
from train.grpo.config import GRPOConfig
from train.step.compile_ahead import compile_ahead, device_bytes, gpu_devices, tpu_devices, usable_bytes
from train.step.flops import Work, peak_flops
from train.step.program import SFTProgram, rows_per_shard, step_costs

EXAMPLES = """
examples:
  python -m train.fit --config configs/sft_qwen3_vl_8b.yaml --model 8b --topology v5e:4x4 --accumulation 4
  python -m train.fit --config configs/sft_qwen3_vl_8b.yaml --model 8b --topology v5p:2x2x1 --accumulation 16 --trainable all
  python -m train.fit --config configs/sft_qwen3_vl_4b.yaml --devices 8
  python -m train.fit --config configs/grpo_qwen3_vl_8b.yaml --model 8b --topology v5p:2x2x2
Takes every key of train.sft or, where one is given that only train.grpo has, every key of that.
A TPU slice needs libtpu, the compiler, and no TPU (pip install 'jax[tpu]').
The exit status is 0 where every shape fits, 1 where one does not, 2 for an error.
"""


@dataclass(frozen=True)
class Target:
    """The devices that a run might have. Nothing of `checkpoint` is read but its config.json, of `data` the buckets.

    Attributes:
        topology: TPU slice by generation and chips: v5e:4x4, v5p:2x2x1 (which is sold as v5p-8), v6e:2x4, ...
        devices: in place of a topology: this many GPUs of the kind that this machine has.
        model: where the checkpoint is not at hand: 2b, 4b, 8b or 32b, or a Hugging Face config.json (a plain one gets the
            branch at its default layers).
    """

    _: KW_ONLY
    topology: str | None = None
    devices: int | None = None
    model: str | None = None

    def check(self) -> None:
        """Raises ValueError unless there is one kind of devices."""
        if (self.topology is None) == (self.devices is None):
            raise ValueError("give either topology (a TPU slice, as in v5e:4x4) or devices (a number of GPUs)")
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"devices must be at least 1, got {self.devices}")


@dataclass(frozen=True)
class FitConfig(Target, SFTConfig):
    """A run of supervised fine-tuning, and the devices that it might have."""

    def __post_init__(self):
        super().__post_init__()
        self.check()


@dataclass(frozen=True)
class FitGRPOConfig(Target, GRPOConfig):
    """A run of GRPO, and the devices that it might have."""

    def __post_init__(self):
        super().__post_init__()
        self.check()


def recipe(argv: Sequence[str] | None) -> type[FitConfig] | type[FitGRPOConfig]:
    """The kind of run that `argv` asks about: GRPO's if a key is given that no other has."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    known, others = parser.parse_known_args(argv)
    given = {option.removeprefix("--").partition("=")[0].partition(".")[0] for option in others if option.startswith("--")}
    for file in filter(Path.is_file, map(Path, known.config)):
        given |= set(yaml.safe_load(file.read_text()) or {})
    names, others = ({field.name for field in fields(cls)} for cls in (GRPOConfig, SFTConfig))
    return FitGRPOConfig if given & (names - others) else FitConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` (default: the command line), prints what a step takes, and exits with the status that EXAMPLES names."""
    config, _ = parse(recipe(argv), argv, prog="python -m train.fit", description=__doc__ or "", examples=EXAMPLES)
    console, fits = Console(highlight=False, soft_wrap=True), True
    try:
        devices = tpu_devices(config.topology) if config.topology else gpu_devices(config.devices or 0)
        mesh = make_mesh(**asdict(config.mesh), devices=devices)
        model_config, usable = read_model_config(config), usable_bytes(mesh)
        console.print(
            f"{config.model or config.checkpoint}, trainable {config.trainable!r}, on {mesh.size} x {devices[0].device_kind} "
            f"of {gib(usable)} usable, {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}"
        )
        if isinstance(config, FitGRPOConfig):
            from train.fit.grpo import check  # which needs this module

            sys.exit(0 if check(config, model_config, mesh, usable, console) else 1)
        for bucket in largest(config.data.buckets):
            rows = rows_per_shard(config.batch_size, config.accumulation, mesh)
            console.print(
                f"rows of {bucket.tokens:,} tokens and {bucket.patches:,} patches, {config.batch_size} a step, {rows} a chip "
                "at a time: compiling, which takes minutes ..."
            )
            footprint = measure(config, model_config, bucket, mesh, usable)
            console.print(footprint.table(), *footprint.verdict(), sep="\n")
            fits &= footprint.fits
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if fits else 1)


def read_model_config(config: FitConfig | FitGRPOConfig) -> ModelConfig:
    """Of the model that would train, with its branch.

    Raises:
        FileNotFoundError: if there is no config.json to read.
        ValueError: if it is of another architecture.
    """
    source = Path(config.model or config.checkpoint)
    if source.exists():
        model_config = ModelConfig.from_hf(source)
    elif config.model:
        try:
            model_config = ModelConfig.preset(config.model)
        except KeyError as error:
            raise ValueError(f"model {config.model!r}: no such file, and {error.args[0]}") from None
    else:
        raise FileNotFoundError(f"no checkpoint at {source}: say what it will be, as in --model 8b or --model DIR/config.json")
    if config.branch and not (config.model and not Path(config.branch).exists()):
        return model_config.with_branch_of(ModelConfig.from_hf(config.branch).text)
    if config.model and not model_config.text.pvm_layers:
        return model_config.with_pvm()  # as convert.hf_to_orbax would
    return model_config


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
        rows: that a device computes at the same time (a group of `tensor` devices, where there is one).
        frozen, params, moments, batch: the step's arguments, by their shapes.
        temporaries: what lives within a step: activations, gradients, gathered weights.
        usable: what a program may take of a device.
        refusal: what the compiler said where it refused; None where it compiled.
        seconds: of compilation.
        flops: FLOPs of a step without padding, one example and one image a row: no step of this shape has more.
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
        """Lines below the table: time, work, whether it fits and, if not, what to change."""
        lines = [f"compiled in {self.seconds:.0f} s; at most {self.flops / 1e12:,.0f} TFLOP a step (remat not counted)"]
        if peak := peak_flops(self.mesh.devices.flat[0].device_kind):
            fast, slow = (self.flops / self.mesh.size / peak / mfu for mfu in (0.5, 0.4))
            lines.append(f"at 40 to 50 % MFU that would be {slow:.1f} to {fast:.1f} s: arithmetic, not a measurement")
        left = self.usable - self.total
        if self.fits:
            return [*lines, f"fits: {gib(left)} of {gib(self.usable)} are left"]
        over = f"{gib(-left)} more than the usable {gib(self.usable)}" if left < 0 else f"the compiler refuses: {self.refusal}"
        return [*lines, f"does not fit: {over}. What would help, by this program's own figures:", *self.advice()]

    def advice(self) -> list[str]:
        """What to change so that the step fits, the harmless first, with an estimate of what it saves."""
        config, shape, over = self.config, self.mesh.shape, self.total - self.usable
        # Micro-batches sum their gradients up beside their own. All other temporaries grow with the rows.
        gradients = self.params * (1 if config.accumulation == 1 else 2)
        by_rows = max(self.temporaries - gradients, 0)
        by_chips = self.frozen + self.params + self.moments + gradients
        found: list[tuple[str, int | None]] = []
        if config.remat != "full":
            found.append(("remat: full", None))
        if config.dtype == "float32":
            found.append(("dtype: bfloat16", (self.frozen + by_rows) // 2))
        if self.rows > 1:
            parts = next((k for k in _divisors(self.rows) if by_rows * (k - 1) // k >= over), self.rows)
            change = f"accumulation: {config.accumulation * parts}, {self.rows // parts} rows at a time in place of {self.rows}"
            found.append((change, by_rows * (parts - 1) // parts))
        if (copies := shape["data"]) > 1:
            change = f"mesh: {{data: 1, fsdp: -1}}, parameters in {copies} times as many parts"
            found.append((change, by_chips * (copies - 1) // copies))
        if self.rows == 1 and shape["fsdp"] > 1:
            tensor = shape["tensor"] * 2
            change = (
                f"mesh.tensor: {tensor} and accumulation: {config.accumulation * 2}, {tensor} chips share the work on each row"
            )
            found.append((change, None))
        if (room := self.usable - (self.total - by_chips)) > 0:
            chips = -(-by_chips * self.mesh.size // room)
            what = "parameters, gradients and optimizer state"
            found.append((f"{chips} such chips: {what} take {gib(by_chips)} of each of the {self.mesh.size}", over))
        if config.trainable in ("decoder", "all"):
            rest = self.params // 2 if config.dtype == "bfloat16" else self.params
            found.append(("trainable: pvm or lora", by_chips - self.frozen - rest))
        if [bucket for bucket in config.data.buckets if bucket.tokens < self.bucket.tokens]:
            largest = f"{{tokens: {self.bucket.tokens}, patches: {self.bucket.patches}}}"
            found.append((f"data.buckets without {largest}: longer examples are left out", None))
        return [
            f"  - {change} "
            + ("(not estimated)" if saves is None else f"(about {gib(saves)} less{', enough' * (saves >= over)})")
            for change, saves in found
        ]


def measure(config: SFTConfig, model_config: ModelConfig, bucket: Bucket, mesh: Mesh, usable: int) -> Footprint:
    """Compiles the step that `train.sft` would run on `mesh`, in rows of `bucket`; `usable`: bytes of each device.

    Raises:
        ValueError: if the batch does not divide over the mesh, or nothing would train.
    """
    rows = rows_per_shard(config.batch_size, config.accumulation, mesh)
    program = SFTProgram.of(config, model_config, 1, mesh)
    batch = program.abstract_batch(bucket, config.batch_size)
    compiled = compile_ahead(program.step, program.state, program.frozen, batch, mesh=mesh)
    work = Work.full(config.batch_size, bucket.tokens, bucket.patches, model_config.vision.merge_factor)
    inputs = {
        "frozen": program.frozen,
        "params": program.state.params,
        "moments": (program.state.opt_state, program.state.step),
        "batch": batch,
    }
    sizes = {name: device_bytes(tree) for name, tree in inputs.items()}
    return Footprint(
        config,
        bucket,
        mesh,
        rows,
        **sizes,
        temporaries=compiled.total - sum(sizes.values()),
        usable=usable,
        refusal=compiled.refusal,
        seconds=compiled.seconds,
        flops=work.flops(step_costs(config, program.model_config)),
    )


def _divisors(number: int) -> list[int]:
    return [k for k in range(2, number + 1) if number % k == 0]


def gib(size: int) -> str:
    """Bytes in GiB, to print."""
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
