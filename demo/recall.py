"""Whether the branch recalls: its attention on the cell that the answer is about, and what another image's memory changes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from demo.evaluate import Settings, encode, value_columns
from demo.task import COLUMNS, Example
from pvm_jax.attention import attention
from pvm_jax.batch import Batch, bucket_size
from pvm_jax.decoder import DecoderLayer
from pvm_jax.layers import merge_heads, split_heads
from pvm_jax.memory import Memory
from pvm_jax.model import Qwen3VL
from pvm_jax.processing import Processor
from pvm_jax.rope import mrope_angles
from pvm_jax.vision import Visual


def attention_on_cell(
    model: Qwen3VL, processor: Processor, examples: Sequence[Example], settings: Settings
) -> dict[str, list[float]]:
    """By layer of the branch and head: the mean share of attention on the asked cell, where its value is to be said.

    Chance is one over the number of cells. All examples have grids of one size, `settings.size`.
    """
    encoded = encode(examples, processor)
    length = bucket_size(max(len(example.input_ids) for example in encoded))
    patches = bucket_size(max(example.num_patches for example in encoded))
    batch = Batch.from_rows([[example] for example in encoded], model.config, length=length, patches=patches)
    columns = np.stack([value_columns(example, settings.lines) for example in encoded]) - 1
    cells = np.array([[_visual_token(cell, settings.size) for cell, _, _ in example.lines] for example in examples])
    graphdef, params = nnx.split(model)
    shares = _shares(graphdef, nnx.as_pure(params), batch, columns, cells)
    return {layer: np.asarray(share).tolist() for layer, share in shares.items()}


class Misled(Qwen3VL):
    """The model with one thing wrong: each row's branch reads the memory of the row before. The decoder sees its own image."""

    def memorize(self, visual: Visual | None, batch: Batch) -> dict[str, Memory]:
        return jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), super().memorize(visual, batch))


def mislead(model: Qwen3VL) -> Qwen3VL:
    """`model` as a Misled: if the branch recalls the image, it answers worse."""
    abstract = nnx.eval_shape(lambda: Misled(model.config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(abstract), nnx.state(model))


def _visual_token(cell: str, size: int) -> int:
    """Visual tokens are in reading order, one a cell."""
    return (int(cell[1]) - 1) * size + COLUMNS.index(cell[0])


@partial(jax.jit, static_argnames="graphdef")
def _shares(graphdef: nnx.GraphDef, params: Any, batch: Batch, columns: jax.Array, cells: jax.Array) -> dict[str, jax.Array]:
    """By layer, [heads]: attention from `columns` [B, N] to the visual token `cells` [B, N], averaged over both."""
    model: Qwen3VL = nnx.merge(graphdef, params)
    visual, trace = model.encode(batch), model.trace(batch)
    memories, shares = model.memorize(visual, batch), {}
    for layer, memory in memories.items():
        branch = model.pvm[layer].cross_attn
        stream = stream_at_branch(model, int(layer), trace.streams[int(layer) - 1], batch)
        stream = jnp.take_along_axis(stream, columns[..., None], axis=1)
        queries = model.pvm[layer].input_norm(model.pvm[layer].text_reducer(stream))
        queries = branch.q_norm(split_heads(branch.q_proj(queries), branch.head_dim))
        keys = jnp.repeat(memory.keys, queries.shape[2] // memory.keys.shape[2], axis=2)
        scores = jnp.einsum("bqnh,bvnh->bnqv", queries, keys) / np.sqrt(branch.head_dim)
        weights = jax.nn.softmax(jnp.where(memory.segment_ids[:, None, None] > 0, scores, -jnp.inf))
        asked = jnp.take_along_axis(weights, cells[:, None, :, None], axis=-1)
        shares[layer] = asked.mean((0, 2, 3))
    return shares


def stream_at_branch(model: Qwen3VL, layer: int, before: jax.Array, batch: Batch) -> jax.Array:
    """What the branch of `layer` reads: the stream [B, S, D] after self-attention, from the one that enters the layer."""
    assert layer > 0, "the stream that enters layer 0 is not in a trace"
    decoder, text = model.language_model, model.config.text
    graphdef, params = nnx.split(decoder.layers)
    block: DecoderLayer = nnx.merge(graphdef, jax.tree.map(lambda p: p[layer], nnx.as_pure(params)))
    angles = mrope_angles(batch.positions, text.head_dim, text.rope_theta, text.mrope_section)
    q, k, v = block.self_attn.heads(block.input_layernorm(before), angles)
    ids = batch.segment_ids
    attended = attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, causal=True, kernel=model.config.attention)
    return before + block.self_attn.o_proj(merge_heads(attended))
