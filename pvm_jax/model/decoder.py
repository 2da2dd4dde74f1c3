"""The decoder: one stack of alike layers, scanned in runs between the layers that differ
(DeepStack, PVM)."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pvm_jax.config import ModelConfig, TextConfig
from pvm_jax.model.attend import Attend
from pvm_jax.model.layers import (
    Embedding,
    Heads,
    Linear,
    RMSNorm,
    Rngs,
    SwiGLU,
    remat,
    stack,
)
from pvm_jax.model.rope import Rotary, mrope, rotate
from pvm_jax.sharding import by_row, constrain

Recall = Callable[[int, jax.Array], jax.Array]
"""(layer, stream [B, S, D]) -> the branch's update [B, S, D]."""


class Inner(NamedTuple):
    """What one layer computes, for a probe to take what it wants of.

    Attributes:
        q: [B, S, N, H] and k: [B, S, K, H], normed and rotated.
        cache: as `attend` left it.
        middle: [B, S, D], the stream after self-attention: what the branch reads, and the FFN after
            its norm.
        ffn: [B, S, D], the FFN's output.
        update: [B, S, D], the branch's; None where it is not added here.
        stream: [B, S, D], the residual stream that leaves the layer (for a probe: the DeepStack
            addition included).
        index: [] int32, the layer; the decoder says which.
        branch: the layer as an int where it has an update, else None.
    """

    q: jax.Array
    k: jax.Array
    cache: Any
    middle: jax.Array
    ffn: jax.Array
    update: jax.Array | None
    stream: jax.Array
    index: jax.Array | None = None
    branch: int | None = None


class Decoded(NamedTuple):
    """`hidden` [B, S, D] after the final norm; the cache as `attend` left it; what the probe took
    of each layer, in order."""

    hidden: jax.Array
    cache: Any
    probed: list[Any]


class Attention(nnx.Module):
    """Causal grouped-query attention with an RMSNorm on each q and k head
    (`Qwen3VLTextAttention`)."""

    def __init__(self, c: TextConfig, *, dtype: str, rngs: Rngs):
        q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

        def linear(width: int, features: int, axes: tuple[str, str]) -> Linear:
            return Linear(width, features, axes, bias=c.attention_bias, dtype=dtype, rngs=rngs)

        self.q_proj = linear(c.hidden_size, q_width, ("heads", "embed"))
        self.k_proj = linear(c.hidden_size, kv_width, ("kv_heads", "embed"))
        self.v_proj = linear(c.hidden_size, kv_width, ("kv_heads", "embed"))
        self.o_proj = linear(q_width, c.hidden_size, ("embed", "heads"))
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.heads = Heads(c.head_dim, c.head_dim)

    def queries_keys_values(
        self, x: jax.Array, rotary: Rotary
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, S, D] -> q [B, S, N, H], k and v [B, S, K, H]; q and k rotated."""
        q = rotate(self.q_norm(self.q_proj.to_heads(x, self.heads)), rotary)
        k = rotate(self.k_norm(self.k_proj.to_heads(x, self.heads)), rotary)
        v = self.v_proj.to_heads(x, self.heads)
        return (
            constrain(q, "batch", "length", "heads", "head_dim"),
            constrain(k, "batch", "length", "kv_heads", "head_dim"),
            constrain(v, "batch", "length", "kv_heads", "head_dim"),
        )


class DecoderLayer(nnx.Module):
    """`Qwen3VLTextDecoderLayer`, with the paper's branch beside the FFN."""

    def __init__(self, c: TextConfig, *, dtype: str, rngs: Rngs):
        width, eps = c.hidden_size, c.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps, dtype=dtype, rngs=rngs)
        self.self_attn = Attention(c, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(width, eps, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(width, c.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rotary: Rotary,
        attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
        recall: Callable[[jax.Array], jax.Array] | None,
    ) -> Inner:
        """h = x + Attn(norm(x)); y = h + FFN(norm(h)) + PVM(h).

        Args:
            x: [B, S, D], the residual stream.
            rotary: of the tokens' positions.
            attend: (q, k, v) -> what the queries attended to, [B, S, N, H], and a cache.
            recall: PVM, [B, S, D] -> [B, S, D]; None: no branch here, or no image to recall.
        """
        attention = self.self_attn
        q, k, v = attention.queries_keys_values(self.input_layernorm(x), rotary)
        attended, cache = attend(q, k, v)
        h = by_row(
            x + attention.o_proj.from_heads(attended, attention.heads), "batch", "length", "hidden"
        )
        update = None if recall is None else recall(h)
        ffn = self.mlp(self.post_attention_layernorm(h))
        y = h + ffn if update is None else h + ffn + update
        return Inner(q, k, cache, h, ffn, update, y)


class _LayerRun(NamedTuple):
    """Consecutive layers that one scan can run."""

    start: int
    stop: int
    deepstack: bool
    pvm: bool


def _runs(config: ModelConfig, taps: int, *, beside: bool) -> list[_LayerRun]:
    """`beside`: a layer with its branch is a run of its own; else it is the last one of a run."""
    layers, special = config.text.num_hidden_layers, config.text.pvm_layers
    edges = sorted(
        {0, taps, layers, *(special if beside else ()), *(layer + 1 for layer in special)}
    )
    return [_LayerRun(a, b, a < taps, b - 1 in special) for a, b in pairwise(edges)]


class _Shared(NamedTuple):
    """What all layers of a forward pass share: the stack's definition and parameters [L, ...], and
    what `Decoder.__call__` was given. `beside`: the branch is added beside the FFN."""

    graphdef: nnx.GraphDef
    params: Any
    rotary: Rotary
    attend: Attend
    place: Callable[[jax.Array], jax.Array] | None
    probe: Callable[[Inner], Any] | None
    beside: bool


def _layer(shared: _Shared, recall: Callable[[jax.Array], jax.Array] | None, number: int) -> Any:
    """The body of a scan over layers: (carry, xs) -> (carry, what the probe took).

    The carry: stream [B, S, D], cache, and what a branch behind the loop reads, [B, S, D]. The xs:
    the layer's number, its parameters (None with a cache) and its DeepStack features. `recall`: the
    branch of the one layer `number`, beside its FFN.
    """

    def layer(carry, xs):
        hidden, cache, _ = carry
        index, params, features = xs
        # Taken out a layer at a time: a slice for each run would be a copy of all weights.
        if cache is not None:
            params = jax.tree.map(
                lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), shared.params
            )
        block: DecoderLayer = nnx.merge(shared.graphdef, params)
        inner = block(hidden, shared.rotary, partial(shared.attend, cache, index), recall)
        hidden = inner.stream
        if features is not None and shared.place is not None:
            hidden = hidden + shared.place(features)
        hidden = by_row(hidden, "batch", "length", "hidden")
        carry = hidden, inner.cache, None if shared.beside else inner.middle
        if shared.probe is None:
            return carry, None
        branch = None if recall is None else number
        return carry, shared.probe(inner._replace(stream=hidden, index=index, branch=branch))

    return layer


class Decoder(nnx.Module):
    """`Qwen3VLTextModel`."""

    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        c, dtype = config.text, config.param_dtype
        self.config = config
        self.embed_tokens = Embedding(
            c.vocab_size, c.hidden_size, ("vocab", "embed"), dtype=dtype, rngs=rngs
        )
        self.layers = stack(
            lambda r: DecoderLayer(c, dtype=dtype, rngs=r), c.num_hidden_layers, rngs
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        hidden: jax.Array,
        positions: jax.Array,
        *,
        attend: Attend,
        cache: Any = None,
        recall: Recall | None = None,
        deepstack: jax.Array | None = None,
        place: Callable[[jax.Array], jax.Array] | None = None,
        probe: Callable[[Inner], Any] | None = None,
    ) -> Decoded:
        """Runs all layers.

        Args:
            hidden: [B, S, D], embeddings with the visual tokens in place.
            positions: [B, 3, S].
            attend: self-attention, with what each layer keeps of it in `cache`, a pytree.
            recall: the branches; None: no images, the update is 0.
            deepstack: [taps, B, V, D]; `place` puts one of them at its row's visual tokens: [B, V,
                D] -> [B, S, D].
            probe: takes of every layer what it returns, a pytree of arrays.
        """
        rotary = mrope(positions, self.config.text)
        graphdef, params = nnx.split(self.layers)
        params = nnx.as_pure(params)
        # Beside the FFN, where the equation has it. With a cache the branch is added behind its
        # run's loop instead: of a loop over one layer the compiler makes straight code with a copy
        # of that layer's weights. Not where the loop's carry is kept for a backward pass, or a
        # probe takes the update.
        beside = cache is None or probe is not None
        shared = _Shared(graphdef, params, rotary, attend, place, probe, beside)
        probed = []
        for run in _runs(self.config, 0 if deepstack is None else len(deepstack), beside=beside):
            layers = slice(run.start, run.stop)
            xs = (
                jnp.arange(run.start, run.stop),
                jax.tree.map(lambda p, layers=layers: p[layers], params) if cache is None else None,
                deepstack[layers] if deepstack is not None and run.deepstack else None,
            )
            carry = hidden, cache, None if beside else hidden
            here = partial(recall, run.start) if beside and run.pvm and recall else None
            layer = remat(_layer(shared, here, run.start), self.config.remat)
            (hidden, cache, middle), taken = jax.lax.scan(layer, carry, xs)
            if middle is not None and run.pvm and recall is not None:
                hidden = hidden + recall(run.stop - 1, middle)
                hidden = constrain(hidden, "batch", "length", "hidden")
            probed += [
                jax.tree.map(lambda x, place=place: x[place], taken)
                for place in range(run.stop - run.start)
            ]
        return Decoded(self.norm(hidden), cache, probed)
