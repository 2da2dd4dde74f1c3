"""What `python -m train.sft` and `python -m train.grpo` do: parse, then run or try the recipe; and
how a program runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pvm_jax.options import TRACEBACK, parse
from train.config import RunConfig
from train.published import with_config_files
from train.run.distributed import joined
from train.run.dry_run import dry_run
from train.run.lifecycle import RESULTS, Recipe, run

_FLAGS = {
    "dry_run": (
        "build everything, take two steps on real data, print shapes, shardings and memory; write"
        " nothing"
    )
}


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        written: the branch, the adapter or the model that was trained; None where the run was told
            to stop before its last step: the same call goes on.
        log: TensorBoard's directory, which `train.run.events.read_values` reads.
    """

    written: Path | None
    log: Path


def run_recipe(config: RunConfig, recipe: Recipe) -> RunResult:
    """Trains as `config` says, from the last step checkpoint in its `run_dir` if there is one.

    Several processes must have joined before (`train.run.distributed.join`); a lone one need not.

    Raises:
        As `train.run.lifecycle.run`.
    """
    run(config, recipe)
    run_dir = Path(config.run_dir).absolute()
    result = run_dir / RESULTS[config.trainable]
    return RunResult(result if result.exists() else None, run_dir / "log")


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
            run_recipe(config, recipe)
