"""What `python -m train.sft` and `python -m train.grpo` do: parse, then run or try the recipe."""

from collections.abc import Sequence

from train.cli import parse
from train.config import RunConfig
from train.run.distributed import joined
from train.run.dry_run import dry_run
from train.run.lifecycle import Recipe, run

_FLAGS = {
    "--dry-run": (
        "build everything, take two steps on real data, print shapes, shardings and memory; write"
        " nothing"
    )
}


def main(
    cls: type[RunConfig],
    recipe: Recipe,
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    examples: str,
) -> None:
    """Parses `argv` (None: the command line) into a `cls`, by `train.cli.parse`, and runs or tries
    the recipe."""
    config, flags = parse(
        cls, argv, prog=prog, description=description, examples=examples, flags=_FLAGS
    )
    with joined(config.distributed):
        if flags:
            dry_run(config, recipe)
        else:
            run(config, recipe)
