"""Does a run fit? Compiles its real step for a TPU slice that is not here, or for more GPUs than
are: no weights, no data."""

import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path

import yaml
from rich.console import Console

from pvm_jax.config import ModelConfig
from pvm_jax.files.hub import model_directory
from pvm_jax.files.paths import any_path
from pvm_jax.options import command, given_options, parse
from pvm_jax.sharding import make_mesh
from train.fit import grpo, sft
from train.fit.footprint import gib
from train.grpo.config import GRPOConfig
from train.published import with_config_files
from train.sft.config import SFTConfig
from train.step.compile_ahead import gpu_devices, tpu_devices, usable_bytes

EXAMPLES = """
examples:
  python -m train.fit --config configs/sft_qwen3_vl_8b.yaml --model 8b \\
      --topology v5e:4x4 --accumulation 4
  python -m train.fit --config configs/sft_qwen3_vl_8b.yaml --model 8b \\
      --topology v5p:2x2x1 --accumulation 16 --trainable all
  python -m train.fit --config configs/sft_qwen3_vl_4b.yaml --devices 8
  python -m train.fit --config configs/grpo_qwen3_vl_8b.yaml --model 8b --topology v5p:2x2x2
Takes every key of train.sft or, where one is given that only train.grpo has, every key of that.
A TPU slice needs libtpu, the compiler, and no TPU (pip install 'jax[tpu]').
The exit status is 0 where every shape fits, 1 where one does not, 2 for an error.
"""


@dataclass(frozen=True)
class Target:
    """The devices that a run might have. Nothing of `checkpoint` is read but its config.json, of
    `data` the buckets.

    Attributes:
        topology: TPU slice by generation and chips: v5e:4x4, v5p:2x2x1 (which is sold as v5p-8),
            v6e:2x4, ...
        devices: in place of a topology: this many GPUs of the kind that this machine has.
        model: where the checkpoint is not at hand: 2b, 4b, 8b or 32b, a Hugging Face config.json,
            or a model of the Hub, OWNER/NAME (a plain one gets the branch at its default layers).
    """

    _: KW_ONLY
    topology: str | None = None
    devices: int | None = None
    model: str | None = None

    def check(self) -> None:
        """Raises ValueError unless there is one kind of devices."""
        if (self.topology is None) == (self.devices is None):
            raise ValueError(
                "give either topology (a TPU slice, as in v5e:4x4) or devices (a number of GPUs)"
            )
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


def recipe(argv: Sequence[str]) -> type[FitConfig] | type[FitGRPOConfig]:
    """The kind of run that `argv` asks about: GRPO's if a key is given that no other has."""
    given = set()
    for key, value in given_options(argv):
        given.add(key.partition(".")[0])
        if key == "config" and Path(value).is_file():
            keys = yaml.safe_load(Path(value).read_text())
            given |= keys.keys() if isinstance(keys, dict) else set()
    names, others = ({field.name for field in fields(cls)} for cls in (GRPOConfig, SFTConfig))
    return FitGRPOConfig if given & (names - others) else FitConfig


@command
def main(argv: Sequence[str]) -> None:
    """Parses `argv` (default: the process's arguments), prints what a step takes, and exits with
    the status that EXAMPLES names."""
    argv = with_config_files(argv)
    config, _ = parse(
        recipe(argv), argv, prog="python -m train.fit", description=__doc__ or "", examples=EXAMPLES
    )
    console = Console(highlight=False, soft_wrap=True)
    devices = tpu_devices(config.topology) if config.topology else gpu_devices(config.devices or 0)
    mesh = make_mesh(**asdict(config.mesh), devices=devices)
    model_config, usable = read_model_config(config), usable_bytes(mesh)
    console.print(
        f"{config.model or config.checkpoint}, trainable {config.trainable!r}, on {mesh.size} x"
        f" {devices[0].device_kind} of {gib(usable)} usable,"
        f" {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}"
    )
    if isinstance(config, FitGRPOConfig):
        fits = grpo.check(config, model_config, mesh, usable=usable, console=console)
    else:
        fits = sft.check(config, model_config, mesh, usable=usable, console=console)
    sys.exit(0 if fits else 1)


def read_model_config(config: FitConfig | FitGRPOConfig) -> ModelConfig:
    """Of the model that would train, with its branch.

    Raises:
        FileNotFoundError: if there is no config.json to read.
        OSError: if the Hub does not give it.
        ValueError: if it is of another architecture.
    """
    if config.model:
        source = model_directory(config.model, ["config.json"])
    else:
        source = any_path(config.checkpoint)
    if source.exists():
        model_config = ModelConfig.from_hf(source)
    elif config.model:
        try:
            model_config = ModelConfig.preset(config.model)
        except KeyError as error:
            raise ValueError(f"model {config.model!r}: no such file, and {error.args[0]}") from None
    else:
        raise FileNotFoundError(
            f"no checkpoint at {source}: say what it will be, as in --model 8b or --model"
            " DIR/config.json"
        )
    if config.branch and not (config.model and not any_path(config.branch).exists()):
        return model_config.with_branch_of(ModelConfig.from_hf(config.branch).text)
    if config.model and not model_config.text.pvm_layers:
        return model_config.with_pvm()  # as convert.hf_to_orbax would
    return model_config


if __name__ == "__main__":
    main()
