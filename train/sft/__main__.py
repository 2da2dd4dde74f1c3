"""Supervised fine-tuning: `python -m train.sft --config FILE`.

Trains the PVM branch, LoRA adapters, the decoder or everything.
"""

from collections.abc import Sequence

from pvm_jax.options import command
from train.run import entry
from train.sft.config import SFTConfig
from train.sft.loop import RECIPE

EXAMPLES = """
examples:
  python -m train.sft --config configs/sft_qwen3_vl_4b.yaml
  python -m train.sft --config configs/sft_qwen3_vl_8b.yaml \\
      --optimizer.learning_rate 2e-5 --run_dir runs/slow
  python -m train.sft --config configs/sft_qwen3_vl_4b.yaml --trainable decoder --mesh.tensor 4
  python -m train.sft --config configs/sft_qwen3_vl_4b.yaml --dry_run
  python -m train.sft --config configs/sft_qwen3_vl_4b.yaml --print_config
A run that was stopped continues from its last checkpoint when the same command is given again.
"""


@command
def main(argv: Sequence[str]) -> None:
    """Parses `argv` (default: the process's arguments) and runs the training."""
    entry.main(
        SFTConfig,
        RECIPE,
        argv,
        prog="python -m train.sft",
        description=__doc__ or "",
        examples=EXAMPLES,
    )


if __name__ == "__main__":
    main()
