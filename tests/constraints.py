"""Renews constraints/*.txt: `make constraints`. Versions alone; what a fresh machine gets is what
was tested here."""

import re
import subprocess
import tomllib
from typing import Any

from tests.environments import ROOT, environment

FOLDER = ROOT / "constraints"


def main() -> None:
    """Writes what pip chooses for the oldest Python that pyproject.toml allows, whose versions the
    others have too, and the least that it allows of the packages."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "lowest.txt").write_text("".join(f"{line}\n" for line in lowest()))
    oldest = project()["requires-python"].removeprefix(">=")
    words = [f"PYTHON=python{oldest}", "PACKAGES=newest"]
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
    bounds = (
        re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)", line) for line in project()["dependencies"]
    )
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


def project() -> dict[str, Any]:
    """Of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


if __name__ == "__main__":
    main()
