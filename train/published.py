"""The published recipes, by name, wherever the package is installed."""

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

CONFIGS = files("train") / "configs"
"""YAML files; in the repository a link to configs/."""


def with_config_files(argv: Sequence[str]) -> list[str]:
    """`argv` with a path in place of the name of a published recipe: `--config sft_qwen3_vl_8b`. A
    file of that name in the working directory comes first.

    Raises:
        ValueError: for a name that is neither.
    """
    words = list(argv)
    for place, word in enumerate(words):
        if word.startswith("--config="):
            words[place] = f"--config={config_file(word.partition('=')[2])}"
        elif word == "--config" and place + 1 < len(words):
            words[place + 1] = config_file(words[place + 1])
    return words


def config_file(name: str) -> str:
    """The path of the recipe called `name`; what cannot be such a name, or is a file's, as it is.

    Raises:
        ValueError: for a name that is none.
    """
    if not re.fullmatch(r"\w+", name) or Path(name).exists():
        return name
    known = {Path(file.name).stem: str(file) for file in CONFIGS.iterdir()}
    if name not in known:
        raise ValueError(
            f"--config {name}: there is no such file, and no config of that name comes with the"
            f" package; there are {', '.join(sorted(known))}"
        )
    return known[name]
