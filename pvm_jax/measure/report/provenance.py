"""Where a report comes from: what someone needs who cites it or wants to run it again."""

import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax
from flax import nnx

from pvm_jax.checkpoint.identity import backbone_identity, branch_identity, lora_identity
from pvm_jax.data.example import Example
from pvm_jax.model.qwen3_vl import Qwen3VL


def provenance(
    models: Mapping[str, Qwen3VL],
    examples: Sequence[Example],
    with_filler: Sequence[Sequence[Example]] = (),
) -> list[tuple[str, str]]:
    """What was run, when, where and on what: names and values, in the page's order.

    Args:
        with_filler: the conversations at each number of words ahead or between.
    """
    devices = jax.devices()
    facts = [
        ("date", datetime.now(UTC).isoformat(timespec="seconds")),
        ("version", f"pvm-jax {version('pvm-jax')}{_commit()}, jax {jax.__version__}"),
        ("command", _command()),
        ("device", f"{len(devices)} x {devices[0].device_kind} ({platform.machine()})"),
        ("conversations", f"{len(examples):,}, identity {data_identity(examples)}"),
    ]
    if with_filler:
        count, every = len(with_filler[0]), [one for those in with_filler for one in those]
        facts.append(("with filler text", f"{count:,}, identity {data_identity(every)}"))
    for name, model in models.items():
        params = nnx.state(model)
        dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
        parts = [f"{' and '.join(dtypes)}, backbone {backbone_identity(params)}"]
        if branch := branch_identity(params):
            parts.append(f"branch {branch}")
        if lora := lora_identity(params):
            parts.append(f"LoRA {lora}")
        facts.append((name, ", ".join(parts)))
    return facts


def data_identity(examples: Sequence[Example]) -> str:
    """A short hexadecimal name of the conversations as the models read them: their tokens and their
    pixels, in this order."""
    digest = hashlib.sha256()
    for example in examples:
        for array in (example.input_ids, example.pixel_values, example.pixel_values_videos):
            if array is not None:
                digest.update(f"{array.shape} {array.dtype} ".encode())
                digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _command() -> str:
    """What was typed: a module that python ran, or a command by its name."""
    module = sys.modules["__main__"].__spec__
    typed = ["python", "-m", module.name.removesuffix(".__main__")] if module else None
    return shlex.join([*(typed or [Path(sys.argv[0]).name]), *sys.argv[1:]])


def _commit() -> str:
    """The commit of the checkout that this package runs from, and whether files differ from it; ""
    for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        said = [
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f", commit {said[0]}{' with changes' if said[1] else ''}"
