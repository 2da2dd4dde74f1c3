"""Persistent Visual Memory: the paper's branch (arXiv 2605.00814, section 3). Nothing else is in
this file."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pvm_jax.config import ModelConfig
from pvm_jax.model.attention_kernels import attention, attention_mask, attention_weights
from pvm_jax.model.layers import (
    Heads,
    Linear,
    RMSNorm,
    Rngs,
    SwiGLU,
    parameter,
    rms_normalize,
    zeros,
)
from pvm_jax.sharding import constrain


class Memory(NamedTuple):
    """What one branch keeps of a row's images: keys and values [B, V, K, H] and whose they are,
    `segment_ids` [B, V]."""

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array


class CrossAttention(nnx.Module):
    """Grouped-query attention from the text stream to the visual tokens: no positions, no causal
    order."""

    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        c, dtype = config.text, config.param_dtype
        width, q_width = c.pvm_hidden_size, c.pvm_num_heads * c.head_dim
        kv_width = c.pvm_num_key_value_heads * c.head_dim

        def linear(width: int, features: int, axes: tuple[str, str]) -> Linear:
            return Linear(width, features, axes, bias=c.attention_bias, dtype=dtype, rngs=rngs)

        self.q_proj = linear(width, q_width, ("heads", "embed"))
        self.k_proj = linear(width, kv_width, ("kv_heads", "embed"))
        self.v_proj = linear(width, kv_width, ("kv_heads", "embed"))
        self.o_proj = linear(q_width, width, ("embed", "heads"))
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.heads = Heads(c.head_dim, c.head_dim)
        self.kernel = config.attention

    def memorize(self, compact: jax.Array, segment_ids: jax.Array) -> Memory:
        """Visual tokens in the branch's width, [B, V, width], and their segments [B, V]."""
        keys = self.k_norm(self.k_proj.to_heads(compact, self.heads))
        values = self.v_proj.to_heads(compact, self.heads)
        return Memory(_by_head(keys, "kv_heads"), _by_head(values, "kv_heads"), segment_ids)

    def queries(self, query: jax.Array) -> jax.Array:
        """[B, S, width] -> [B, S, N, H]."""
        return _by_head(self.q_norm(self.q_proj.to_heads(query, self.heads)), "heads")

    def __call__(
        self, query: jax.Array, memory: Memory, segment_ids: jax.Array, limits: jax.Array | None
    ) -> jax.Array:
        """[B, S, width] -> [B, S, width]; `segment_ids` and `limits` [B, S]."""
        recalled = attention(
            self.queries(query),
            _by_head(memory.keys, "kv_heads"),
            _by_head(memory.values, "kv_heads"),
            q_segment_ids=segment_ids,
            kv_segment_ids=memory.segment_ids,
            causal=False,
            limits=limits,
            kernel=self.kernel,
        )
        return self.o_proj.from_heads(recalled, self.heads)


def _by_head(x: jax.Array, heads: str) -> jax.Array:
    """[B, S, N, H], split by whole heads or not at all: else where there are fewer heads than
    devices, those are cut, and every score is added up between devices."""
    return constrain(x, "batch", "length", heads, "head_dim")


class PersistentVisualMemory(nnx.Module):
    """Gated cross-attention from the text stream to the image, beside one decoder layer's FFN.

    Fresh parameters are those that train: gate 0, every Linear ~ N(0, 0.02), norms 1. The update is
    then exactly 0, and the gate's gradient is not. A fresh gate by token is the scalar gate.
    """

    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        c, dtype = config.text, config.param_dtype
        width = c.pvm_hidden_size
        self.text_reducer = Linear(
            c.hidden_size, width, ("hidden", "embed"), dtype=dtype, rngs=rngs
        )
        self.vision_reducer = Linear(
            c.hidden_size, width, ("hidden", "embed"), dtype=dtype, rngs=rngs
        )
        self.input_norm = RMSNorm(width, c.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.cross_attn = CrossAttention(config, rngs=rngs)
        self.post_attn_norm = RMSNorm(width, c.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(width, c.pvm_intermediate_size, dtype=dtype, rngs=rngs)
        self.output_expander = Linear(
            width, c.hidden_size, ("embed", "hidden"), dtype=dtype, rngs=rngs
        )
        self.gate_alpha = parameter(rngs, zeros, (1,), ("norm",), dtype)
        self.gate_token = (
            parameter(rngs, zeros, (c.hidden_size,), ("hidden",), dtype)
            if c.pvm_gate == "token"
            else None
        )
        self.eps = c.rms_norm_eps

    def memorize(self, embeds: jax.Array, segment_ids: jax.Array) -> Memory:
        """Projects a row's visual tokens once, whatever is read from them later.

        Args:
            embeds: [B, V, D], the tower's merged output: what replaces the placeholders.
            segment_ids: [B, V], the packed example that each belongs to; 0 is padding.
        """
        return self.cross_attn.memorize(self.vision_reducer(embeds), segment_ids)

    def __call__(
        self,
        stream: jax.Array,
        memory: Memory,
        segment_ids: jax.Array,
        is_visual: jax.Array,
        limits: jax.Array | None = None,
    ) -> jax.Array:
        """The update y that joins the FFN's output.

        Args:
            stream: [B, S, D], the residual stream after self-attention, before the FFN's norm.
            memory: of this branch, for the same rows.
            segment_ids: [B, S]; a token recalls the visual tokens of its own segment.
            is_visual: [B, S], True where the token is itself a visual one.
            limits: [B, S]; a token recalls the memory's visual tokens below its limit only. None:
                all of its segment.

        Returns:
            [B, S, D]: exactly 0 at visual tokens, at padding and where there is no visual token to
            recall.
        """
        query = self.input_norm(self.text_reducer(stream))
        recalled = self.cross_attn(query, memory, segment_ids, limits)
        recalled = recalled + self.mlp(self.post_attn_norm(recalled))
        update = rms_normalize(self.output_expander(recalled), self.eps)
        if self.gate_token is not None:
            gate = rms_normalize(stream, self.eps) @ self.gate_token[...].astype(stream.dtype)
            update = 2 * jax.nn.sigmoid(gate)[..., None] * update
        update = self.gate_alpha[...].astype(update.dtype) * update
        remembers = jnp.any(attention_mask(segment_ids, memory.segment_ids, limits=limits), -1) & (
            segment_ids > 0
        )
        silent = is_visual | ~remembers
        return constrain(jnp.where(silent[..., None], 0, update), "batch", "length", "hidden")

    def looks(
        self,
        stream: jax.Array,
        memory: Memory,
        segment_ids: jax.Array,
        limits: jax.Array | None = None,
    ) -> jax.Array:
        """How each head shares its attention among the visual tokens, arguments as of a call; for
        measurements alone.

        Returns:
            [B, N, S, V] float32: every head's sum is 1, or 0 where there is no visual token to
            recall.
        """
        queries = self.cross_attn.queries(self.input_norm(self.text_reducer(stream)))
        return attention_weights(
            queries, memory.keys, attention_mask(segment_ids, memory.segment_ids, limits=limits)
        )
