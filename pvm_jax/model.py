"""Qwen3-VL with Persistent Visual Memory: tower + decoder + branches, a pure function of parameters and a batch."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pvm_jax.batch import Batch
from pvm_jax.config import LoRAConfig, ModelConfig
from pvm_jax.decoder import Decoded, Decoder, KeyValues
from pvm_jax.layers import Linear
from pvm_jax.lora import adapt, is_adapter
from pvm_jax.memory import Memory, PersistentVisualMemory
from pvm_jax.sharding import constrain, param_shardings
from pvm_jax.vision import VisionTower, Visual


class Cache(NamedTuple):
    """What decoding reads: the decoder's keys and values, and each branch's memory of the row's images, by layer."""

    key_values: KeyValues
    memories: dict[str, Memory]


class Trace(NamedTuple):
    """The model's inner values on a batch.

    Attributes:
        embeds: [B, V, D], deepstack: [taps, B, V, D]: what the tower gives; None for a batch without patches.
        streams: [L, B, S, D], the residual stream that leaves each layer (the DeepStack addition included).
        updates: by layer of the branch, [B, S, D].
        hidden: [B, S, D] after the final norm.
        logits: [B, S, vocab] float32.
    """

    embeds: jax.Array | None
    deepstack: jax.Array | None
    streams: jax.Array
    updates: dict[int, jax.Array]
    hidden: jax.Array
    logits: jax.Array


class Qwen3VL(nnx.Module):
    """Qwen3-VL (dense), with the paper's branch at `config.text.pvm_layers`.

    Modules hold parameters alone; nothing is stored on them by a call. `nnx.split` gives the parameters as a tree whose paths
    are Hugging Face's names, alike layers stacked on a leading axis, the branches under `pvm/{layer}`, and an adapter (with
    `config.lora`) under `lora` beside the weight that it adapts.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c = config.text
        self.config = config
        self.visual = VisionTower(config, rngs=rngs)
        self.language_model = Decoder(config, rngs=rngs)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(c.hidden_size, c.vocab_size, ("vocab", "embed"), dtype=config.param_dtype, rngs=rngs)
        )
        self.pvm = nnx.Dict({str(layer): PersistentVisualMemory(config, rngs=rngs) for layer in c.pvm_layers})
        if config.lora is not None:
            adapt(self, config.lora, rngs=rngs)

    def __call__(self, batch: Batch) -> jax.Array:
        """Logits [B, S, vocab] float32, compiled once per shape; a convenience: training takes the head in chunks."""
        graphdef, params = nnx.split(self)
        return _logits(graphdef, nnx.as_pure(params), batch)

    def hidden(self, batch: Batch) -> jax.Array:
        """[B, S, D] after the final norm."""
        return self._read(batch)[1].hidden

    def trace(self, batch: Batch) -> Trace:
        """Every inner value that the paper's analyses read."""
        visual, decoded, _ = self._read(batch, trace=True)
        assert decoded.streams is not None
        embeds, deepstack = visual or (None, None)
        return Trace(embeds, deepstack, decoded.streams, decoded.updates, decoded.hidden, self.logits(decoded.hidden))

    def prefill(self, batch: Batch, slots: int) -> tuple[jax.Array, Cache]:
        """Reads a prompt into a fresh cache of `slots` >= S slots; column s of the prompt is slot s.

        Returns:
            [B, S, D] after the final norm, and the cache.
        """
        c = self.config.text
        rows, length = batch.tokens.shape
        shape = (c.num_hidden_layers, rows, slots, c.num_key_value_heads, c.head_dim)
        empty = jnp.zeros(shape, self.config.compute_dtype)
        segment_ids = jnp.pad(batch.segment_ids, ((0, 0), (0, slots - length)))
        _, decoded, memories = self._read(batch, cache=KeyValues(empty, empty, segment_ids))
        assert decoded.cache is not None
        return decoded.hidden, Cache(decoded.cache, memories)

    def decode(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Cache, slot: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """One more text token a row: nothing of the images is computed again.

        Args:
            tokens, positions, segment_ids: [B]; a text token's position is the same in time, row and column.
            slot: scalar, the slot that it is written to.

        Returns:
            [B, 1, D] after the final norm, and the cache.
        """
        segment_ids = segment_ids[:, None]
        seen = jax.lax.dynamic_update_slice(cache.key_values.segment_ids, segment_ids, (0, slot))
        decoded = self._decode(
            self._embed(tokens[:, None]),
            jnp.repeat(positions[:, None, None], 3, 1),
            segment_ids,
            jnp.full_like(segment_ids, -1),
            cache.memories,
            cache=cache.key_values._replace(segment_ids=seen),
            slot=slot,
        )
        assert decoded.cache is not None
        return decoded.hidden, cache._replace(key_values=decoded.cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., vocab] float32."""
        weight = self.head_weight().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)

    def head_weight(self) -> jax.Array:
        """[vocab, D]; the embedding table where the two are tied."""
        head = self.language_model.embed_tokens if self.lm_head is None else self.lm_head
        return head.weight[...]

    def encode(self, batch: Batch) -> Visual | None:
        """The batch's images through the tower; None where its patches have no columns at all."""
        if not batch.patches.shape[1]:
            return None
        return self.visual(
            batch.patches,
            batch.patch_positions,
            batch.patch_interp_indices,
            batch.patch_interp_weights,
            batch.patch_segment_ids,
        )

    def memorize(self, visual: Visual | None, batch: Batch) -> dict[str, Memory]:
        """Each branch's memory of the batch's images, by layer; empty without images."""
        if visual is None:
            return {}
        return {layer: pvm.memorize(visual.embeds, batch.visual_segment_ids) for layer, pvm in self.pvm.items()}

    def _embed(self, tokens: jax.Array) -> jax.Array:
        embedded = self.language_model.embed_tokens(tokens, self.config.compute_dtype)
        return constrain(embedded, "batch", "length", "hidden")

    def _read(
        self, batch: Batch, *, cache: KeyValues | None = None, trace: bool = False
    ) -> tuple[Visual | None, Decoded, dict[str, Memory]]:
        visual = self.encode(batch)
        memories = self.memorize(visual, batch)
        hidden = self._embed(batch.tokens)
        is_visual = (batch.visual_index >= 0)[..., None]

        def place(features: jax.Array, elsewhere: jax.Array | float = 0) -> jax.Array:
            """[B, V, D] -> [B, S, D]: a gather of each column's visual token."""
            placed = jnp.take_along_axis(features, jnp.maximum(batch.visual_index, 0)[..., None], axis=1)
            return jnp.where(is_visual, placed, elsewhere)

        if visual is not None:
            hidden = place(visual.embeds, hidden)
        decoded = self._decode(
            hidden,
            batch.positions,
            batch.segment_ids,
            batch.visual_index,
            memories,
            deepstack=None if visual is None else visual.deepstack,
            place=place,
            cache=cache,
            trace=trace,
        )
        return visual, decoded, memories

    def _decode(self, hidden, positions, segment_ids, visual_index, memories, **kwargs) -> Decoded:
        def recall(layer: int, stream: jax.Array) -> jax.Array:
            key = str(layer)
            return self.pvm[key](stream, memories[key], segment_ids, visual_index >= 0)

        return self.language_model(hidden, positions, segment_ids, recall=recall if memories else None, **kwargs)


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> jax.Array:
    model: Qwen3VL = nnx.merge(graphdef, params)
    return model.logits(model.hidden(batch))


def abstract_model(config: ModelConfig) -> Qwen3VL:
    """The model with jax.ShapeDtypeStructs for parameters: shapes, dtypes and logical axes, nothing allocated."""
    return nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0)))


def add_lora(model: Qwen3VL, lora: LoRAConfig, *, mesh: jax.sharding.Mesh | None = None, seed: int = 0) -> Qwen3VL:
    """`model` with fresh adapters, placed on `mesh` as the model is: until they are trained, it computes what it did.

    Raises:
        ValueError: if the model has adapters already, or `lora.targets` names no Linear of it.
    """
    if model.config.lora is not None:
        raise ValueError(f"the model has a LoRA adapter already: {model.config.lora}")
    adapted = abstract_model(replace(model.config, lora=lora))

    def fresh() -> nnx.State:
        backbone = abstract_model(model.config)
        adapt(backbone, lora, rngs=nnx.Rngs(seed))
        return nnx.as_pure(nnx.state(backbone, is_adapter))

    shardings = None if mesh is None else param_shardings(nnx.state(adapted, is_adapter), mesh)
    adapters = jax.jit(fresh, out_shardings=shardings)()
    return nnx.merge(nnx.graphdef(adapted), nnx.as_pure(nnx.state(model)), adapters)
