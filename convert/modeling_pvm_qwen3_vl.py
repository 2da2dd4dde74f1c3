# SPDX-License-Identifier: Apache-2.0
"""Persistent Visual Memory (arXiv 2605.00814) on transformers' Qwen3-VL, in PyTorch.

This file lies beside the weights of a checkpoint; its config.json names it. It runs with

    AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True)

Beside the FFN of a few decoder layers stands a branch: gated cross-attention from the text stream
to the row's visual tokens. Its keys and values are projected when an image is read, and stay with
the cache. A row's images are what it read itself: rows may be padded on either side, hold any
number of images, or none; packed rows are refused.

Shapes: B rows, S columns, D width of the stream, V visual tokens of a row, N heads of H for
queries, K for keys.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLTextDecoderLayer,
    Qwen3VLTextMLP,
    Qwen3VLTextModel,
    Qwen3VLTextRMSNorm,
)

_KEPT = "pvm_memory"
"""The attribute of a cache that holds its `KeptMemory`: copied with it, gone with it."""
_CHOICES = {"pvm_visibility": ("all", "preceding"), "pvm_gate": ("scalar", "token")}
"""The published form, which a config.json need not name, and the other."""
_OF_PACKED_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""What a branch remembers of the visual tokens: [B, K, V, H] each."""


@dataclass
class KeptMemory:
    """What a cache keeps of the images that were read.

    Attributes:
        valid: [B, V], False where a row has fewer visual tokens than others.
        layers: each branch's keys and values, by decoder layer.
        columns: of the cache when its last image had been read.
    """

    valid: torch.Tensor
    layers: dict[int, KeysValues]
    columns: int = 0

    def repeated(self, rows: int) -> "KeptMemory":
        """For `rows` rows, each of them that many times, as `Cache.batch_repeat_interleave`."""
        times, rest = divmod(rows, len(self.valid))
        if rest:
            raise ValueError(
                f"the cache remembers the images of {len(self.valid)} rows, the input has {rows}:"
                " rows of a cache may be repeated, not selected"
            )
        if times == 1:
            return self
        layers = {
            layer: (keys.repeat_interleave(times, 0), values.repeat_interleave(times, 0))
            for layer, (keys, values) in self.layers.items()
        }
        return KeptMemory(self.valid.repeat_interleave(times, 0), layers, self.columns)


@dataclass
class Recall:
    """What the branches of one forward pass read. Not a tuple or a dict: what moves a layer's
    arguments between devices would copy it, and `present` be lost.

    Attributes:
        embeds: [B, V, D], the visual tokens that this pass brings; None: none.
        visible: [B, 1, S, V], the visual tokens, earlier ones first, that each column may recall.
            One column stands for all where they may recall the same.
        silent: [B, S, 1], True where a column recalls nothing.
        past: what was remembered before, by layer.
        present: `past` and what this pass brings, filled in by the layers.
    """

    embeds: torch.Tensor | None
    visible: torch.Tensor
    silent: torch.Tensor
    past: dict[int, KeysValues]
    present: dict[int, KeysValues] = field(default_factory=dict)


class PVMCrossAttention(nn.Module):
    """Grouped-query attention from the text stream to the visual tokens: no positions, no causal
    order."""

    def __init__(self, config: Any):
        super().__init__()
        width, self.head_dim, bias = config.pvm_hidden_size, config.head_dim, config.attention_bias
        heads = width // self.head_dim
        groups = config.num_attention_heads // config.num_key_value_heads
        key_heads = max(1, heads // groups)
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, key_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, key_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=bias)
        self.q_norm = Qwen3VLTextRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3VLTextRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, N * H] -> [B, S, N, H]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def memorize(self, compact: torch.Tensor) -> KeysValues:
        """Visual tokens in the branch's width, [B, V, width]."""
        keys = self.k_norm(self._heads(self.k_proj(compact)))
        return keys.transpose(1, 2), self._heads(self.v_proj(compact)).transpose(1, 2)

    def forward(
        self, query: torch.Tensor, memory: KeysValues, visible: torch.Tensor
    ) -> torch.Tensor:
        """[B, S, width] -> [B, S, width]; `visible` [B, 1, S, V]."""
        queries = self.q_norm(self._heads(self.q_proj(query))).transpose(1, 2)
        # A column that sees nothing sees all here, lest it be NaN: what it gets is silenced.
        mask = visible | ~visible.any(-1, keepdim=True)
        recalled = scaled_dot_product_attention(
            queries, *memory, attn_mask=mask, scale=self.head_dim**-0.5, enable_gqa=True
        )
        return self.o_proj(recalled.transpose(1, 2).flatten(2))


class PVMBlock(nn.Module):
    """The branch of one decoder layer. The names of its parameters are the checkpoint's."""

    def __init__(self, config: Any):
        super().__init__()
        width, self.eps = config.pvm_hidden_size, config.rms_norm_eps
        ffn = SimpleNamespace(
            hidden_size=width,
            intermediate_size=int(width * (config.intermediate_size / config.hidden_size)),
            hidden_act=config.hidden_act,
        )
        self.text_reducer = nn.Linear(config.hidden_size, width, bias=False)
        self.vision_reducer = nn.Linear(config.hidden_size, width, bias=False)
        self.input_norm = Qwen3VLTextRMSNorm(width, eps=self.eps)
        self.cross_attn = PVMCrossAttention(config)
        self.post_attn_norm = Qwen3VLTextRMSNorm(width, eps=self.eps)
        self.mlp = Qwen3VLTextMLP(ffn)
        self.output_expander = nn.Linear(width, config.hidden_size, bias=False)
        self.gate_alpha = nn.Parameter(torch.zeros(1))
        by_token = getattr(config, "pvm_gate", "scalar") == "token"
        self.gate_token = nn.Parameter(torch.zeros(config.hidden_size)) if by_token else None

    def memory(self, recall: Recall, layer: int, device: torch.device) -> KeysValues:
        """What this branch, of decoder layer `layer`, remembers; an image is projected once."""
        memory = recall.past.get(layer)
        if recall.embeds is not None:
            new = self.cross_attn.memorize(self.vision_reducer(recall.embeds.to(device)))
            both = () if memory is None else zip(memory, new, strict=True)
            memory = tuple(torch.cat(pair, 2) for pair in both) or new
        recall.present[layer] = memory
        return memory

    def forward(self, stream: torch.Tensor, recall: Recall, layer: int) -> torch.Tensor:
        """The update [B, S, D] that joins the FFN's output: exactly 0 at visual tokens, and where
        there is none to recall. `stream` [B, S, D] is what the FFN's norm reads."""
        query = self.input_norm(self.text_reducer(stream))
        memory = self.memory(recall, layer, stream.device)
        recalled = self.cross_attn(query, memory, recall.visible.to(stream.device))
        recalled = recalled + self.mlp(self.post_attn_norm(recalled))
        update = _rms_normalized(self.output_expander(recalled), self.eps)
        if self.gate_token is not None:
            gate = _rms_normalized(stream, self.eps) @ self.gate_token.to(stream.dtype)
            update = 2 * gate.sigmoid()[..., None] * update
        update = self.gate_alpha.to(stream.dtype) * update
        return update.masked_fill(recall.silent.to(stream.device), 0)


class PVMDecoderLayer(Qwen3VLTextDecoderLayer):
    """h = x + Attn(norm(x)); h + FFN(norm(h)) + PVM(h)."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.pvm_block = PVMBlock(config)

    def forward(
        self, hidden_states: torch.Tensor, *, recall: Recall | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; `kwargs` are the attention's."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        stream = hidden_states + attended
        output = stream + self.mlp(self.post_attention_layernorm(stream))
        return output if recall is None else output + self.pvm_block(stream, recall, self.layer_idx)


class PVMQwen3VLTextModel(Qwen3VLTextModel):
    """The decoder, with a branch at `config.pvm_layers`."""

    def __init__(self, config: Any):
        _check_branch(config)
        super().__init__(config)
        for layer in config.pvm_layers:
            self.layers[layer] = PVMDecoderLayer(config, layer)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PVMBlock):
            init.zeros_(module.gate_alpha)
            if module.gate_token is not None:
                init.zeros_(module.gate_token)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        visual_pos_masks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of `Qwen3VLTextModel`: `inputs_embeds` [B, S, D] hold the visual tokens at
        `visual_pos_masks` [B, S]."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        kept = _kept_memory(_cache_among(kwargs.values()), len(inputs_embeds))
        if visual_pos_masks is not None:
            visual_pos_masks = visual_pos_masks.to(inputs_embeds.device)
            _refuse_packed_rows(attention_mask, position_ids, kwargs)
        valid, recall = self._recall(inputs_embeds, visual_pos_masks, kept)
        outputs = super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            visual_pos_masks=visual_pos_masks,
            recall=recall,
            **kwargs,
        )
        cache = _cache_among(outputs if isinstance(outputs, tuple) else outputs.values())
        if cache is not None and recall is not None:
            columns = kept.columns if recall.embeds is None else int(cache.get_seq_length())
            setattr(cache, _KEPT, KeptMemory(valid, recall.present, columns))
        return outputs

    def _recall(
        self, embeds: torch.Tensor, is_visual: torch.Tensor | None, kept: KeptMemory | None
    ) -> tuple[torch.Tensor | None, Recall | None]:
        """(valid [B, V], what a pass over `embeds` [B, S, D] recalls) of the visual tokens that are
        `kept` and those of the pass, at `is_visual` [B, S]; None: there are none."""
        new, valid, past = None, None, {}
        if kept is not None:
            valid, past = kept.valid.to(embeds.device), kept.layers
        before = 0 if valid is None else valid.shape[1]
        if is_visual is not None and is_visual.any():
            new, here = _by_row(embeds, is_visual)
            valid = here if valid is None else torch.cat([valid, here], 1)
        if valid is None:
            return None, None
        visible = valid[:, None]
        if new is not None and getattr(self.config, "pvm_visibility", "all") == "preceding":
            # A row's visual tokens stand in the order of their columns.
            limits = before + is_visual.cumsum(1)[..., None]
            visible = visible & (torch.arange(valid.shape[1], device=valid.device) < limits)
        silent = ~visible.any(-1)
        silent = silent if is_visual is None else silent | is_visual
        return valid, Recall(new, visible[:, None], silent[..., None], past)


class PVMQwen3VLModel(Qwen3VLModel):
    """Vision tower and decoder with its branches."""

    # What compiles a whole graph, or runs attention of its own without the cache, would lose the
    # memory.
    _can_compile_fullgraph = False
    _supports_attention_backend = False

    def __init__(self, config: Any):
        super().__init__(config)
        self.language_model = PVMQwen3VLTextModel._from_config(config.text_config)
        self.post_init()


class PVMQwen3VLForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """Qwen3-VL with Persistent Visual Memory; used as `Qwen3VLForConditionalGeneration` is."""

    _can_compile_fullgraph = False
    _supports_attention_backend = False

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = PVMQwen3VLModel(config)
        self.post_init()

    def _prefill(self, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        chunk = generation_config.prefill_chunk_size
        if chunk is not None and getattr(self.config.text_config, "pvm_visibility", "all") == "all":
            raise ValueError(
                f"prefill_chunk_size {chunk}: a prompt is read as a whole, as its text recalls the"
                " images behind it too (pvm_visibility is 'all')"
            )
        return super()._prefill(input_ids, generation_config, *args, **kwargs)


def _rms_normalized(x: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., D] -> [..., D]: x over its root mean square, which is computed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _by_row(embeds: torch.Tensor, is_visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The visual tokens [B, V, D] among `embeds` [B, S, D], in order, and which of them there are
    [B, V]."""
    counts = is_visual.sum(1)
    rows, columns = is_visual.nonzero(as_tuple=True)
    place = is_visual.cumsum(1)[rows, columns] - 1
    found = embeds.new_zeros(len(embeds), int(counts.max()), embeds.shape[2])
    found[rows, place] = embeds[rows, columns]
    return found, torch.arange(found.shape[1], device=embeds.device) < counts[:, None]


def _cache_among(values: Iterable[Any]) -> Cache | None:
    """The cache, by its type: its name is another in other versions."""
    return next((value for value in values if isinstance(value, Cache)), None)


def _kept_memory(cache: Cache | None, rows: int) -> KeptMemory | None:
    """What `cache` remembers, for that many rows; an empty one remembers nothing."""
    kept = getattr(cache, _KEPT, None)
    columns = 0 if kept is None else int(cache.get_seq_length())
    if not columns:
        return None
    if columns < kept.columns:
        raise ValueError(
            f"the cache was cropped to {columns} tokens, its last image was read with the first"
            f" {kept.columns}: what it shows cannot be forgotten; read the conversation anew"
        )
    return kept.repeated(rows)


def _refuse_packed_rows(
    attention_mask: Any, position_ids: torch.Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raises ValueError where several conversations may stand in a row: each would recall the
    others' images."""
    cache = _cache_among(kwargs.values())
    packed = any(kwargs.get(key) is not None for key in _OF_PACKED_ROWS)
    if cache is None and attention_mask is not None:
        packed |= getattr(attention_mask, "ndim", None) != 2
    elif cache is None and position_ids is not None:
        # [B, S], or four of them, whose first are the text's own; three are of images alone.
        text = position_ids[0] if position_ids.ndim == 3 else position_ids
        if position_ids.ndim == 2 or len(position_ids) == 4:
            packed |= bool((text.diff(dim=-1) != 1).any())
    if packed:
        raise ValueError(
            "packed rows, or an attention mask of one's own: which images belong to a token is not"
            " known; give one conversation a row and an attention_mask [rows, tokens]"
        )


def _check_branch(config: Any) -> None:
    """Raises ValueError for a branch that this file does not know."""
    found = {key for key in config.to_dict() if key.startswith("pvm_")}
    if unknown := sorted(found - {"pvm_layers", "pvm_hidden_size", *_CHOICES}):
        raise ValueError(f"text_config: {', '.join(unknown)}: this branch is not known here")
    layers, width = getattr(config, "pvm_layers", None), getattr(config, "pvm_hidden_size", None)
    if not layers or list(layers) != sorted({*layers} & {*range(config.num_hidden_layers)}):
        raise ValueError(
            f"text_config.pvm_layers must be some ascending layers in [0,"
            f" {config.num_hidden_layers}), got {layers}"
        )
    if not width or width % config.head_dim:
        raise ValueError(
            f"text_config.pvm_hidden_size must be a multiple of head_dim {config.head_dim}, got"
            f" {width}"
        )
    for key, (published, other) in _CHOICES.items():
        if (value := getattr(config, key, published)) not in (published, other):
            raise ValueError(f"text_config.{key} must be {published!r} or {other!r}, got {value!r}")
