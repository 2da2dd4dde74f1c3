"""Fine-tune from Python: a config goes in, what came of it comes out. No command line, no YAML.

    python -m examples.fine_tune

The branch learns to look in the demo's way: the decoder does not see the images, so that whoever
wants to know must look into the memory. `make demo` does the same for longer.
"""

from pathlib import Path

import numpy as np

import pvm_jax
from demo.task import Mixture, draw, make_example, write
from pvm_jax.measure.accuracy import teacher_forced
from pvm_jax.options import run_as_command
from train.config import Bucket, DataConfig, OptimizerConfig
from train.run.events import read_values
from train.sft import SFTConfig, run


def main(
    checkpoint: Path = Path("out/demo/checkpoint"),
    out: Path = Path("out/examples/fine_tune"),
    steps: int = 100,
    batch_size: int = 16,
) -> None:
    """Trains a branch for `steps` steps and shows how much better it reads what only it can see.

    Args:
        checkpoint: directory that convert.hf_to_orbax wrote (see examples/generate.py).
        out: for the data and the run. What was interrupted goes on; what is finished is refused.
        steps: optimizer steps.
        batch_size: examples of a step.
    """
    seen = Mixture(sizes=(1,), lines=(4, 4))  # grids of one cell, four lines about each
    if not (out / "data" / "data.jsonl").exists():
        write([make_example(seen, index) for index in range(steps * batch_size)], out / "data")

    config = SFTConfig(
        checkpoint=str(checkpoint),
        run_dir=str(out / "run"),
        data=DataConfig(
            str(out / "data" / "data.jsonl"),
            buckets=[Bucket(tokens=32, patches=4)],  # the one shape that is compiled
            packing=False,
            hide_images=1.0,
        ),
        batch_size=batch_size,
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="constant"),
        dtype="float32",
        remat="none",
    )
    result = run(config)
    losses = [value for _, value in read_values(result.log)["train/loss"]]
    print(f"{len(losses)} steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {result.written}")
    if result.written is None:
        return  # told to stop: the same call goes on

    # The same sixteen scenes, of digits that were held out, before and after.
    processor = pvm_jax.Processor.from_pretrained(checkpoint)
    unseen = Mixture(sizes=(1,), lines=(4, 4), digits="heldout", seed=1)
    scenes = [make_example(unseen, index) for index in range(16)]
    examples = [processor.encode(scene.messages(draw(scene.scene))) for scene in scenes]
    for name, branch in (("before", None), ("after", result.written)):
        model = pvm_jax.load(checkpoint, branch=branch)
        loss = teacher_forced(model, examples, rows=16, hide=True).loss
        print(f"{name}: {np.nanmean(loss):.3f} nats a token where only the branch sees")


if __name__ == "__main__":
    run_as_command(main)
