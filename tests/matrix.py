"""The suite on several Pythons, each in its own environment, and on the lowest and the newest
packages, as a table: `make matrix`."""

import subprocess
import sys
from collections.abc import Sequence
from xml.etree import ElementTree

from tests.environments import ROOT, environment

OUT = ROOT / "out" / "matrix"
HEADER = ("Python", "packages", "jax", "flax", "passed", "failed", "minutes")
_VERSIONS = "import importlib.metadata as m; print(m.version('jax'), m.version('flax'))"


def main(pythons: Sequence[str]) -> None:
    """Tests with each of `pythons` (names that `make PYTHON=` takes, the oldest first); exits with
    1 if any of them has a failure."""
    if not pythons:
        sys.exit("no python3.11, python3.12 or python3.13 is here by that name")
    OUT.mkdir(parents=True, exist_ok=True)
    ends = [(pythons[0], "lowest"), (pythons[-1], "newest")]
    rows = [row_of(*where) for where in [*((python, "tested") for python in pythons), *ends]]
    print("\n".join(f"| {' | '.join(row)} |" for row in (HEADER, ("---",) * len(HEADER), *rows)))
    sys.exit(any(row[5] != "0" for row in rows))


def row_of(python: str, packages: str) -> tuple[str, ...]:
    """What HEADER names, of one run of the suite."""
    version, words = python.removeprefix("python"), [f"PYTHON={python}", f"PACKAGES={packages}"]
    found = OUT / f"{version}-{packages}.xml"
    found.unlink(missing_ok=True)
    command = ["make", *words, f"TEST_OPTIONS=--junit-xml={found}", "test"]
    with open(found.with_suffix(".txt"), "w") as output:
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False)
    if not found.exists():
        sys.exit(f"{python}, {packages}: no test ran; {found.with_suffix('.txt')} says why")
    executable = environment(*words) / "bin" / "python"
    jax, flax = subprocess.check_output([executable, "-c", _VERSIONS], text=True).split()
    suite = next(ElementTree.parse(found).iter("testsuite")).attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    passed = int(suite["tests"]) - failed - int(suite["skipped"])
    minutes = f"{float(suite['time']) / 60:.1f}"
    return version, packages, jax, flax, str(passed), str(failed), minutes


if __name__ == "__main__":
    main(sys.argv[1:])
