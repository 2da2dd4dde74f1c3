"""The commands that the documentation shows are ones that there are, with arguments that they
take."""

import dataclasses
import importlib.util
import pkgutil
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from jax.sharding import AbstractMesh
from jsonargparse import ArgumentParser

import pvm_jax
from pvm_jax.options import parse
from tests.check_docs import SMALLEST
from train.grpo.config import GRPOConfig
from train.sft.config import SFTConfig
from train.step.program import rows_per_shard

ROOT = Path(__file__).parents[1]
FILES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"python -m ([a-z_]+(?:\.[a-z_]+)*)((?:\\\n|[^`\n])*)")
PVM = re.compile(r"^ {4}pvm ((?:\\\n|[^`\n])*)", re.MULTILINE)
API = sorted((ROOT / "docs" / "api").glob("*.md"))
PAGE = ROOT / "docs" / "coming_from.md"
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
    if module.split(".")[0] in ("lmms_eval", "maxtext", "venv"):
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


def keys(cls: Any, of: str = "") -> Iterator[str]:
    """The keys of a config, `optimizer.b1` among them."""
    for name, kind in get_type_hints(cls).items():
        yield of + name
        for inner in (kind, *get_args(kind)):
            if dataclasses.is_dataclass(inner):
                yield from keys(inner, f"{of}{name}.")


def test_what_the_words_of_others_lead_to_is_there():
    """In the middle column of the tables: a cell's first word, and what has a dot, are keys."""
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|[^|]*\|$", PAGE.read_text(), re.MULTILINE)
    named = {word for row in rows for word in re.findall(r"^ `([\w.]+)|`(\w+\.[\w.]+)", row)}
    words = {"".join(pair) for pair in named}
    assert len(words) > 40
    assert words <= {*keys(SFTConfig), *keys(GRPOConfig)}


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: (\S+)", "".join(file.read_text() for file in API), re.MULTILINE)
    assert all(pkgutil.resolve_name(name) for name in named)
    assert {f"pvm_jax.{name}" for name in pvm_jax.__all__} - {"pvm_jax.__version__"} <= {*named}


def test_every_page_is_in_the_site_and_every_link_leads_to_a_file():
    site = (ROOT / "mkdocs.yml").read_text().replace("index.md", "README.md")
    for file in FILES:
        assert f"- {file.relative_to(ROOT).as_posix().removeprefix('docs/')}\n" in site
        links = re.findall(r"(?:\]\(|src=\")([^)#\"]+)", file.read_text())
        missing = [name for name in links if ":" not in name and not (file.parent / name).exists()]
        assert not missing, file
