"""What decoding reads: keys and values of the prompts, each prompt's memory of its images, and what
its samples wrote.

Heads come before slots, so that a head's keys are one matrix: a decoding step multiplies them where
they lie.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from pvm_jax.config import ModelConfig
from pvm_jax.model.memory import Memory
from pvm_jax.sharding import constrain


class PromptCache(NamedTuple):
    """The prompts' keys and values, [L, B, K, T, H] each, and the segment of every slot, [B, T] (0:
    empty)."""

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, slots: int) -> Self:
        c = config.text
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, slots, c.head_dim)
        names = ("layers", "batch", "kv_heads", "length", "head_dim")
        keys, values = _two_empty(shape, names, config)
        return cls(keys, values, jnp.zeros((rows, slots), jnp.int32))

    @property
    def slots(self) -> int:
        return self.segment_ids.shape[1]

    def followed_by(self, more: Self) -> Self:
        """With the slots of `more` behind its own."""
        return type(self)(
            jnp.concatenate([self.keys, more.keys], 3),
            jnp.concatenate([self.values, more.values], 3),
            jnp.concatenate([self.segment_ids, more.segment_ids], 1),
        )

    def compacted(self, slots: int) -> Self:
        """In `slots` slots at most: the empty ones moved behind the others, and as many as need be
        left out."""
        order = jnp.argsort(self.segment_ids == 0, axis=1, stable=True)[:, :slots]
        return type(self)(
            jnp.take_along_axis(self.keys, order[None, :, None, :, None], 3),
            jnp.take_along_axis(self.values, order[None, :, None, :, None], 3),
            jnp.take_along_axis(self.segment_ids, order, 1),
        )

    def claim(self, slot: jax.Array, segment_ids: jax.Array) -> Self:
        """With the slots from `slot` on given to tokens of `segment_ids` [B, S], before any layer
        writes there."""
        return self._replace(
            segment_ids=jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (0, slot))
        )

    def write(self, layer: jax.Array, slot: jax.Array | int, k: jax.Array, v: jax.Array) -> Self:
        """With k, v [B, S, K, H] in the slots from `slot` on of one layer."""
        start = (layer, 0, 0, slot, 0)
        k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        return self._replace(keys=_put(self.keys, k, start), values=_put(self.values, v, start))


class SampleCache(NamedTuple):
    """The keys and values of what is generated: [L, B, K, samples, T, H] each, for all samples of
    every prompt."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, samples: int, slots: int) -> Self:
        c = config.text
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, samples, slots, c.head_dim)
        names = ("layers", "batch", "kv_heads", "samples", "length", "head_dim")
        return cls(*_two_empty(shape, names, config))

    @property
    def slots(self) -> int:
        return self.keys.shape[4]

    def grown(self, slots: int) -> Self:
        """With empty slots appended, `slots` in all."""
        more = [(0, 0)] * 4 + [(0, slots - self.slots), (0, 0)]
        return type(self)(jnp.pad(self.keys, more), jnp.pad(self.values, more))

    def unwritten(self) -> "TokenKeysValues":
        """Room for one token's keys and values."""
        return TokenKeysValues(*(jnp.zeros_like(x[:, :, :, :, 0]) for x in self))

    def write(self, slot: jax.Array, written: "TokenKeysValues") -> Self:
        """With them in `slot` [] of every layer."""
        pairs = zip(self, written, strict=True)
        return type(self)(
            *(
                jax.lax.dynamic_update_slice_in_dim(x, new[..., None, :], slot, 4)
                for x, new in pairs
            )
        )


class TokenKeysValues(NamedTuple):
    """The keys and values of one token of every sample: [L, B, K, samples, H] each."""

    keys: jax.Array
    values: jax.Array

    def put(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> Self:
        """With k, v [B, K, samples, H] as one layer's."""
        start = (layer, 0, 0, 0, 0)
        return type(self)(_put(self.keys, k, start), _put(self.values, v, start))


class Cache(NamedTuple):
    """All that is kept of the prompts: the decoder's keys and values, and each branch's memory of
    the images, by layer."""

    prompts: PromptCache
    memories: dict[str, Memory]

    @property
    def visual_tokens(self) -> int:
        """Columns of the memories, V; 0 without images."""
        return next((memory.segment_ids.shape[1] for memory in self.memories.values()), 0)

    def remembering(self, memories: dict[str, Memory]) -> dict[str, Memory]:
        """The memories with these behind their own: the images seen before stay."""
        if not (self.memories and memories):
            return self.memories or memories
        return jax.tree.map(
            lambda old, new: jnp.concatenate([old, new], 1), self.memories, memories
        )


def _two_empty(
    shape: tuple[int, ...], names: tuple[str, ...], config: ModelConfig
) -> list[jax.Array]:
    """For keys and for values: buffers of their own, so that both can be donated."""
    return [constrain(jnp.zeros(shape, config.compute_dtype), *names) for _ in range(2)]


def _put(whole: jax.Array, part: jax.Array, start: tuple) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, part[None].astype(whole.dtype), start)
