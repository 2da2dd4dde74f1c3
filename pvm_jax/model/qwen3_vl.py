"""Qwen3-VL with Persistent Visual Memory: tower + decoder + branches, a pure function of parameters
and a batch."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from pvm_jax.config import LoRAConfig, ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.model.attend import Attend, WholeRows
from pvm_jax.model.decoder import Decoded, Decoder, Inner
from pvm_jax.model.layers import Linear, Rngs, product
from pvm_jax.model.lora import adapt, is_adapter
from pvm_jax.model.memory import Memory, PersistentVisualMemory
from pvm_jax.model.vision import VisionTower, Visual
from pvm_jax.sharding import constrain, param_shardings


class Columns(NamedTuple):
    """The columns of a batch that the decoder reads; see Batch. `limits`: [B, S], where each
    token's memory ends; None: it is a row's images, one packed example behind the other."""

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    visual_index: jax.Array
    limits: jax.Array | None

    @classmethod
    def of(cls, batch: Batch, visibility: str, past: int = 0) -> Self:
        """All columns of a batch whose visual tokens follow `past` others in the memory."""
        limits = None
        if visibility == "preceding":  # a row's visual tokens stand in the order of their columns
            index = jnp.asarray(batch.visual_index)
            limits = past + 1 + jax.lax.cummax(jnp.where(index < -1, -2 - index, index), axis=1)
        elif past:  # then padding stands between a conversation's images, too
            limits = jnp.full(batch.tokens.shape, past + batch.visual_segment_ids.shape[1])
        return cls(batch.tokens, batch.positions, batch.segment_ids, batch.visual_index, limits)


class Trace(NamedTuple):
    """The model's inner values on a batch.

    Attributes:
        embeds: [B, V, D], deepstack: [taps, B, V, D]: what the tower gives; None for a batch
            without patches.
        streams: [L, B, S, D], the residual stream that leaves each layer (the DeepStack addition
            included).
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

    Modules hold parameters alone; nothing is stored on them by a call. `nnx.split` gives the
    parameters as a tree whose paths are Hugging Face's names, alike layers stacked on a leading
    axis, the branches under `pvm/{layer}`, and an adapter (with `config.lora`) under `lora` beside
    the weight that it adapts.
    """

    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        c = config.text
        self.config = config
        self.visual = VisionTower(config, rngs=rngs)
        self.language_model = Decoder(config, rngs=rngs)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(
                c.hidden_size, c.vocab_size, ("vocab", "embed"), dtype=config.param_dtype, rngs=rngs
            )
        )
        self.pvm = nnx.Dict(
            {str(layer): PersistentVisualMemory(config, rngs=rngs) for layer in c.pvm_layers}
        )
        if config.lora is not None:
            adapt(self, config.lora, rngs=rngs)

    def __call__(self, batch: Batch) -> jax.Array:
        """Logits [B, S, vocab] float32, compiled once per shape; a convenience: training takes the
        head in chunks."""
        graphdef, params = nnx.split(self)
        return _logits(graphdef, nnx.as_pure(params), batch)

    def hidden(self, batch: Batch) -> jax.Array:
        """[B, S, D] after the final norm."""
        return self._read(batch)[1].hidden

    def trace(self, batch: Batch) -> Trace:
        """Every inner value that the paper's analyses read."""
        visual, decoded = self._read(batch, probe=lambda inner: (inner.stream, inner.update))
        embeds, deepstack = visual or (None, None)
        streams = jnp.stack([stream for stream, _ in decoded.probed])
        updates = {
            layer: update for layer, (_, update) in enumerate(decoded.probed) if update is not None
        }
        return Trace(
            embeds, deepstack, streams, updates, decoded.hidden, self.logits(decoded.hidden)
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., vocab] float32."""
        weight = self.head_weight().astype(hidden.dtype)
        return product(hidden, weight, preferred_element_type=jnp.float32)

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
            batch.patch_scale,
            batch.patch_positions,
            batch.patch_interp_indices,
            batch.patch_interp_weights,
            batch.patch_segment_ids,
        )

    def memorize(self, visual: Visual | None, batch: Batch) -> dict[str, Memory]:
        """Each branch's memory of the batch's images, by layer; empty without images."""
        if visual is None:
            return {}
        return {
            layer: pvm.memorize(visual.embeds, batch.visual_segment_ids)
            for layer, pvm in self.pvm.items()
        }

    def forward(
        self,
        columns: Columns,
        visual: Visual | None,
        memories: dict[str, Memory],
        attend: Attend,
        *,
        cache: Any = None,
        probe: Callable[[Inner], Any] | None = None,
    ) -> Decoded:
        """Some columns of a batch through the decoder and its branches.

        Args:
            visual: what the tower saw in the batch; None: no image.
            memories: each branch's, by layer; empty: nothing to recall.
            attend, cache, probe: as of `Decoder`.
        """
        is_visual, seen = columns.visual_index != -1, columns.visual_index >= 0

        def place(features: jax.Array, elsewhere: jax.Array | float = 0) -> jax.Array:
            """[B, V, D] -> [B, S, D]: a gather of the visual token that each column shows."""
            placed = jnp.take_along_axis(
                features, jnp.maximum(columns.visual_index, 0)[..., None], axis=1
            )
            return jnp.where(seen[..., None], placed, elsewhere)

        def recall(layer: int, stream: jax.Array) -> jax.Array:
            key = str(layer)
            return self.pvm[key](
                stream, memories[key], columns.segment_ids, is_visual, columns.limits
            )

        hidden = self.language_model.embed_tokens(columns.tokens, self.config.compute_dtype)
        hidden = constrain(hidden, "batch", "length", "hidden")
        return self.language_model(
            hidden if visual is None else place(visual.embeds, hidden),
            columns.positions,
            attend=attend,
            cache=cache,
            recall=recall if memories else None,
            deepstack=None if visual is None else visual.deepstack,
            place=place,
            probe=probe,
        )

    def _read(
        self, batch: Batch, *, probe: Callable[[Inner], Any] | None = None
    ) -> tuple[Visual | None, Decoded]:
        visual = self.encode(batch)
        columns = Columns.of(batch, self.config.text.pvm_visibility)
        attend = WholeRows(batch.segment_ids, self.config.attention)
        return visual, self.forward(
            columns, visual, self.memorize(visual, batch), attend, probe=probe
        )


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> jax.Array:
    model: Qwen3VL = nnx.merge(graphdef, params)
    return model.logits(model.hidden(batch))


def abstract_model(config: ModelConfig) -> Qwen3VL:
    """The model with jax.ShapeDtypeStructs for parameters: shapes, dtypes and logical axes, nothing
    allocated."""
    return nnx.merge(*_blueprint(config))


@lru_cache(maxsize=32)
def _blueprint(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Of `abstract_model`: a command asks for the same one again and again."""
    return nnx.split(Qwen3VL(config, rngs=None))


def without_pvm(model: Qwen3VL) -> Qwen3VL:
    """The same weights without the branch."""
    backbone = nnx.state(model, lambda path, _: path[0] != "pvm")
    return nnx.merge(nnx.graphdef(abstract_model(model.config.without_pvm())), backbone)


def add_lora(
    model: Qwen3VL, lora: LoRAConfig, *, mesh: jax.sharding.Mesh | None = None, seed: int = 0
) -> Qwen3VL:
    """`model` with fresh adapters, placed on `mesh` as the model is: until they are trained, it
    computes what it did.

    Raises:
        ValueError: if the model has adapters already, or `lora.targets` names no Linear of it.
    """
    if model.config.lora is not None:
        raise ValueError(f"the model has a LoRA adapter already: {model.config.lora}")
    adapted = abstract_model(replace(model.config, lora=lora))
    shardings = None if mesh is None else param_shardings(nnx.state(adapted, is_adapter), mesh)
    fresh = jax.jit(_fresh_adapters, static_argnums=(0, 1, 2), out_shardings=shardings)
    adapters = fresh(model.config, lora, seed)
    return nnx.merge(nnx.graphdef(adapted), nnx.as_pure(nnx.state(model)), adapters)


def _fresh_adapters(config: ModelConfig, lora: LoRAConfig, seed: int) -> nnx.State:
    """Those of a model of `config`."""
    backbone = abstract_model(config)
    adapt(backbone, lora, rngs=nnx.Rngs(seed))
    return nnx.as_pure(nnx.state(backbone, is_adapter))
