"""The training commands that the documentation shows are ones that a run takes."""

import re
import shlex
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from train.config import SFTConfig, parse
from train.grpo_config import GRPOConfig
from train.program import rows_per_shard

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python -m train\.(sft|grpo) +(--(?:\\\n|[^`\n])*)")
END = re.compile(r"\s(?:#|>|&)")
"""What follows is the shell's."""

PLACEHOLDERS = {"...", "$@"}


def shown():
    """(entry, arguments) of every command in the documentation."""
    for file in FILES:
        text = file.read_text()
        for match in COMMAND.finditer(text):
            entry, rest = match.groups()
            words = shlex.split(END.split(rest.replace("\\\n", " "))[0])
            place = f"{file.name}:{text.count(chr(10), 0, match.start()) + 1}"
            yield pytest.param(entry, [word for word in words if word not in PLACEHOLDERS], id=place)


@pytest.mark.parametrize(("entry", "arguments"), list(shown()))
def test_a_command_is_one_that_a_run_takes(entry, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    cls = {"sft": SFTConfig, "grpo": GRPOConfig}[entry]
    config, _ = parse(cls, arguments, prog=entry, description="", examples="", flags={"--dry-run": ""})
    sizes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    if -1 not in sizes:
        rows = config.batch_size if isinstance(config, SFTConfig) else config.rows
        rows_per_shard(rows, config.accumulation, AbstractMesh(sizes, ("data", "fsdp", "tensor")))
