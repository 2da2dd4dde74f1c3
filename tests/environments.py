"""Where the Makefile keeps the virtual environments: it alone names them."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(*variables: str) -> Path:
    """The environment's folder under `variables`, as `make` takes them: PYTHON=python3.12."""
    command = ["make", "--silent", "--no-print-directory", *variables, "environment"]
    return ROOT / subprocess.check_output(command, cwd=ROOT, text=True).strip()
