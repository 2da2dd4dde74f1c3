"""The command `pvm`: the project's commands under one name, from any folder.

`python -m train.sft` takes a `train.py` in the folder that it starts in for ours; this does not. It
knows the commands by the names of their modules alone and imports none that was not asked for.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple


class Command(NamedTuple):
    """A command of `pvm`.

    Attributes:
        module: whose `main(argv)` it is.
        first: arguments that come before the user's.
        about: for the list of commands.
    """

    module: str
    first: tuple[str, ...]
    about: str


COMMANDS = {
    "convert": Command("convert.hf_to_orbax", (), "Hugging Face -> Orbax, with a fresh branch"),
    "export": Command("convert.orbax_to_hf", (), "Orbax -> Hugging Face"),
    "dataset": Command("convert.dataset", (), "conversations -> shards that are read at random"),
    "train sft": Command("train.sft.__main__", (), "fine-tune the branch, an adapter or the model"),
    "train grpo": Command("train.grpo.__main__", (), "refine it by rewards of its own answers"),
    "fit": Command("train.fit.__main__", (), "does a run fit on chips that are not here?"),
    "generate": Command("pvm_jax.__main__", ("generate",), "ask about images"),
    "measure": Command("pvm_jax.__main__", ("measure",), "what is seen over a long answer"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that `argv` (default: the command line) begins with, on what follows.

    Exits with status 2 and a line that names the nearest command where there is none such.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
    elif words[0] == "--version":
        print(version("pvm-jax"))
    else:
        _run(words)


def usage() -> str:
    """The list of commands."""
    wide = max(map(len, COMMANDS))
    lines = [f"  {name:{wide}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: pvm COMMAND ...", "", *lines, "", "pvm COMMAND --help says what it takes"]
    )


def _run(words: Sequence[str]) -> None:
    count = 2 if words[0] == "train" else 1
    name = " ".join(words[:count])
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        proposal = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(COMMANDS)}."
        print(f"error: pvm has no command {name!r}. {proposal}", file=sys.stderr)
        sys.exit(2)
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    # The user's own modules (a reward, say) are found where the command was given, but after ours.
    sys.path.append(os.getcwd())
    module.main([*command.first, *words[count:]])


if __name__ == "__main__":
    main()
