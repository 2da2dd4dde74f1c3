"""The three ways in which a decoder layer attends: in whole rows, in a piece of a prompt, in one
decoding step."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pvm_jax.model.attention_kernels import attention, shared_attention
from pvm_jax.model.cache import PromptCache, SampleCache, TokenKeysValues


class Attend(Protocol):
    """Self-attention, and what is kept of it."""

    def __call__(
        self, cache: Any, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, Any]:
        """q [B, S, N, H], k and v [B, S, K, H] of `layer` [] -> what the queries attended to,
        [B, S, N, H], and `cache`, a pytree, with k and v in it."""
        ...


class WholeRows(NamedTuple):
    """All columns at once, each of its own segment's columns up to itself: training, and a prompt
    that is read in one piece.

    Attributes:
        segment_ids: [B, S], 0 is padding.
        kernel: as of `attention`.
        slot: where a PromptCache, if there is one, keeps the first column.
    """

    segment_ids: jax.Array
    kernel: str | None
    slot: jax.Array | int = 0

    def __call__(
        self,
        cache: PromptCache | None,
        layer: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
    ) -> tuple[jax.Array, PromptCache | None]:
        kept = None if cache is None else cache.write(layer, self.slot, k, v)
        attended = attention(
            q,
            k,
            v,
            q_segment_ids=self.segment_ids,
            kv_segment_ids=self.segment_ids,
            causal=True,
            kernel=self.kernel,
        )
        return attended, kept


class PromptPiece(NamedTuple):
    """Some columns of prompts, after others that are in the cache.

    Attributes:
        segment_ids: [B, S], 0 is padding.
        kernel: as of `attention`.
        slot: [] int32, where the cache keeps the first column.
        until: [B, S], the slot where each column's own past ends.
    """

    segment_ids: jax.Array
    kernel: str | None
    slot: jax.Array
    until: jax.Array

    def __call__(
        self, cache: PromptCache, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, PromptCache]:
        cache = cache.write(layer, self.slot, k, v)
        attended = attention(
            q,
            jnp.moveaxis(cache.keys[layer], 1, 2),
            jnp.moveaxis(cache.values[layer], 1, 2),
            q_segment_ids=self.segment_ids,
            kv_segment_ids=cache.segment_ids,
            causal=False,
            limits=self.until,
            kernel=self.kernel,
        )
        return attended, cache


class DecodingStep(NamedTuple):
    """One new token of each of a prompt's N samples, after the prompt and what the sample wrote.

    The step's cache is what its layers write, TokenKeysValues: it joins the samples' at the end, in
    one piece. Were it written by each layer, a loop over layers would carry the samples' cache, and
    XLA's TPU compiler copies that into another layout for the loop and back, whole, at every token.

    Attributes:
        shared_mask: [B, samples, T], the slots of the prompts that each sample sees.
        own_mask: broadcastable to [B, samples, written], the slots that it has written.
    """

    prompts: PromptCache
    samples: SampleCache
    shared_mask: jax.Array
    own_mask: jax.Array

    def __call__(
        self, cache: TokenKeysValues, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, TokenKeysValues]:
        new = k.swapaxes(1, 2), v.swapaxes(1, 2)
        attended = shared_attention(
            q,
            (self.prompts.keys[layer], self.prompts.values[layer]),
            (self.samples.keys[layer], self.samples.values[layer]),
            new,
            shared_mask=self.shared_mask,
            own_mask=self.own_mask,
        )
        return attended, cache.put(layer, *new)
