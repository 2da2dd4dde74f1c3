"""Runs of train.sft and train.grpo on a tiny checkpoint, in this process and in others."""

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from demo.checkpoint import write_assets
from pvm_jax.checkpoint.store import save
from pvm_jax.model.qwen3_vl import Qwen3VL
from pvm_jax.sharding import make_mesh
from tests import tiny
from tests.train.forks import Fork, call_main
from tests.xla_flags import DEVICES
from train.run import dry_run, lifecycle
from train.run.events import read_values
from train.sft import __main__ as sft
from train.step.program import Program

ROOT = Path(__file__).parents[2]
LONG, STEPS = "--epochs=4", 16  # of 32 examples in batches of 8


def write_workplace(root: Path, *, examples: int) -> Qwen3VL:
    """Writes base/ (a tiny checkpoint, its model is returned) and data.jsonl with images into
    `root`."""
    model = tiny.make_model(tiny.cut(write_assets(root / "hf").with_pvm((0,), 64)))
    save(root / "base", model, assets=root / "hf")
    rng = np.random.default_rng(0)
    with open(root / "data.jsonl", "w") as file:
        for index in range(examples):
            size = (32, 32) if index % 3 else (64, 32)
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(
                root / f"{index}.png"
            )
            content = [{"type": "image", "image": f"{index}.png"}, {"type": "text", "text": "List"}]
            answer = "B3 ground navy\n" * (1 + index % 2)
            messages = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return model


def _cache(root: Path) -> dict[str, Any]:
    """Settings of JAX by which programs are kept in `root`."""
    return {
        "jax_compilation_cache_dir": str(root / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }


_programs: dict[Path, dict[Any, Program]] = {}


@contextmanager
def programs_kept(root: Path) -> Iterator[None]:
    """Runs of this process in `root` share the programs of equal configurations, traced once; what
    is compiled meanwhile is kept there, where `start` has its processes look for it too."""
    settings = _cache(root)
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    known, make = _programs.setdefault(root, {}), Program.of.__func__

    def of(cls, config, model_config, updates, mesh):
        same = replace(config, run_dir="any", checkpoint="any", held_out=None, log_every=1)
        key = cls, repr(replace(same, checkpoint_every=1)), model_config, updates, mesh
        if key not in known:
            known[key] = make(cls, config, model_config, updates, mesh)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "of", classmethod(of))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@contextmanager
def one_device() -> Iterator[None]:
    """Runs of this process take its first device alone: programs for eight compile longer."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (lifecycle, dry_run):
            patch.setattr(module, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        yield


def arguments(root: Path, run_dir: str | Path, *more: str) -> list[str]:
    """Of train.sft, for a run of the workplace `root` in float32, a checkpoint every two steps."""
    return [
        *(
            f"--checkpoint={root / 'base'}",
            f"--run_dir={root / run_dir}",
            f"--data.sources={root / 'data.jsonl'}",
        ),
        *(
            "--data.packing=false",
            "--data.buckets=[{tokens: 48, patches: 8}]",
        ),
        *("--batch_size=8", "--dtype=float32", "--remat=none", "--optimizer.learning_rate=1e-2"),
        *("--log_every=2", "--checkpoint_every=2"),
        *more,
    ]


def grpo_arguments(root: Path, run_dir: str | Path, *more: str) -> list[str]:
    """Of train.grpo, for a run of the workplace `root` in float32: steps of 8 prompts with 2
    completions each."""
    return [
        *(
            f"--checkpoint={root / 'base'}",
            f"--run_dir={root / run_dir}",
            f"--data.sources={root / 'data.jsonl'}",
        ),
        *(
            "--data.buckets=[{tokens: 24, patches: 8}]",
            "--prompts_per_step=8",
            "--group_size=2",
            "--max_completion_tokens=16",
        ),
        *(
            "--rewards=[{function: 'tests.train.reward_functions:letters'}]",
            "--reward_workers=1",
            "--mask_truncated=false",
        ),
        *(
            "--trainable=pvm",
            "--dtype=float32",
            "--remat=none",
            "--optimizer.learning_rate=1e-2",
            "--temperature=0.8",
        ),
        *("--checkpoint_every=2", "--epochs=2"),
        *more,
    ]


def run(root: Path, run_dir: str | Path, *more: str) -> None:
    """A run of train.sft in this process, on its first device."""
    with one_device(), raising():
        sft.main(arguments(root, run_dir, "--distributed.num_processes=1", *more))


def start(
    root: Path,
    run_dir: str | Path,
    *more: str,
    processes: int = 1,
    devices: int = 1,
    module: str = "train.sft",
) -> list[Fork]:
    """Starts a run on `processes` x `devices` simulated devices, programs cached in `root`; output
    goes to files in `root`."""
    make = {"train.sft": arguments, "train.grpo": grpo_arguments}[module]
    coordinator = f"127.0.0.1:{free_port()}"
    started = []
    for process in range(processes):
        found = [
            f"--distributed.coordinator_address={coordinator}",
            f"--distributed.process_id={process}",
        ]
        found = [f"--distributed.num_processes={processes}", *(found if processes > 1 else [])]
        started.append(
            Fork(
                call_main,
                module,
                make(root, run_dir, *found, *more),
                _cache(root),
                environment=environment(devices=devices),
                output=output_file(root, run_dir, process),
            )
        )
    return started


def finish(root: Path, run_dir: str | Path, started: Sequence[Fork], *, code: int = 0) -> list[str]:
    """Waits for the processes of a run to exit with `code`. What each of them (and earlier ones of
    the run) said."""
    try:
        codes = [process.wait(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    said = [output_file(root, run_dir, process).read_text() for process in range(len(started))]
    assert codes == [code] * len(started), "\n".join(said)
    return said


@contextmanager
def raising() -> Iterator[None]:
    """The error that ended a command in this process, in place of the exit."""
    try:
        yield
    except SystemExit as ended:
        raise (ended.__cause__ if ended.code == 2 else None) or ended from None


def output_file(root: Path, run_dir: str | Path, process: int) -> Path:
    """Where a process of a run says what it says."""
    return root / f"{Path(run_dir).name}.{process}.txt"


def losses(root: Path, run_dir: str | Path) -> dict[int, set[float]]:
    """{step: every loss that was logged for it}."""
    found: dict[int, set[float]] = {}
    for step, value in read_values(root / run_dir / "log").get("train/loss", []):
        found.setdefault(step, set()).add(value)
    return found


def environment(*, devices: int) -> dict[str, str]:
    """Of a process with `devices` simulated devices, compiling as tests/conftest.py has it."""
    flags = f"{os.environ['XLA_FLAGS']} {DEVICES}{devices}"  # the last one holds
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
