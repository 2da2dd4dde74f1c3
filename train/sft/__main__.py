"""Supervised fine-tuning of the PVM branch, LoRA adapters, the decoder or everything: `python -m train.sft --config FILE`."""

import sys
from collections.abc import Sequence

from train.cli import parse
from train.sft.config import SFTConfig

EXAMPLES = """
examples:
  python -m train.sft --config configs/sft_qwen3_vl_4b.yaml
  python -m train.sft --config configs/sft_qwen3_vl_8b.yaml --optimizer.learning_rate 2e-5 --run_dir runs/slow
  python -m train.sft --config configs/sft_qwen3_vl_4b.yaml --trainable decoder --mesh.tensor 4
  python -m train.sft --config configs/sft_qwen3_vl_4b.yaml --dry-run
  python -m train.sft --config configs/sft_qwen3_vl_4b.yaml --print_config
A run that was stopped continues from its last checkpoint when the same command is given again.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` (default: the command line) and runs the training."""
    config, flags = parse(
        SFTConfig,
        argv,
        prog="python -m train.sft",
        description=__doc__ or "",
        examples=EXAMPLES,
        flags={"--dry-run": "build everything, take two steps on real data, print shapes, shardings and memory; write nothing"},
    )
    # After parsing: --help and errors need not wait for JAX.
    from train.run.distributed import joined
    from train.run.dry_run import dry_run
    from train.run.lifecycle import run
    from train.sft.loop import dry_steps, prepare, train

    with joined(config.distributed):
        if flags:
            dry_run(config, prepare, dry_steps)
        else:
            run(config, prepare, train)


if __name__ == "__main__":
    main(sys.argv[1:])
