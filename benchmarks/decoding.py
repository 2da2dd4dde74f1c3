"""A decoding step with the branch, with one that projects its images anew (as the authors' code, every step), and without.

Weights and cache are random; one step is timed at a time, the three in turn, so that a busy machine is busy for all of them.

    python -m benchmarks.decoding --visual_tokens [256,1024]
    python -m benchmarks.decoding --size 4b --limit_gib 60
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from benchmarks.device import random_model
from pvm_jax import ModelConfig, Qwen3VL, TextConfig, VisionConfig, without_pvm
from pvm_jax.cache import Cache, Prompts, Samples
from pvm_jax.memory import Memory
from train.flops import count_flops

TEXT = TextConfig(
    vocab_size=32000,
    hidden_size=640,
    intermediate_size=1920,
    num_hidden_layers=12,
    num_attention_heads=10,
    num_key_value_heads=5,
    head_dim=64,
    mrope_section=(12, 10, 10),
)
"""A decoder for the CPU: 79 M parameters with its embeddings."""

SMALL = ModelConfig(
    text=TEXT,
    vision=VisionConfig(
        hidden_size=64, intermediate_size=64, depth=1, num_heads=1, out_hidden_size=640, deepstack_visual_indexes=(0,)
    ),
    tie_word_embeddings=True,
).with_pvm()
"""A model for the CPU, in float32; what decodes of it is that of benchmarks.against_torch, with a branch."""

# Bytes a second that one device reads from its memory; from the vendors' data sheets.
PEAK_BANDWIDTH = {
    "NVIDIA A100": 2.0e12,
    "NVIDIA H100": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "TPU v5 lite": 0.82e12,
    "TPU v5": 2.77e12,
}


class Step(NamedTuple):
    """One decoding step: `run` makes one and waits for it. `floor`: the bytes of what it must read, the decoder's and the
    branch's weights, the head and the cache; `temporary`, `updated`: those that the compiled program holds beside its arguments
    and writes in place."""

    run: Callable[[], None]
    flops: int
    floor: int
    temporary: int
    updated: int


def main(
    size: str = "small",
    visual_tokens: tuple[int, ...] = (256, 1024, 4096, 16384),
    batches: tuple[int, ...] = (1, 8, 32),
    text_tokens: int = 256,
    repeats: int = 20,
    limit_gib: float = 8.0,
) -> None:
    """Prints a line for each batch size and count of visual tokens.

    Args:
        size: "small" (float32), or a preset (bfloat16): 2b, 4b, 8b, 32b.
        visual_tokens: in every row.
        batches: rows.
        text_tokens: that every row has read or written before the step.
        repeats: steps of each kind; the fastest counts.
        limit_gib: lines whose cache and visual embeddings take more are left out.
    """
    device = jax.devices()[0]
    config = SMALL if size == "small" else ModelConfig.preset(size, dtype="bfloat16", param_dtype="bfloat16")
    model = random_model(config)
    bandwidth = next((rate for kind, rate in PEAK_BANDWIDTH.items() if device.device_kind.startswith(kind)), None)
    table = Table(title=f"{size}: a decoding step, {text_tokens} text tokens before it, {device.device_kind}, {config.dtype}")
    for column in (
        "rows",
        "visual",
        "off: ms",
        "on",
        "projecting anew",
        "FLOPs on",
        "projecting anew",
        "floor",
        "GB/s",
        "of the bandwidth",
        "temporary / floor",
        "updated in place",
    ):
        table.add_column(column, justify="right")
    for rows in batches:
        for visual in visual_tokens:
            if cache_bytes(config, rows, visual, text_tokens) > limit_gib * 2**30:
                table.add_row(str(rows), f"{visual:,}", "left out: --limit_gib")
                continue
            off, on, anew = (
                decoding_step(asked, rows, visual, text_tokens, anew=anew)
                for asked, anew in ((without_pvm(model), False), (model, False), (model, True))
            )
            seconds = fastest_in_turn([step.run for step in (off, on, anew)], repeats)
            rate = on.floor / seconds[1]
            table.add_row(
                str(rows),
                f"{visual:,}",
                f"{seconds[0] * 1e3:.2f}",
                *(f"{s / seconds[0] - 1:+.1%}" for s in seconds[1:]),
                *(f"{step.flops / off.flops - 1:+.1%}" for step in (on, anew)),
                f"{on.floor / 2**30:.2f} GiB",
                f"{rate / 1e9:.0f}",
                f"{rate / bandwidth:.0%}" if bandwidth else "unknown",
                f"{on.temporary / on.floor:.1%}",
                f"{on.updated / 2**20:.0f} MiB",
            )
    Console(width=150).print(table)


def cache_bytes(config: ModelConfig, rows: int, visual: int, text: int) -> int:
    """Of the decoder's keys and values and of the visual embeddings."""
    c = config.text
    key_values = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (visual + text)
    return rows * (key_values + c.hidden_size * visual) * config.compute_dtype.itemsize


def decoding_step(model: Qwen3VL, rows: int, visual: int, text: int, *, anew: bool) -> Step:
    """A step of `rows` rows behind `visual` visual tokens; the samples' cache has `text` slots, of which it takes the last."""
    config = model.config
    graphdef, params = nnx.split(model)
    params = nnx.as_pure(params)
    embeds = jnp.ones((rows, visual, config.text.hidden_size), config.compute_dtype)
    ids = jnp.ones((rows, visual), jnp.int32)

    def memorize(model: Qwen3VL, embeds: jax.Array) -> dict[str, Memory]:
        return {layer: pvm.memorize(embeds, ids) for layer, pvm in model.pvm.items()}

    prompts = Prompts.empty(config, rows, visual)._replace(segment_ids=ids)
    cache = Cache(prompts, jax.jit(memorize)(model, embeds) if not anew else {})
    samples = Samples.empty(config, rows, 1, text)
    token = jnp.ones((rows, 1), jnp.int32)

    def step(params: Any, cache: Cache, embeds: jax.Array, token: jax.Array, samples: Samples):
        model: Qwen3VL = nnx.merge(graphdef, params)
        if anew:
            cache = cache._replace(memories=memorize(model, embeds))
        positions = jnp.full_like(token, visual + text)
        hidden, samples = model.decode(token, positions, jnp.ones(rows, jnp.int32), cache, samples, jnp.asarray(text - 1))
        return jnp.argmax(model.logits(hidden), -1).astype(jnp.int32), samples

    given = params, cache, embeds, token
    compiled = jax.jit(step, donate_argnames="samples").lower(*given, samples).compile()

    def run() -> None:
        nonlocal samples
        token, samples = compiled(*given, samples)
        token.block_until_ready()

    memory = compiled.memory_analysis()
    assert memory is not None
    read = (nnx.state(model.language_model.layers), nnx.state(model.pvm), model.head_weight(), cache, samples)
    return Step(
        run,
        flops=count_flops(step, *given, samples),
        floor=sum(leaf.nbytes for leaf in jax.tree.leaves(read)),
        temporary=memory.temp_size_in_bytes,
        updated=memory.alias_size_in_bytes,
    )


def fastest_in_turn(runs: list[Callable[[], None]], repeats: int) -> list[float]:
    """Seconds of each one's fastest run, after one that is not timed."""
    fastest = [float("inf")] * len(runs)
    for repeat in range(repeats + 1):
        for number, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if repeat:
                fastest[number] = min(fastest[number], time.perf_counter() - start)
    return fastest


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
