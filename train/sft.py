"""Supervised fine-tuning of the PVM branch, the decoder or everything: `python -m train.sft --config FILE`."""

import sys
from collections.abc import Sequence
from typing import cast

from train.config import SFTConfig, parse

EXAMPLES = """
examples:
  python -m train.sft --config configs/sft_qwen3_vl_4b.yaml
  python -m train.sft --config configs/sft_qwen3_vl_8b.yaml --optimizer.learning_rate 2e-5 --run_dir runs/slow
  python -m train.sft --config configs/sft_qwen3_vl_4b.yaml --trainable decoder --mesh.tensor 4
  python -m train.sft --config configs/sft_qwen3_vl_4b.yaml --print_config
A run that was stopped continues from its last checkpoint when the same command is given again.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` (default: the command line) and runs the training."""
    config = cast(SFTConfig, parse(SFTConfig, argv, prog="python -m train.sft", description=__doc__ or "", examples=EXAMPLES))
    from train.distributed import joined  # after parsing: --help and errors need not wait for JAX
    from train.loop import run

    with joined(config.distributed):
        run(config)


if __name__ == "__main__":
    main(sys.argv[1:])
