"""The vision tower: patches of any number of images and frames a row -> visual tokens and DeepStack
features."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pvm_jax.config import ModelConfig, VisionConfig
from pvm_jax.data.pixels import as_floats
from pvm_jax.model.attention_kernels import attention, head_width
from pvm_jax.model.layers import Embedding, Heads, LayerNorm, Linear, Rngs, remat, stack
from pvm_jax.model.rope import Rotary, rotate, vision_rotary
from pvm_jax.sharding import constrain

_EPS = 1e-6


class Visual(NamedTuple):
    """What the tower sees: `embeds` [B, V, D] (they replace the placeholders and feed the PVM
    memory) and `deepstack` [taps, B, V, D] (the j-th is added to the stream after decoder layer
    j)."""

    embeds: jax.Array
    deepstack: jax.Array


class VisionMLP(nnx.Module):
    """[B, P, channels] -> [B, P, channels] (`Qwen3VLVisionMLP`)."""

    def __init__(self, c: VisionConfig, *, dtype: str, rngs: Rngs):
        self.linear_fc1 = Linear(
            c.hidden_size, c.intermediate_size, ("mlp", "embed"), bias=True, dtype=dtype, rngs=rngs
        )
        self.linear_fc2 = Linear(
            c.intermediate_size, c.hidden_size, ("embed", "mlp"), bias=True, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=True))


class VisionAttention(nnx.Module):
    """Full attention within one frame, [B, P, channels] -> [B, P, channels]: `segment_ids` [B, P]
    number the frames of a row, `rotary` turns heads as wide as the kernel wants them."""

    def __init__(self, c: VisionConfig, *, dtype: str, rngs: Rngs):
        # The fused projection's rows are q, k and v in turn, so splitting them over devices would
        # not split heads.
        self.qkv = Linear(
            c.hidden_size, 3 * c.hidden_size, ("hidden", "embed"), bias=True, dtype=dtype, rngs=rngs
        )
        self.proj = Linear(
            c.hidden_size, c.hidden_size, ("embed", "heads"), bias=True, dtype=dtype, rngs=rngs
        )
        self.head_dim = c.head_dim

    def __call__(
        self, x: jax.Array, rotary: Rotary, segment_ids: jax.Array, kernel: str | None
    ) -> jax.Array:
        heads, count = Heads(self.head_dim, rotary.cos.shape[-1]), x.shape[-1] // self.head_dim
        parts = [slice(start * count, (start + 1) * count) for start in range(3)]
        q, k, v = (
            constrain(self.qkv.to_heads(x, heads, part), "batch", "length", "heads", "head_dim")
            for part in parts
        )
        seen = attention(
            rotate(q, rotary),
            rotate(k, rotary),
            v,
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            causal=False,
            scale=self.head_dim**-0.5,
            kernel=kernel,
        )
        return self.proj.from_heads(seen, heads)


class VisionBlock(nnx.Module):
    """[B, P, channels] -> [B, P, channels] (`Qwen3VLVisionBlock`); arguments as of
    VisionAttention."""

    def __init__(self, c: VisionConfig, *, dtype: str, rngs: Rngs):
        self.norm1 = LayerNorm(c.hidden_size, _EPS, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(c.hidden_size, _EPS, dtype=dtype, rngs=rngs)
        self.attn = VisionAttention(c, dtype=dtype, rngs=rngs)
        self.mlp = VisionMLP(c, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, rotary: Rotary, segment_ids: jax.Array, kernel: str | None
    ) -> jax.Array:
        x = x + self.attn(self.norm1(x), rotary, segment_ids, kernel)
        x = x + self.mlp(self.norm2(x))
        return constrain(x, "batch", "length", "hidden")


class PatchMerger(nnx.Module):
    """Four consecutive patches [B, P, channels] -> one token [B, P/4, D]
    (`Qwen3VLVisionPatchMerger`).

    The tower's own merger norms each patch, the DeepStack mergers norm after the concatenation.
    """

    def __init__(self, c: VisionConfig, *, norm_after_concat: bool, dtype: str, rngs: Rngs):
        self.merged_size = c.hidden_size * c.merge_factor
        self.norm_after_concat = norm_after_concat
        features = self.merged_size if norm_after_concat else c.hidden_size
        self.norm = LayerNorm(features, _EPS, dtype=dtype, rngs=rngs)
        self.linear_fc1 = Linear(
            self.merged_size, self.merged_size, ("mlp", "embed"), bias=True, dtype=dtype, rngs=rngs
        )
        self.linear_fc2 = Linear(
            self.merged_size, c.out_hidden_size, ("embed", "mlp"), bias=True, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        merged_shape = (x.shape[0], -1, self.merged_size)
        x = (
            self.norm(x.reshape(merged_shape))
            if self.norm_after_concat
            else self.norm(x).reshape(merged_shape)
        )
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=False))


class PatchEmbed(nnx.Module):
    """The published Conv3d has kernel = stride = one patch: a matrix product on flattened
    patches."""

    def __init__(self, c: VisionConfig, *, dtype: str, rngs: Rngs):
        self.proj = Linear(
            c.patch_dim, c.hidden_size, ("embed", "hidden"), bias=True, dtype=dtype, rngs=rngs
        )

    def __call__(self, patches: jax.Array) -> jax.Array:
        """[B, P, patch_dim] -> [B, P, channels]."""
        return self.proj(patches)


class VisionTower(nnx.Module):
    """`Qwen3VLVisionModel`, batch-major: rows of patches, padded, each patch knowing its place and
    its frame."""

    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        c, dtype = config.vision, config.param_dtype
        self.config = config
        self.patch_embed = PatchEmbed(c, dtype=dtype, rngs=rngs)
        self.pos_embed = Embedding(
            c.num_position_embeddings, c.hidden_size, ("hidden", "embed"), dtype=dtype, rngs=rngs
        )
        self.blocks = stack(lambda r: VisionBlock(c, dtype=dtype, rngs=r), c.depth, rngs)
        self.merger = PatchMerger(c, norm_after_concat=False, dtype=dtype, rngs=rngs)
        self.deepstack_merger_list = stack(
            lambda r: PatchMerger(c, norm_after_concat=True, dtype=dtype, rngs=r),
            len(c.deepstack_visual_indexes),
            rngs,
        )

    def __call__(
        self,
        patches: jax.Array,
        scale: jax.Array,
        positions: jax.Array,
        interp_indices: jax.Array,
        interp_weights: jax.Array,
        segment_ids: jax.Array,
    ) -> Visual:
        """Encodes patches at grid `positions` [B, P, 2]: [B, P, patch_dim], or bytes with one frame
        or all of them, which `scale` [B, P, 4, channels] gives their meaning (`Batch`).

        `interp_indices`, `interp_weights` [B, P, 4]: the four learned positions around each patch
        and their bilinear shares. `segment_ids` [B, P]: one per frame, 0 for padding.
        """
        c = self.config.vision
        pixels = as_floats(patches, scale, c.patch_dim)
        x = self.patch_embed(pixels.astype(self.config.compute_dtype))
        for corner in range(4):
            x += self.pos_embed(interp_indices[..., corner], x.dtype) * interp_weights[
                ..., corner, None
            ].astype(x.dtype)
        x = constrain(x, "batch", "length", "hidden")
        kernel = self.config.attention
        rotary = vision_rotary(positions, c.head_dim, head_width(c.head_dim, kernel))

        graphdef, params = nnx.split(self.blocks)
        params = nnx.as_pure(params)

        def block(x, params):
            return nnx.merge(graphdef, params)(x, rotary, segment_ids, kernel), None

        block = remat(block, self.config.remat)
        taps, start = [], 0
        for stop in (*(tap + 1 for tap in c.deepstack_visual_indexes), c.depth):
            x, _ = jax.lax.scan(
                block, x, jax.tree.map(lambda p, s=slice(start, stop): p[s], params)
            )
            taps.append(x)
            start = stop
        merge_def, merge_params = nnx.split(self.deepstack_merger_list)
        deepstack = jax.vmap(lambda p, tap: nnx.merge(merge_def, p)(tap))(
            nnx.as_pure(merge_params), jnp.stack(taps[:-1])
        )
        return Visual(self.merger(x), deepstack)
