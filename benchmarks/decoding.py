"""A decoding step with the branch, with one that projects its images anew (as the authors' code,
every step), and without.

Weights and cache are random. Steps are timed as generation takes them, in one compiled loop, the
three kinds in turn, so that a busy machine is busy for all of them.

    python -m benchmarks.decoding --visual_tokens 256 1024
    python -m benchmarks.decoding --size 4b --limit_gib 60
    python -m benchmarks.decoding --size 8b --count_only   # what a step computes and reads; no run
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.device import random_model
from benchmarks.sizes import config_of
from pvm_jax import ModelConfig, Qwen3VL, abstract_model, without_pvm
from pvm_jax.model import pieces
from pvm_jax.model.cache import Cache, PromptCache, SampleCache
from pvm_jax.options import run_as_command
from train.step.flops import count_flops

# Bytes a second that one device reads from its memory; from the vendors' data sheets.
PEAK_BANDWIDTH = {
    "NVIDIA A100": 2.0e12,
    "NVIDIA H100": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "TPU v5 lite": 0.82e12,
    "TPU v5": 2.77e12,
}


COUNTED_COLUMNS = ("rows", "visual", "floor", "bytes on", "anew", "FLOPs on", "anew")
TIMED_COLUMNS = ("off: ms", "on", "anew", "GB/s", "of the bandwidth")
TIMED_COLUMNS += ("temporary / floor", "updated in place")


class Counted(NamedTuple):
    """What a decoding step computes and must read: `floor` is the bytes of the decoder's and the
    branch's weights, the head and the cache."""

    flops: int
    floor: int


class Steps(NamedTuple):
    """Decoding steps: `run` makes them and waits. `temporary`, `updated`: the bytes that the
    compiled program holds beside its arguments and writes in place."""

    run: Callable[[], None]
    temporary: int
    updated: int


def main(
    size: str = "small",
    visual_tokens: Sequence[int] = (256, 1024, 4096, 16384),
    batches: Sequence[int] = (1, 8, 32),
    text_tokens: int = 256,
    steps: int = 16,
    repeats: int = 5,
    limit_gib: float = 8.0,
    count_only: bool = False,
) -> None:
    """Prints a line for each batch size and count of visual tokens.

    Args:
        size: "small" (float32), or a preset (bfloat16): 2b, 4b, 8b, 32b.
        visual_tokens: in every row.
        batches: rows.
        text_tokens: that every row has read or written before the step.
        steps: in one run of the loop, before which it may bring the weights of single layers into
            place.
        repeats: runs of each kind; the fastest counts.
        limit_gib: lines whose cache and visual embeddings take more are counted, not run.
        count_only: run nothing.
    """
    device = jax.devices()[0]
    config = config_of(size)
    model = abstract_model(config) if count_only else random_model(config)
    bandwidth = next(
        (rate for kind, rate in PEAK_BANDWIDTH.items() if device.device_kind.startswith(kind)), None
    )
    where = "counted" if count_only else device.device_kind
    table = Table(
        title=(
            f"{size}: a decoding step, {text_tokens} text tokens before it, {config.dtype}, {where}"
        )
    )
    for column in (*COUNTED_COLUMNS, *(() if count_only else TIMED_COLUMNS)):
        table.add_column(column, justify="right")
    kinds = [(without_pvm(model), False), (model, False), (model, True)]
    for rows in batches:
        for visual in visual_tokens:
            counted = [count(kind, rows, visual, text_tokens, anew=anew) for kind, anew in kinds]
            cells = [str(rows), f"{visual:,}", *counted_cells(counted)]
            fits = cache_bytes(config, rows, visual, text_tokens) <= limit_gib * 2**30
            if fits and not count_only:
                loops = [
                    decoding_steps(kind, rows, visual, text_tokens, steps, anew=anew)
                    for kind, anew in kinds
                ]
                totals = fastest_in_turn([loop.run for loop in loops], repeats)
                seconds = [total / steps for total in totals]
                cells += timed_cells(seconds, loops[1], counted[1].floor, bandwidth)
            table.add_row(*cells)
    Console(width=150).print(table)


def counted_cells(counted: Sequence[Counted]) -> list[str]:
    """Of a step without the branch, with it, and with one that projects anew."""
    off, on, anew = counted
    return [
        f"{on.floor / 2**30:.2f} GiB",
        *(f"{c.floor / off.floor - 1:+.2%}" for c in (on, anew)),
        *(f"{c.flops / off.flops - 1:+.2%}" for c in (on, anew)),
    ]


def timed_cells(
    seconds: Sequence[float], on: Steps, floor: int, bandwidth: float | None
) -> list[str]:
    """Of the three kinds' `seconds` a step; `on` and `floor` are those of the branch."""
    rate = floor / seconds[1]
    return [
        f"{seconds[0] * 1e3:.2f}",
        *(f"{s / seconds[0] - 1:+.1%}" for s in seconds[1:]),
        f"{rate / 1e9:.0f}",
        f"{rate / bandwidth:.0%}" if bandwidth else "unknown",
        f"{on.temporary / floor:.1%}",
        f"{on.updated / 2**20:.0f} MiB",
    ]


def cache_bytes(config: ModelConfig, rows: int, visual: int, text: int) -> int:
    """Of the decoder's keys and values and of the visual embeddings."""
    c = config.text
    key_values = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (visual + text)
    return rows * (key_values + c.hidden_size * visual) * config.compute_dtype.itemsize


def inputs(model: Qwen3VL, rows: int, visual: int, text: int, *, anew: bool) -> tuple[Any, ...]:
    """The cache of `rows` rows behind `visual` visual tokens, their embeddings, a token and `text`
    slots for what was written: made of ones. With `anew` the cache has no memories."""
    config = model.config
    ids = jnp.ones((rows, visual), jnp.int32)
    embeds = jnp.ones((rows, visual, config.text.hidden_size), config.compute_dtype)
    memories = (
        {} if anew else {layer: pvm.memorize(embeds, ids) for layer, pvm in model.pvm.items()}
    )
    cache = Cache(PromptCache.empty(config, rows, visual)._replace(segment_ids=ids), memories)
    return (
        cache,
        embeds if anew else None,
        jnp.ones((rows, 1), jnp.int32),
        SampleCache.empty(config, rows, 1, text),
    )


def decode(
    graphdef: nnx.GraphDef,
    params: Any,
    cache: Cache,
    embeds: jax.Array | None,
    token: jax.Array,
    samples: SampleCache,
) -> tuple[jax.Array, SampleCache]:
    """One greedy step, in the samples' last slot; what is to be projected anew is in `embeds`."""
    model: Qwen3VL = nnx.merge(graphdef, params)
    segment_ids = cache.prompts.segment_ids
    if embeds is not None:
        seen, token = jax.lax.optimization_barrier(
            (embeds, token)
        )  # else the compiler projects once, before all steps
        memories = {layer: pvm.memorize(seen, segment_ids) for layer, pvm in model.pvm.items()}
        cache = cache._replace(memories=memories)
    slot = jnp.asarray(samples.slots - 1)
    positions = jnp.full_like(token, segment_ids.shape[1] + samples.slots)
    hidden, samples = pieces.decode(
        model, token, positions, segment_ids[:, 0], cache, samples, slot
    )
    return jnp.argmax(model.logits(hidden), -1).astype(jnp.int32), samples


def count(model: Qwen3VL, rows: int, visual: int, text: int, *, anew: bool) -> Counted:
    """From shapes: the model may be abstract."""
    graphdef, params = nnx.split(model)
    params = nnx.as_pure(params)
    shapes = partial(inputs, rows=rows, visual=visual, text=text, anew=anew)
    given = jax.eval_shape(lambda params: shapes(nnx.merge(graphdef, params)), params)
    head = model.language_model.embed_tokens if model.lm_head is None else model.lm_head
    read = (*map(nnx.state, (model.language_model.layers, model.pvm, head)), given)
    return Counted(
        flops=count_flops(partial(decode, graphdef), params, *given),
        floor=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(read)),
    )


def decoding_steps(
    model: Qwen3VL, rows: int, visual: int, text: int, steps: int, *, anew: bool
) -> Steps:
    """The compiled loop of `steps` steps, on `inputs`."""
    graphdef, params = nnx.split(model)
    params = nnx.as_pure(params)
    make = partial(inputs, rows=rows, visual=visual, text=text, anew=anew)
    *given, samples = jax.jit(lambda params: make(nnx.merge(graphdef, params)))(params)
    *given, token = given

    def loop(
        params: Any, token: jax.Array, samples: SampleCache, *given: Any
    ) -> tuple[jax.Array, SampleCache]:
        return jax.lax.fori_loop(
            0, steps, lambda _, carry: decode(graphdef, params, *given, *carry), (token, samples)
        )

    compiled = jax.jit(loop, donate_argnums=(1, 2)).lower(params, token, samples, *given).compile()

    def run() -> None:
        nonlocal token, samples
        token, samples = compiled(params, token, samples, *given)
        token.block_until_ready()

    memory = compiled.memory_analysis()
    assert memory is not None
    return Steps(run, temporary=memory.temp_size_in_bytes, updated=memory.alias_size_in_bytes)


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
    run_as_command(main)
