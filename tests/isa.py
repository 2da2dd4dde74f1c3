"""The numeric tests under three instruction sets and two numbers of threads: `make isa`.

Prints the largest error of every comparison (tests/close.py) beside its bar, and fails where a test
does, or where an error is above a tenth of its bar: another machine may err more than this one. XLA
takes no wider instructions than the CPU has: without AVX-512 the last column is what the CPU can
do.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.close import RECORD

ROOT = Path(__file__).parents[1]
WAYS = {"SSE4_2": "1", "AVX2": "2", "AVX512": "4"}
"""Instruction set -> threads of XLA's pool (NPROC)."""


def main(tests: list[str]) -> None:
    """Runs `tests` (none: every file that compares by `assert_close`) in each way."""
    tests = tests or [
        str(file)
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if "assert_close(" in file.read_text()
    ]
    failed, errors, bars = False, defaultdict(dict), {}
    for isa, threads in WAYS.items():
        print(f"{isa}, {threads} threads", flush=True)
        with TemporaryDirectory() as folder:
            record = Path(folder) / "record"
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={isa}"
            environment = os.environ | {"XLA_FLAGS": flags, "NPROC": threads, RECORD: str(record)}
            command = [
                sys.executable,
                "-m",
                "pytest",
                "--numprocesses",
                "2",
                "--dist",
                "loadscope",
                *tests,
            ]
            failed |= (
                subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0
            )
            for line in map(json.loads, record.read_text().splitlines()):
                seen = errors[line["place"]]
                seen[isa] = max(seen.get(isa, 0), line["error"])
                bars[line["place"]] = line["bar"]
    print(f"| comparison | bar | {' | '.join(WAYS)} |\n| --- | --- |{' --- |' * len(WAYS)}")
    for place, seen in sorted(errors.items()):
        print(
            f"| {place} | {bars[place]:.0e} |"
            f" {' | '.join(f'{seen.get(isa, 0):.1e}' for isa in WAYS)} |"
        )
    near = [place for place, seen in errors.items() if max(seen.values()) > bars[place] / 10]
    if near:
        print(f"above a tenth of the bar: {', '.join(sorted(near))}")
    sys.exit(bool(failed or near))


if __name__ == "__main__":
    main(sys.argv[1:])
