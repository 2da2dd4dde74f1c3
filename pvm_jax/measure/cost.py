"""What the branch costs: time to read a prompt, time of a generated token, and bytes that are
held."""

import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from pvm_jax.data.batch import Batch
from pvm_jax.data.example import Example
from pvm_jax.generation import generate, stream
from pvm_jax.model import pieces
from pvm_jax.model.cache import SampleCache
from pvm_jax.model.qwen3_vl import Qwen3VL


class Cost(NamedTuple):
    """Of one model.

    Attributes:
        prefill: [rounds], seconds until the first token of a prompt is there, in each round.
        decode: [rounds], seconds of each further token, a round's mean.
        weights: bytes of all parameters.
        cache: bytes of the prompt's keys and values and those of the tokens generated.
        memory: bytes of what the branch keeps of the prompt's images.
        tokens: of the prompt.
        patches: of the prompt's images.
        new_tokens: that were generated.
    """

    prefill: np.ndarray
    decode: np.ndarray
    weights: int
    cache: int
    memory: int
    tokens: int
    patches: int
    new_tokens: int


def cost(
    models: Mapping[str, Qwen3VL], prompt: Example, *, new_tokens: int = 128, rounds: int = 10
) -> dict[str, Cost]:
    """Measures `models` in turn, round by round, so that a busy machine is busy for all of them:
    compare within one call alone.

    Args:
        prompt: one encoded conversation that ends where an answer is to begin.
        new_tokens: generated after it, greedily, at least 2.
        rounds: after one that compiles and is not counted.
    """
    if new_tokens < 2 or rounds < 1:
        raise ValueError(
            f"new_tokens must be at least 2 and rounds at least 1, got {new_tokens} and {rounds}"
        )
    batches = {name: Batch.from_examples([prompt], model.config) for name, model in models.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            seconds[name].append(_seconds(model, batches[name], new_tokens))
    found = {}
    for name, model in models.items():
        prefill, decode = np.array(seconds[name][1:]).T
        weights, cache, memory = _bytes(model, batches[name], new_tokens)
        found[name] = Cost(
            prefill=prefill,
            decode=decode,
            weights=weights,
            cache=cache,
            memory=memory,
            tokens=len(prompt.input_ids),
            patches=prompt.num_patches,
            new_tokens=new_tokens,
        )
    return found


def _seconds(model: Qwen3VL, batch: Batch, new_tokens: int) -> tuple[float, float]:
    """To the first token, and of each further one."""
    start = time.perf_counter()
    next(stream(model, batch, max_new_tokens=new_tokens, temperature=0.0, stop_tokens=()))
    first = time.perf_counter() - start
    start = time.perf_counter()
    got = generate(model, batch, max_new_tokens=new_tokens, temperature=0.0, stop_tokens=())
    got.tokens.block_until_ready()
    return first, (time.perf_counter() - start - first) / (new_tokens - 1)


def _bytes(model: Qwen3VL, batch: Batch, new_tokens: int) -> tuple[int, int, int]:
    """Of weights, keys and values, and memories; nothing is computed."""
    cache = jax.eval_shape(lambda: pieces.prefill(model, batch)[1])
    samples = jax.eval_shape(lambda: SampleCache.empty(model.config, 1, 1, new_tokens))

    def total(tree) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    return (
        total(nnx.as_pure(nnx.state(model))),
        total((cache.prompts, samples)),
        total(cache.memories),
    )
