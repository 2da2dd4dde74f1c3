"""Renews constraints/*.txt: `make constraints`. Versions alone; what a fresh machine gets is what
was tested here."""

import re
import subprocess
import sys
import tomllib

from tests.environments import ROOT, environment

FOLDER = ROOT / "constraints"


def main(python: str) -> None:
    """Writes what pip chooses for `python` (a name that `make PYTHON=` takes; the oldest, whose
    versions the others have too), and the least that pyproject.toml allows."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "lowest.txt").write_text("".join(f"{line}\n" for line in lowest()))
    words = [f"PYTHON={python}", "PACKAGES=newest"]
    folder = environment(*words)
    everything = folder.relative_to(ROOT) / "docs"  # what `make docs` needs, beside the rest
    subprocess.run(["make", "--always-make", *words, str(everything)], cwd=ROOT, check=True)
    freeze = [
        folder / "bin" / "python",
        "-m",
        "pip",
        "freeze",
        "--all",  # setuptools too, which the tests build the wheel with
        "--exclude=pip",
        "--exclude-editable",
    ]
    found = subprocess.check_output(freeze, text=True).splitlines()
    (FOLDER / "tested.txt").write_text(
        "".join(f"{line}\n" for line in found if re.fullmatch(r"[\w.-]+==\S+", line))
    )
    print(f"constraints/tested.txt: {len(found)} packages")


def lowest() -> list[str]:
    """name==version for every lower bound of the dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = (
        re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)", line) for line in project["dependencies"]
    )
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


if __name__ == "__main__":
    main(*sys.argv[1:])
