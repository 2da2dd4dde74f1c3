"""Model configuration: frozen dataclasses whose fields carry Hugging Face's or PEFT's names and
mean what they mean there."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
from jax.typing import DTypeLike

from pvm_jax.files.json_file import is_number
from pvm_jax.hf_config import BRANCH_CHOICES, MODEL_TYPE, SPECIAL_TOKENS, read_sections
from pvm_jax.presets import PRESETS

ARCHITECTURE = "Qwen3VLForConditionalGeneration"
PVM_ARCHITECTURE = "PVMQwen3VLForConditionalGeneration"


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (`Qwen3VLVisionConfig`)."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    depth: int = 27
    num_heads: int = 16
    out_hidden_size: int = 4096
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2

    def __post_init__(self):
        side = self.position_grid_size
        if side * side != self.num_position_embeddings:
            raise ValueError(
                "vision_config.num_position_embeddings must be a square, got"
                f" {self.num_position_embeddings}"
            )
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"vision_config: hidden_size {self.hidden_size} / num_heads {self.num_heads} must"
                " be a multiple of 4"
            )
        taps = self.deepstack_visual_indexes
        if (
            not taps
            or list(taps) != sorted(set(taps))
            or any(not 0 <= tap < self.depth for tap in taps)
        ):
            raise ValueError(
                "vision_config.deepstack_visual_indexes must be some ascending blocks in [0,"
                f" {self.depth}), got {taps}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def position_grid_size(self) -> int:
        """Side of the square table of learned positions."""
        return int(self.num_position_embeddings**0.5)

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch [channels, time, row, column]."""
        return self.frame_dim * self.temporal_patch_size

    @property
    def frame_dim(self) -> int:
        """Numbers in one frame of a patch."""
        return self.in_channels * self.patch_size**2

    @property
    def merge_factor(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True)
class Yarn:
    """Rotary positions beyond the length that was trained (YaRN, arXiv 2309.00071).

    Attributes:
        factor: by which slow frequencies are slowed down.
        original_max_position_embeddings: positions that were trained.
        attention_factor: cosines and sines are multiplied by it.
        beta_fast, beta_slow: turns within the trained length above which a frequency stays as it
            is, and below which it is slowed down in full.
        truncate: whether the borders between the two are whole frequencies.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast {self.beta_fast:g} must be above beta_slow {self.beta_slow:g}"
            )


@dataclass(frozen=True)
class TextConfig:
    """The decoder (`Qwen3VLTextConfig`) and, where `pvm_layers` is not empty, the paper's branch.

    Attributes:
        attention_bias: whether the projections of attention have biases, the branch's too.
        yarn: None: positions turn as they were trained.
        pvm_visibility: which of its conversation's images a text token recalls: "all", as
            published, or "preceding": those before it alone, as the decoder's own attention, for
            conversations whose later turns bring images.
        pvm_gate: what scales the branch's update: "scalar", as published, or "token": the scalar
            times 0 to 2, by what the token's stream holds.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    max_position_embeddings: int = 262144
    attention_bias: bool = False
    yarn: Yarn | None = None
    pvm_layers: tuple[int, ...] = ()
    pvm_hidden_size: int = 512
    pvm_visibility: str = "all"
    pvm_gate: str = "scalar"

    def __post_init__(self):
        for name, above in (("rms_norm_eps", 0), ("rope_theta", 1)):
            value = getattr(self, name)
            if not (is_number(value) and value > above):
                raise ValueError(
                    f"text_config: {name} must be a finite number above {above}, got {value!r}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"text_config: num_attention_heads {self.num_attention_heads} must be a multiple of"
                f" num_key_value_heads {self.num_key_value_heads}"
            )
        if len(self.mrope_section) != 3 or sum(self.mrope_section) * 2 != self.head_dim:
            raise ValueError(
                f"text_config: mrope_section {self.mrope_section} must be three numbers whose sum"
                f" is head_dim / 2 = {self.head_dim / 2:g}"
            )
        layers = self.pvm_layers
        if list(layers) != sorted(set(layers)) or any(
            not 0 <= layer < self.num_hidden_layers for layer in layers
        ):
            raise ValueError(
                f"pvm_layers must be ascending and in [0, {self.num_hidden_layers}), got {layers}"
            )
        if layers and self.pvm_hidden_size % self.head_dim:
            raise ValueError(
                f"pvm_hidden_size {self.pvm_hidden_size} must be a multiple of the decoder's"
                f" head_dim {self.head_dim}"
            )
        for name, (published, other) in BRANCH_CHOICES.items():
            if (value := getattr(self, name)) not in (published, other):
                raise ValueError(f"{name} must be {published!r} or {other!r}, got {value!r}")

    @property
    def pvm_num_heads(self) -> int:
        return self.pvm_hidden_size // self.head_dim

    @property
    def pvm_num_key_value_heads(self) -> int:
        return max(1, self.pvm_num_heads // (self.num_attention_heads // self.num_key_value_heads))

    @property
    def pvm_intermediate_size(self) -> int:
        return int(self.pvm_hidden_size * (self.intermediate_size / self.hidden_size))


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (lora.py).

    Attributes:
        rank: of every update.
        alpha: the update is alpha / rank (x A^T) B^T.
        targets: regular expression for the whole path of a Linear, layers left out:
            "visual/blocks/attn/qkv", "language_model/layers/self_attn/q_proj", ... The default
            names all seven projections of the decoder's layers.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = "language_model/layers/.*_proj"

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if not (is_number(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha must be a finite number above 0, got {self.alpha!r}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"lora.targets {self.targets!r} is no regular expression: {error}"
            ) from error

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class ModelConfig:
    """A whole Qwen3-VL.

    Attributes:
        dtype: activations' dtype inside the model, float32 or bfloat16; its name is kept. Norms,
            softmax and logits are float32 always.
        param_dtype: dtype in which fresh parameters are made; a loaded checkpoint keeps its own.
        remat: what the backward pass of a layer recomputes: "none" (keeps everything), "full"
            (keeps layer inputs alone), "attention" (and what attention's kernels gave; "xla" is
            none) or "dots" (and matrix products).
        attention: attention kernel (`pvm_jax.model.attention_kernels`): None picks by platform,
            else "xla", "splash" or "cudnn".
        lora: the adapters that the model has; None: none.
        stop_tokens: ids that end what the model writes, where its caller names none. `load` takes
            them from the checkpoint's generation_config.json.
    """

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "full"
    attention: str | None = None
    lora: LoRAConfig | None = None
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision_config.out_hidden_size {self.vision.out_hidden_size} must equal "
                f"text_config.hidden_size {self.text.hidden_size}"
            )
        if len(self.vision.deepstack_visual_indexes) > self.text.num_hidden_layers:
            raise ValueError("more deepstack_visual_indexes than decoder layers")
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, dtype_name(getattr(self, name), name))
        if self.remat not in ("none", "full", "attention", "dots"):
            raise ValueError(f"remat must be none, full, attention or dots, got {self.remat!r}")

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The published size `name` ("2b", "4b", "8b" or "32b"), with the branch at its default
        layers and width.

        `overrides` replace ModelConfig's own fields (`dtype="bfloat16"`).

        Raises:
            KeyError: for an unknown size.
        """
        if name not in PRESETS:
            raise KeyError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        preset = PRESETS[name]
        config = cls(
            text=TextConfig(**preset.text),
            vision=VisionConfig(**preset.vision),
            tie_word_embeddings=preset.tie_word_embeddings,
        )
        return replace(config.with_pvm(), **overrides)

    def with_pvm(
        self,
        layers: tuple[int, ...] | None = None,
        hidden_size: int | None = None,
        visibility: str = "all",
        gate: str = "scalar",
    ) -> Self:
        """This config with the branch at `layers` (0-based) and of width `hidden_size`; None takes
        the default by size.

        Defaults for n decoder layers: three layers, evenly spaced. With more hidden units than 2560
        they sit at 2/9, 4/9 and 6/9 of the depth (8B: 8, 16, 24), else right below 1/6, 2/6 and 3/6
        of it (4B: 5, 11, 17): the paper's two published choices, carried to other depths by
        proportion and clipped to distinct layers. The width is the paper's 512, that is four heads
        of 128: four of the decoder's head_dim in general.
        """
        if layers is None:
            layers = _default_pvm_layers(self.text.num_hidden_layers, self.text.hidden_size)
        if hidden_size is None:
            hidden_size = 4 * self.text.head_dim
        branch = {"pvm_layers": tuple(layers), "pvm_hidden_size": hidden_size}
        branch |= {"pvm_visibility": visibility, "pvm_gate": gate}
        return replace(self, text=replace(self.text, **branch))

    def with_branch_of(self, text: TextConfig) -> Self:
        """This config with the branch that `text` describes, and all that it says of it."""
        branch = {name: value for name, value in asdict(text).items() if name.startswith("pvm_")}
        return replace(self, text=replace(self.text, **branch))

    def without_pvm(self) -> Self:
        """The base model's config."""
        return replace(self, text=replace(self.text, pvm_layers=()))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | Path, **overrides: Any) -> Self:
        """Reads a Hugging Face `config.json`: a path (file or its directory) or the parsed mapping.

        `overrides` replace ModelConfig's own fields.

        Raises:
            FileNotFoundError: if there is no config.json.
            ValueError: naming file and key, if the file describes another architecture or a
                feature that this port does not compute, or a value makes no sense.
        """
        sections = read_sections(config)
        text = dict(sections.text)
        try:
            if "yarn" in text:
                text["yarn"] = Yarn(**text["yarn"])
            vision = VisionConfig(**sections.vision)
            read = cls(text=TextConfig(**text), vision=vision, **sections.own)
        except ValueError as error:
            raise ValueError(f"{sections.file}: {error}") from None
        return replace(read, **overrides)

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this model (the authors' PVM keys included where there
        is a branch)."""
        text = {f.name: getattr(self.text, f.name) for f in fields(TextConfig)}
        section, yarn = list(text.pop("mrope_section")), text.pop("yarn")
        rope = {"mrope_interleaved": True, "mrope_section": section}
        text |= {
            "model_type": f"{MODEL_TYPE}_text",
            "hidden_act": "silu",
            "rope_scaling": rope
            | ({"rope_type": "yarn", **asdict(yarn)} if yarn else {"rope_type": "default"}),
            "tie_word_embeddings": self.tie_word_embeddings,
            "pvm_layers": list(text["pvm_layers"]),
        }
        if not self.text.pvm_layers:
            del text["pvm_layers"], text["pvm_hidden_size"]
        for key, (published, _) in BRANCH_CHOICES.items():
            if not self.text.pvm_layers or text[key] == published:
                del text[key]
        vision = {f.name: getattr(self.vision, f.name) for f in fields(VisionConfig)}
        vision |= {
            "model_type": MODEL_TYPE,
            "hidden_act": "gelu_pytorch_tanh",
            "deepstack_visual_indexes": list(self.vision.deepstack_visual_indexes),
        }
        return {
            "architectures": [PVM_ARCHITECTURE if self.text.pvm_layers else ARCHITECTURE],
            "model_type": MODEL_TYPE,
            "dtype": self.param_dtype,
            "tie_word_embeddings": self.tie_word_embeddings,
            **{key: getattr(self, key) for key in SPECIAL_TOKENS},
            "text_config": text,
            "vision_config": vision,
        }


def dtype_name(dtype: DTypeLike, name: str = "dtype") -> str:
    """The name, float32 or bfloat16, of what JAX takes for a dtype. Raises ValueError, which names
    `name`, for any other."""
    try:
        found = jnp.dtype(dtype).name
    except TypeError:
        found = None
    if found not in ("float32", "bfloat16"):
        raise ValueError(f"{name} must be float32 or bfloat16, got {dtype!r}")
    return found


def _default_pvm_layers(depth: int, hidden_size: int) -> tuple[int, ...]:
    if hidden_size > 2560:
        layers = [round(depth * share / 9) for share in (2, 4, 6)]
    else:
        layers = [depth * share // 6 - 1 for share in (1, 2, 3)]
    return tuple(sorted({min(max(layer, 0), depth - 1) for layer in layers}))
