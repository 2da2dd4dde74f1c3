"""The commands that the documentation shows are ones that there are, with arguments that they
take."""

import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh
from jsonargparse import ArgumentParser

from pvm_jax.options import parse
from tests.check_docs import SMALLEST
from train.grpo.config import GRPOConfig
from train.sft.config import SFTConfig
from train.step.program import rows_per_shard

ROOT = Path(__file__).parents[1]
FILES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python -m ([a-z_]+(?:\.[a-z_]+)*)((?:\\\n|[^`\n])*)")
PVM = re.compile(r"^ {4}pvm ((?:\\\n|[^`\n])*)", re.MULTILINE)
END = re.compile(r"\s(?:#|>|&)")
"""What follows is the shell's."""

PLACEHOLDERS = {"...", "$@"}


def shown():
    """(module, arguments) of every command in the documentation."""
    for file in FILES:
        text = file.read_text()
        for match in [*COMMAND.finditer(text), *PVM.finditer(text)]:
            *module, rest = match.groups()
            words = shlex.split(END.split(rest.replace("\\\n", " "))[0], comments=True)
            place = f"{file.name}:{text.count(chr(10), 0, match.start()) + 1}"
            yield pytest.param(
                *(module or ["pvm_jax.console"]),
                [word for word in words if word not in PLACEHOLDERS],
                id=place,
            )


def smallest():
    """(module, arguments) of every benchmark, as docs-check runs it."""
    for name, arguments in SMALLEST.items():
        yield pytest.param(f"benchmarks.{name}", shlex.split(arguments), id=f"smallest {name}")


class Parsed(BaseException):
    """Raised where a command has read its arguments, before it does what they say."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("module", "arguments"), [*shown(), *smallest()])
def test_a_command_is_there_and_takes_its_arguments(module, arguments, monkeypatch):
    """One that is only named in a sentence is just there."""
    if module.split(".")[0] in ("lmms_eval", "venv"):
        pytest.skip("not ours")
    assert importlib.util.find_spec(module) is not None
    if not arguments:
        return
    if module == "benchmarks.against_torch" and importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch")
    parse_args = ArgumentParser.parse_args

    def stop(*args, **options):
        parse_args(*args, **options)
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


def runs():
    for param in shown():
        module, arguments = param.values
        if module in ("train.sft", "train.grpo") and arguments:
            yield pytest.param(module, arguments, id=param.id)


@pytest.mark.parametrize(("module", "arguments"), list(runs()))
def test_the_rows_of_a_run_divide_over_its_mesh(module, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    cls = {"train.sft": SFTConfig, "train.grpo": GRPOConfig}[module]
    config, _ = parse(
        cls, arguments, prog=module, description="", examples="", flags={"dry_run": ""}
    )
    sizes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    if -1 not in sizes:
        rows = config.batch_size if isinstance(config, SFTConfig) else config.rows
        rows_per_shard(rows, config.accumulation, AbstractMesh(sizes, ("data", "fsdp", "tensor")))


def test_every_benchmark_is_run_by_docs_check():
    files = (ROOT / "benchmarks").glob("*.py")
    assert {file.stem for file in files if "__main__" in file.read_text()} == SMALLEST.keys()
