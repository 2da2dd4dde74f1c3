"""What `python -m train.sft` and `python -m train.grpo` do: parse, then run or try the recipe."""

from collections.abc import Sequence

from pvm_jax.options import TRACEBACK, parse
from train.config import RunConfig
from train.published import with_config_files
from train.run.distributed import joined
from train.run.dry_run import dry_run
from train.run.lifecycle import Recipe, run

_FLAGS = {
    "dry_run": (
        "build everything, take two steps on real data, print shapes, shardings and memory; write"
        " nothing"
    )
}


def main(
    cls: type[RunConfig],
    recipe: Recipe,
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    examples: str,
) -> None:
    """Parses `argv` into a `cls` and runs or tries the recipe."""
    config, flags = parse(
        cls,
        with_config_files(argv),
        prog=prog,
        description=description,
        examples=examples,
        flags=_FLAGS,
    )
    with joined(config.distributed, with_traceback=TRACEBACK in argv):
        if flags:
            dry_run(config, recipe)
        else:
            run(config, recipe)
