"""GRPO on images: `python -m train.grpo --config FILE`.

Refines the decoder, the PVM branch, LoRA adapters or everything.
"""

from collections.abc import Sequence

from pvm_jax.options import command
from train.grpo.config import GRPOConfig
from train.grpo.loop import RECIPE
from train.run import entry

EXAMPLES = """
examples:
  python -m train.grpo --config configs/grpo_qwen3_vl_8b.yaml
  python -m train.grpo --config configs/grpo_qwen3_vl_4b.yaml \\
      --trainable pvm --optimizer.learning_rate 1e-5
  python -m train.grpo --config configs/grpo_qwen3_vl_4b.yaml \\
      --rewards '[{function: my_package.rewards:shortness}]'
  python -m train.grpo --config configs/grpo_qwen3_vl_4b.yaml --dry_run
  python -m train.grpo --config configs/grpo_qwen3_vl_4b.yaml --print_config
A run that was stopped continues from its last checkpoint when the same command is given again.
"""


@command
def main(argv: Sequence[str]) -> None:
    """Parses `argv` (default: the process's arguments) and runs the training."""
    entry.main(
        GRPOConfig,
        RECIPE,
        argv,
        prog="python -m train.grpo",
        description=__doc__ or "",
        examples=EXAMPLES,
    )


if __name__ == "__main__":
    main()
