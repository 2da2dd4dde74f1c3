"""Runs the commands in docs/*.md, then every benchmark: `make docs-check`.

Of one file alone: `python -m tests.check_docs docs/data.md`.

A fence that begins with ```sh is run, with bash, from the root of the repository; in ```console,
```text and others nothing is. The fences of a file run in their order in one place: a folder with
links to what the repository holds, where everything that they write stays apart from it and is
removed. They have no network (Hugging Face is offline) and no accelerator.
"""

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
SMALLEST = {
    "against_torch": "--rows 1 --text 16 --side 4 --new_tokens 4 --repeats 1",
    "attention": "--size small --tokens 256 --patches 256",
    "attention_blocks": "--count 24 --tokens 2048 --patches 2560",
    "checkpoints": "--sizes [1] --saves 1 --step_seconds 0.05",
    "checksums": "--repeats 1",
    "conversion": "--preset small --back",
    "decoding": "--visual_tokens [16] --batches [1] --text_tokens 16 --steps 2 --repeats 1",
    "device": "small --rows 1 --text 64 --side 8",
    "input_pipeline": "--count 24 --threads 2",
    "packing": "--count 24 --batch_size 1",
    "step_cost": "--sizes [2b] --tokens 64 --patches 64",
    "tpu_attention": "--blocks [512] --tokens 2048 --patches 2560 --count 24",
    "tpu_decoding": "--sizes [small] --slices '{v6e:2x2: 1}' --batches [1] --slots 128",
}
"""Arguments with which each benchmark takes least; tests/test_docs.py sees that none is missing.

What they share, benchmarks/sizes.py, is no command.
"""

NEEDS = {"against_torch": "torch", "tpu_attention": "libtpu", "tpu_decoding": "libtpu"}
"""Packages without which a benchmark is not run."""

_FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main(files: Sequence[str]) -> None:
    """Checks `files` (none: all of docs/, then the benchmarks); names what fails first, and
    ends."""
    for file in map(Path, files or sorted((ROOT / "docs").glob("*.md"))):
        check_file(file)
    if not files:
        check_benchmarks()


def check_file(file: Path) -> None:
    with TemporaryDirectory() as place:
        for entry in ROOT.iterdir():
            if entry.name not in ("out", ".git"):
                (Path(place) / entry.name).symlink_to(entry)
        for line, commands in fences(file.read_text()):
            start = time.perf_counter()
            done = run(commands, Path(place))
            if done.returncode:
                sys.exit(f"{file}:{line}: exit status {done.returncode}\n{commands}\n{done.stdout}")
            print(f"{file}:{line}: {time.perf_counter() - start:.0f} s", flush=True)


def check_benchmarks() -> None:
    """Each must end well and print a table."""
    for name, arguments in SMALLEST.items():
        package = NEEDS.get(name)
        if package and importlib.util.find_spec(package) is None:
            print(f"benchmarks.{name}: not run, {package} is not installed", flush=True)
            continue
        command = f"python -m benchmarks.{name} {arguments}"
        start = time.perf_counter()
        done = run(command, ROOT)
        if done.returncode:
            sys.exit(f"{command}: exit status {done.returncode}\n{done.stdout}")
        if "┃" not in done.stdout:
            sys.exit(f"{command}: no table\n{done.stdout}")
        print(f"{command}: {time.perf_counter() - start:.0f} s", flush=True)


def fences(text: str) -> Iterator[tuple[int, str]]:
    """(line, commands) of the fences to run."""
    for match in _FENCE.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match.group(1)


def run(commands: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Runs `commands` in `place`, where `python` is the one that runs this."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=place,
        env=os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
