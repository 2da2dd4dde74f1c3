"""What `python -m train.sft` and `python -m train.grpo` do with their config."""

from train.config import RunConfig
from train.run.distributed import joined
from train.run.dry_run import dry_run
from train.run.lifecycle import Recipe, run

FLAGS = {"--dry-run": "build everything, take two steps on real data, print shapes, shardings and memory; write nothing"}


def start(config: RunConfig, recipe: Recipe, flags: set[str]) -> None:
    """Runs, or tries, the recipe in this process and those that belong to it; `flags`: those of FLAGS that were given."""
    with joined(config.distributed):
        if "--dry-run" in flags:
            dry_run(config, recipe)
        else:
            run(config, recipe)
