"""The SFT step at a published size on the accelerator at hand: random weights, bfloat16, MFU
(benchmarks.decoding decodes).

python -m benchmarks.device 4b
python -m benchmarks.device 8b --rows 4
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.sizes import config_of
from pvm_jax import Batch, Example, ModelConfig, Qwen3VL, abstract_model
from pvm_jax.data.pixels import scale_of
from pvm_jax.options import run_as_command
from train.config import OptimizerConfig
from train.step.flops import count_flops, peak_flops
from train.step.optimizer import make_optimizer, make_schedule
from train.step.state import TrainState, make_loss, make_step, split_model


def main(size: str, rows: int = 2, text: int = 3072, side: int = 64) -> None:
    """Prints a table for one device.

    Args:
        size: of the model: 2b, 4b, 8b, 32b; or "small" (float32).
        rows: rows of the SFT step.
        text: text tokens of a row.
        side: rows and columns of patches of its image.
    """
    device, console = jax.devices()[0], Console(width=120)
    model = random_model(config_of(size))
    peak = peak_flops(device.device_kind)
    seconds, flops = sft_step(model, batch_of(model.config, rows, text, side))
    step = Table(
        title=(
            f"{size} SFT step (pvm), {rows} rows of {text + side * side // 4 + 2:,} tokens,"
            f" {device.device_kind}"
        )
    )
    for column in ("seconds", "TFLOP", "TFLOP/s", "MFU"):
        step.add_column(column)
    rate = flops / seconds
    step.add_row(
        f"{seconds:.3f}",
        f"{flops / 1e12:.1f}",
        f"{rate / 1e12:.1f}",
        f"{rate / peak:.1%}" if peak else "unknown",
    )
    console.print(step)


def random_model(config: ModelConfig) -> Qwen3VL:
    """Weights of the usual scale; made on the device, one array at a time."""
    graphdef, abstract = nnx.split(abstract_model(config))
    leaves, tree = jax.tree.flatten(nnx.as_pure(abstract))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [
        0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, made))


def batch_of(config: ModelConfig, rows: int, text: int, side: int) -> Batch:
    """Rows of one image and `text` random tokens, on all of which there is loss."""
    rng = np.random.default_rng(0)
    image = [
        config.vision_start_token_id,
        *[config.image_token_id] * (side * side // 4),
        config.vision_end_token_id,
    ]
    ids = np.concatenate([image, rng.integers(0, config.image_token_id // 2, text)]).astype(
        np.int32
    )
    pixels = rng.integers(0, 256, (side * side, config.vision.frame_dim), np.uint8)
    half = np.full(config.vision.in_channels, 0.5)
    example = Example(
        ids,
        pixels,
        np.array([[1, side, side]]),
        loss_mask=np.arange(len(ids)) >= len(image),
        image_scale=scale_of(1 / 255, half, half),
    )
    length = -(-len(ids) // 128) * 128
    return jax.device_put(
        Batch.from_rows([[example]] * rows, config, length=length, patches=side * side)
    )


def sft_step(model: Qwen3VL, batch: Batch) -> tuple[float, int]:
    """Seconds and FLOPs of a step (recomputation not counted)."""
    schedule = make_schedule(OptimizerConfig(), 1000)
    optimizer = make_optimizer(OptimizerConfig())

    def step_of(config: ModelConfig) -> Callable[..., Any]:
        return make_step(
            make_loss(split_model(abstract_model(config), "pvm")[0], chunk=512), optimizer, schedule
        )

    _, trained, frozen = split_model(model, "pvm")
    params = jax.tree.map(lambda x: x.astype(jnp.float32), nnx.as_pure(trained))
    state = TrainState(params, optimizer.init(params), jnp.int32(0))
    weights = nnx.as_pure(frozen)
    flops = count_flops(
        step_of(replace(model.config, remat="none", attention="xla")), state, weights, batch
    )
    step = jax.jit(step_of(model.config), donate_argnums=0)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, weights, batch)
        jax.block_until_ready(metrics)

    return best(run), flops


def best(run: Callable[[], Any], repeats: int = 3) -> float:
    """The fastest of `repeats` runs after one that compiles."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    run_as_command(main)
