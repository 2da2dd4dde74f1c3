"""The command `pvm`: the project's commands under one name, from any folder.

`python -m train.sft` takes a `train.py` in the folder that it starts in for ours; this does not. It
knows the commands by the names of their modules alone and imports none that was not asked for.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from pvm_jax.options import Main, command, dispatch


def _entry(module: str, name: str = "main") -> Main:
    """The entry `name` of `module`, which is imported when it is called."""

    def call(argv: Sequence[str] | None = None) -> None:
        entry = getattr(importlib.import_module(module), name)
        # The user's own modules (a reward, say) are found in the working directory, but after ours.
        sys.path.append(os.getcwd())
        entry(argv)

    return call


RECIPES = {
    "sft": ("fine-tune the branch, an adapter or the model", _entry("train.sft.__main__")),
    "grpo": ("refine it by rewards of its own answers", _entry("train.grpo.__main__")),
}


@command
def train(argv: Sequence[str]) -> None:
    """`pvm train`."""
    dispatch(argv, RECIPES, prog="pvm train", description="Trains by one of the recipes.")


COMMANDS = {
    "convert": ("Hugging Face -> Orbax, with a fresh branch", _entry("convert.hf_to_orbax")),
    "export": ("Orbax -> Hugging Face", _entry("convert.orbax_to_hf")),
    "adapter": ("a LoRA adapter to the peft library, or back", _entry("convert.adapter")),
    "dataset": ("conversations -> shards that are read at random", _entry("convert.dataset")),
    "train": ("sft or grpo: train by a recipe", train),
    "fit": ("does a run fit on chips that are not here?", _entry("train.fit.__main__")),
    "generate": ("answer questions about images", _entry("pvm_jax.__main__", "generate")),
    "measure": ("what is seen over a long answer", _entry("pvm_jax.__main__", "measure")),
}


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command that `argv` (default: the process's arguments) begins with, on the rest."""
    if list(argv) == ["--version"]:
        print(version("pvm-jax"))
    else:
        dispatch(
            argv, COMMANDS, prog="pvm", description="Persistent Visual Memory on Qwen3-VL in JAX."
        )


if __name__ == "__main__":
    main()
