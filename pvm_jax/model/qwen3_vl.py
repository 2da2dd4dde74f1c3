"""Qwen3-VL with Persistent Visual Memory: tower + decoder + branches, a pure function of parameters
and a batch."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from pvm_jax.config import LoRAConfig, ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.model.attention import attention, attention_mask, shared_attention
from pvm_jax.model.cache import Cache, PromptCache, SampleCache, TokenKeysValues
from pvm_jax.model.decoder import Attend, Decoded, Decoder, Inner
from pvm_jax.model.layers import Linear, Rngs
from pvm_jax.model.lora import adapt, is_adapter
from pvm_jax.model.memory import Memory, PersistentVisualMemory
from pvm_jax.model.vision import VisionTower, Visual
from pvm_jax.sharding import constrain, param_shardings


class _Columns(NamedTuple):
    """The columns of a batch that the decoder reads; see Batch. `limits`: [B, S], where each
    token's memory ends."""

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
        return cls(batch.tokens, batch.positions, batch.segment_ids, batch.visual_index, limits)

    def chunks(self, count: int) -> Self:
        """[count, B, ...]: the columns in `count` pieces of equal width, padded at the end."""

        def cut(x: jax.Array, padding: int) -> jax.Array:
            more = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % count)]
            x = jnp.pad(x, more, constant_values=padding)
            return jnp.moveaxis(x.reshape(*x.shape[:-1], count, -1), -2, 0)

        return type(self)(
            cut(self.tokens, 0),
            cut(self.positions, 0),
            cut(self.segment_ids, 0),
            cut(self.visual_index, -1),
            None if self.limits is None else cut(self.limits, 0),
        )


class Piece(NamedTuple):
    """The columns of a batch that are read together, [B, W], and what they may look at.

    Attributes:
        start: [] int32, the first of them in the batch.
        segment_ids: [B, W], 0 is padding.
        limits: [B, W], where each column's memory ends; None: nowhere.
        mask: [B, W, T], the columns of the batch (filled up to whole pieces) that each of them
            attends to.
        memories: each branch's memory of the batch's images, by layer.
    """

    start: jax.Array
    segment_ids: jax.Array
    limits: jax.Array | None
    mask: jax.Array
    memories: dict[str, Memory]


LayerProbe = Callable[[Piece, Inner], Any]
"""Takes of each layer, of each piece, what a measurement wants: a pytree of arrays."""

Conclude = Callable[[Piece, jax.Array, list[Any]], Any]
"""(piece, hidden [B, W, D] after the final norm, what `LayerProbe` took of each layer) -> what is
kept of the piece."""


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

    def inspect(self, batch: Batch, look: LayerProbe, conclude: Conclude, *, chunk: int) -> Any:
        """Reads whole conversations in pieces of at most `chunk` columns, and keeps of their inner
        values what is asked for.

        No [heads, S, S], no [L, B, S, D] and no [B, S, vocab] ever exists unless the callbacks keep
        one.

        Returns:
            What `conclude` gave, stacked over the pieces: [pieces, ...].
        """
        return self._read_pieces(batch, chunk, None, look, conclude)[2]

    def prefill(
        self, batch: Batch, *, chunk: int | None = None, past: Cache | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads prompts, one a row, or what comes after `past` in them.

        Args:
            chunk: columns to read at a time, at most; None reads all at once.
            past: what was read before, whose positions the batch's continue. Its images stay in the
                memory.

        Returns:
            [B, 1, D] after the final norm at each row's last token, and the cache: the batch's
            columns are its last slots.
        """
        hidden, cache, _ = self._read_pieces(batch, chunk, past)
        return hidden, cache

    def _read_pieces(
        self,
        batch: Batch,
        chunk: int | None,
        past: Cache | None,
        look: LayerProbe | None = None,
        conclude: Conclude | None = None,
    ) -> tuple[jax.Array, Cache, Any]:
        """What `prefill` returns, and what `inspect` does."""
        rows, length = batch.tokens.shape
        count = 1 if chunk is None else -(-length // chunk)
        columns = _Columns.of(
            batch, self.config.text.pvm_visibility, 0 if past is None else past.visual_tokens
        ).chunks(count)
        width = columns.tokens.shape[-1]
        visual = self.encode(batch)
        prompts, memories = (
            PromptCache.empty(self.config, rows, count * width),
            self.memorize(visual, batch),
        )
        before = 0
        if past is not None:
            before = past.prompts.slots
            prompts, memories = past.prompts.followed_by(prompts), past.remembering(memories)
        last = length - 1 - jnp.argmax(batch.segment_ids[:, ::-1] > 0, axis=1)

        def read(carry: tuple[PromptCache, jax.Array], xs: tuple[jax.Array, _Columns]):
            prompts, hidden = carry
            start, columns = xs
            prompts = prompts.claim(before + start, columns.segment_ids)
            until = jnp.broadcast_to(before + start + 1 + jnp.arange(width), columns.tokens.shape)
            mask = attention_mask(columns.segment_ids, prompts.segment_ids, limits=until)
            piece = Piece(start, columns.segment_ids, columns.limits, mask, memories)

            def attend(
                prompts: PromptCache, layer: jax.Array, q, k, v
            ) -> tuple[jax.Array, PromptCache]:
                prompts = prompts.write(layer, before + start, k, v)
                if count == 1 and past is None:
                    return self._attend_causally(columns.segment_ids, q, k, v), prompts
                keys, values = (
                    jnp.moveaxis(x[layer], 1, 2) for x in (prompts.keys, prompts.values)
                )
                attended = attention(
                    q,
                    keys,
                    values,
                    q_segment_ids=columns.segment_ids,
                    kv_segment_ids=prompts.segment_ids,
                    causal=False,
                    limits=until,
                    kernel=self.config.attention,
                )
                return attended, prompts

            probe = None if look is None else partial(look, piece)
            decoded = self._decode(columns, visual, memories, attend, cache=prompts, probe=probe)
            kept = None if conclude is None else conclude(piece, decoded.hidden, decoded.probed)
            place = jnp.clip(last - start, 0, width - 1)
            here = (last - start == place)[:, None, None]
            found = jnp.take_along_axis(decoded.hidden, place[:, None, None], 1)
            return (decoded.cache, jnp.where(here, found, hidden)), kept

        hidden = jnp.zeros((rows, 1, self.config.text.hidden_size), self.config.compute_dtype)
        (prompts, hidden), kept = jax.lax.scan(
            read, (prompts, hidden), (width * jnp.arange(count), columns)
        )
        return hidden, Cache(prompts, memories), kept

    def decode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: Cache,
        samples: SampleCache,
        slot: jax.Array,
    ) -> tuple[jax.Array, SampleCache]:
        """One more text token for each of a prompt's N samples: nothing of the prompt or its images
        is computed again.

        Args:
            tokens, positions: [B, N]; a text token's position is the same in time, row and column.
            segment_ids: [B], the prompt's.
            samples: what these samples wrote before, in the slots below `slot`.

        Returns:
            [B, N, D] after the final norm, and the samples with this token in `slot`.
        """
        segment_ids = jnp.broadcast_to(segment_ids[:, None], tokens.shape)
        columns = _Columns(
            tokens,
            jnp.repeat(positions[:, None], 3, 1),
            segment_ids,
            jnp.full_like(tokens, -1),
            None,
        )
        shared_mask = attention_mask(segment_ids, cache.prompts.segment_ids)
        own_mask = (jnp.arange(samples.slots) < slot)[None, None]

        # What the layers write goes into the cache at the end, in one piece: written by each layer,
        # a loop over layers would carry the cache, and XLA's TPU compiler copies it into another
        # layout for that loop and back, whole, at every token.
        def attend(
            written: TokenKeysValues, layer: jax.Array, q, k, v
        ) -> tuple[jax.Array, TokenKeysValues]:
            shared = cache.prompts.keys[layer], cache.prompts.values[layer]
            own = samples.keys[layer], samples.values[layer]
            new = k.swapaxes(1, 2), v.swapaxes(1, 2)
            attended = shared_attention(
                q, shared, own, new, shared_mask=shared_mask, own_mask=own_mask
            )
            return attended, written.put(layer, *new)

        decoded = self._decode(columns, None, cache.memories, attend, cache=samples.unwritten())
        return decoded.hidden, samples.write(slot, decoded.cache)

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
        return {
            layer: pvm.memorize(visual.embeds, batch.visual_segment_ids)
            for layer, pvm in self.pvm.items()
        }

    def _read(
        self, batch: Batch, *, probe: Callable[[Inner], Any] | None = None
    ) -> tuple[Visual | None, Decoded]:
        visual = self.encode(batch)

        def attend(cache: None, layer: jax.Array, q, k, v) -> tuple[jax.Array, None]:
            return self._attend_causally(batch.segment_ids, q, k, v), cache

        columns = _Columns.of(batch, self.config.text.pvm_visibility)
        return visual, self._decode(
            columns, visual, self.memorize(visual, batch), attend, probe=probe
        )

    def _attend_causally(
        self, segment_ids: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> jax.Array:
        return attention(
            q,
            k,
            v,
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            causal=True,
            kernel=self.config.attention,
        )

    def _decode(
        self,
        columns: _Columns,
        visual: Visual | None,
        memories: dict[str, Memory],
        attend: Attend,
        *,
        cache: Any = None,
        probe: Callable[[Inner], Any] | None = None,
    ) -> Decoded:
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


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> jax.Array:
    model: Qwen3VL = nnx.merge(graphdef, params)
    return model.logits(model.hidden(batch))


def abstract_model(config: ModelConfig) -> Qwen3VL:
    """The model with jax.ShapeDtypeStructs for parameters: shapes, dtypes and logical axes, nothing
    allocated."""
    return Qwen3VL(config, rngs=None)


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

    def fresh() -> nnx.State:
        backbone = abstract_model(model.config)
        adapt(backbone, lora, rngs=nnx.Rngs(seed))
        return nnx.as_pure(nnx.state(backbone, is_adapter))

    shardings = None if mesh is None else param_shardings(nnx.state(adapted, is_adapter), mesh)
    adapters = jax.jit(fresh, out_shardings=shardings)()
    return nnx.merge(nnx.graphdef(adapted), nnx.as_pure(nnx.state(model)), adapters)
