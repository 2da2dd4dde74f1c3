"""GRPO with a reward of your own: any importable function of a completion and its example.

    python -m examples.reward

The reward runs in processes of its own, which import this file: it may hang, raise or die without
harm to the run. What is heavy is imported in `main`, so that they start fast.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def net(completion: str, example: Mapping[str, Any]) -> float:
    """Right lines less wrong ones, over the lines that there were to write: guessing does not pay.

    Args:
        completion: what the model wrote, special tokens left out.
        example: all columns of the prompt's record; `solution` is the true answer.
    """
    solution, written = example["solution"].splitlines(), completion.splitlines()
    right = len(set(written) & set(solution))
    return (2 * right - len(written)) / len(solution)


def main(
    checkpoint: Path = Path("out/demo/checkpoint"),
    out: Path = Path("out/examples/reward"),
    steps: int = 10,
    prompts: int = 8,
    completions: int = 8,
) -> None:
    """Refines the demo's model by `net` and prints the reward step by step.

    Args:
        checkpoint: directory that convert.hf_to_orbax wrote (see examples/generate.py).
        out: for data and run; must not hold a finished run.
        steps: rollouts, with one update each.
        prompts: of a step.
        completions: of each prompt, which are compared with each other.
    """
    from demo.task import Mixture, make_example, write
    from train.config import Bucket, ExamplesConfig, OptimizerConfig
    from train.grpo import GRPOConfig, run
    from train.rewards.pool import RewardConfig
    from train.run.events import read_values

    scenes = Mixture(sizes=(1,), lines=(4, 4))
    if not (out / "data" / "data.jsonl").exists():
        write([make_example(scenes, index) for index in range(steps * prompts)], out / "data")
    config = GRPOConfig(
        checkpoint=str(checkpoint),
        run_dir=str(out / "run"),
        data=ExamplesConfig(str(out / "data" / "data.jsonl"), [Bucket(tokens=24, patches=4)]),
        rewards=[RewardConfig("examples.reward:net")],
        reward_workers=1,
        prompts_per_step=prompts,
        group_size=completions,
        max_completion_tokens=16,
        mask_truncated=False,  # who does not come to an end shall learn to
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant"),
        dtype="float32",
        remat="none",
        loss_chunk=64,
    )
    result = run(config)
    for step, reward in read_values(result.log)["reward/mean"]:
        print(f"step {step}: reward {reward:+.3f}")


if __name__ == "__main__":
    from pvm_jax.options import run_as_command

    run_as_command(main)
