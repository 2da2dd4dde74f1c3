"""Train a LoRA adapter, merge it into the weights and write a Hugging Face checkpoint.

    python -m examples.lora

An adapter is megabytes and fits one backbone; merged, it is an ordinary checkpoint that any program
reads. That nothing was lost on the way is checked at the end: the merged checkpoint is converted
back and must write what backbone and adapter write together.
"""

from pathlib import Path

import numpy as np

import pvm_jax
from convert.hf_to_orbax import convert as hf_to_orbax
from convert.orbax_to_hf import convert as orbax_to_hf
from demo.task import Mixture, draw, make_example, write
from pvm_jax.config import LoRAConfig
from pvm_jax.options import run_as_command
from train.config import Bucket, DataConfig, OptimizerConfig
from train.sft import SFTConfig, run


def main(
    checkpoint: Path = Path("out/demo/checkpoint"),
    out: Path = Path("out/examples/lora"),
    steps: int = 30,
    batch_size: int = 16,
) -> None:
    """Trains an adapter on grids of handwritten digits, exports it and compares.

    Args:
        checkpoint: directory that convert.hf_to_orbax wrote (see examples/generate.py).
        out: for data, run and exported checkpoint; must not hold a finished run.
        steps: optimizer steps.
        batch_size: examples of a step.
    """
    mixture = Mixture(sizes=(1,), lines=(4, 4), filler=(8, 8))
    scenes = [make_example(mixture, index) for index in range(steps * batch_size)]
    if not (out / "data" / "data.jsonl").exists():
        write(scenes, out / "data")
    config = SFTConfig(
        checkpoint=str(checkpoint),
        run_dir=str(out / "run"),
        data=DataConfig(str(out / "data" / "data.jsonl"), [Bucket(48, 4)], packing=False),
        trainable="lora",
        lora=LoRAConfig(rank=4, targets="language_model/layers/self_attn/.*_proj"),
        batch_size=batch_size,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        dtype="float32",
        remat="none",
    )
    adapter = run(config).written
    if adapter is None:
        return  # told to stop: the same call goes on

    orbax_to_hf(checkpoint, out / "hugging_face", lora=adapter)
    hf_to_orbax(out / "hugging_face", out / "back")

    processor = pvm_jax.Processor.from_pretrained(checkpoint)
    arrays = processor([scenes[0].messages(draw(scenes[0].scene))])
    logits = {}
    for name, path, lora in (
        ("backbone", checkpoint, None),
        ("adapter", checkpoint, adapter),
        ("merged", out / "back", None),
    ):
        model = pvm_jax.load(path, lora=lora)
        batch = pvm_jax.Batch.from_hf(arrays, model.config)
        logits[name] = np.asarray(model(batch))
    for one, other in (("backbone", "adapter"), ("adapter", "merged")):
        gap = np.abs(logits[one] - logits[other]).max()
        print(f"largest difference of logits, {one} and {other}: {gap:.1e}")


if __name__ == "__main__":
    run_as_command(main)
