"""A LoRA adapter to the peft library's form, or out of it: `python -m convert.adapter`.

The tensors are the same, a layer each there, stacked here; names are of `convert/layout.py`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from convert.layout import adapter_layout, parameter_tree, sources
from convert.merge import part_arrays
from convert.store import open_arrays, stored_identity
from pvm_jax.checkpoint.directory import PEFT, CheckpointError, compare_shapes, write_aside
from pvm_jax.checkpoint.store import explaining_damage, find, read_lora, write_lora
from pvm_jax.config import LoRAConfig, ModelConfig
from pvm_jax.files.cache import local_copy
from pvm_jax.files.hub import model_directory
from pvm_jax.files.json_file import JsonObject, read_json
from pvm_jax.files.writing import write_whole
from pvm_jax.model.parameters import part_of
from pvm_jax.options import command, parse

_TENSORS = "adapter_model.safetensors"
# Keys of adapter_config.json that change nothing of what is computed, or that are read here. Any
# other key must say that what it is about is off.
_READ = {"peft_type", "r", "lora_alpha", "bias", "init_lora_weights"}
_OF_NO_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "qalora_group_size",
}
_FRESH = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin that leave the base as it is."""
EXAMPLES = """
examples:
  python -m convert.adapter runs/sft_lora/lora exported/lora --base_model Qwen/Qwen3-VL-8B-Instruct
  python -m convert.adapter ~/adapters/mine runs/mine --checkpoint checkpoints/8b
The first is for peft, transformers' load_adapter and vLLM, the second for --lora of this project's
commands.
"""


@dataclass(frozen=True)
class AdapterOptions:
    """What to convert; what `src` holds says which way.

    Attributes:
        src: an adapter that a run or pvm_jax.save_lora wrote, or one of the peft library, by its
            directory or by its name on the Hub (OWNER/NAME, OWNER/NAME@REVISION).
        dst: directory to write; absent or empty.
        checkpoint: of an adapter of peft, the checkpoint (convert.hf_to_orbax) of its base model.
        base_model: of ours, the base model's name in peft's config: a directory or a Hub id.
    """

    src: str
    dst: str
    checkpoint: str | None = None
    base_model: str | None = None


@command
def main(argv: Sequence[str]) -> None:
    """Parses `argv` (default: the process's arguments) and converts."""
    options, _ = parse(
        AdapterOptions,
        argv,
        prog="python -m convert.adapter",
        description=__doc__ or "",
        examples=EXAMPLES,
        by_place=["src", "dst"],
    )
    jax.config.update("jax_platforms", "cpu")
    checkpoint, base_model = options.checkpoint, options.base_model
    src = model_directory(options.src, (PEFT, _TENSORS))
    if (src / PEFT).exists():
        if checkpoint is None or base_model is not None:
            raise ValueError(
                f"{src} is an adapter of peft: name the checkpoint of its base with --checkpoint,"
                " and no --base_model"
            )
        from_peft(src, options.dst, checkpoint)
    else:
        if checkpoint is not None:
            raise ValueError(f"{src} is no adapter of peft (no {PEFT}): leave --checkpoint out")
        to_peft(src, options.dst, base_model=base_model)


def to_peft(src: str | Path, dst: str | Path, *, base_model: str | None = None) -> None:
    """Writes the adapter `src` of this project for the peft library, and for what reads its files.

    It belongs to the backbone that it was trained on, and if it was trained beside a branch, to
    that branch: peft does not check it.

    Args:
        base_model: what adapter_config.json calls the base model.

    Raises:
        FileNotFoundError, CheckpointError: if `src` is no whole adapter.
        FileExistsError: if `dst` holds something.
    """
    root = find(src)
    lora, _ = read_lora(root)
    config = replace(ModelConfig.from_hf(root), lora=lora)
    arrays = part_arrays(root, "lora", config)
    with explaining_damage(root):
        read = {path: array.read().result() for path, array in arrays.items()}
    tensors = {
        name: (read[slot.path] if slot.index is None else read[slot.path][slot.index])
        .astype(np.float32)
        .reshape(slot.shape)
        for name, slot in adapter_layout(config).items()
    }
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _modules(tensors),
        "inference_mode": True,
    }
    with write_aside(dst) as aside:
        write_whole(aside / _TENSORS, save(tensors, {"format": "pt"}))
        (aside / PEFT).write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{dst}: {len(tensors)} tensors")


def from_peft(src: str | Path, dst: str | Path, checkpoint: str | Path) -> None:
    """Writes the adapter `src` of the peft library as one of this project, for `load(checkpoint,
    lora=dst)`.

    Raises:
        FileNotFoundError, CheckpointError: if files or tensors are missing, unexpected or
            misshapen, or `checkpoint` is none.
        FileExistsError: if `dst` holds something.
        OSError: if `src` names an adapter of the Hub (`pvm_jax.files.hub`) that it does not give.
        ValueError: naming file and key, for what is more than LoRA.
    """
    src, root = model_directory(src, (PEFT, _TENSORS)), find(checkpoint)
    rank, alpha = _settings(read_json(src / PEFT))
    found = _tensors(src)
    config = ModelConfig.from_hf(root)
    every = adapter_layout(replace(config, lora=LoRAConfig(rank, alpha, ".*")))
    linears = {every[name].path.rpartition("/lora/")[0] for name in found if name in every}
    targets = "|".join(map(re.escape, sorted(linears)))
    config = replace(config, lora=LoRAConfig(rank, alpha, targets))
    slots = adapter_layout(config) if linears else {}
    compare_shapes(
        str(src),
        {name: slot.shape for name, slot in slots.items()},
        {name: tensor.shape for name, tensor in found.items()},
    )
    if not slots:
        raise CheckpointError(f"{src / _TENSORS} holds no tensor")
    tree = parameter_tree(config)
    adapter = {
        path: np.stack([found[name] for name in source.names])
        .astype(np.float32)
        .reshape(tree[path].shape)
        for path, source in sources(slots).items()
    }
    backbone = {
        path: array for path, array in open_arrays(root).items() if part_of(path) == "backbone"
    }
    made_for = {"backbone": stored_identity(backbone), "branch": None}
    write_lora(dst, config, traverse_util.unflatten_dict(adapter, sep="/"), made_for)
    print(f"{dst}: {len(found)} tensors, lora.targets {targets}")


def _modules(names: Iterable[str]) -> str:
    """The regular expression of exactly the modules that these tensors belong to, layers left
    out."""
    modules = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name) for name in names}
    return "|".join(sorted({re.sub(r"(?<=\.)\d+\\", r"\\d+\\", re.escape(m)) for m in modules}))


def _settings(config: JsonObject) -> tuple[int, float]:
    """Rank and alpha of an adapter_config.json that says nothing but LoRA."""
    if config.text("peft_type") != "LORA":
        config.refuse("peft_type", f"must be 'LORA', got {config['peft_type']!r}")
    if config.text("bias", "none") != "none":
        config.refuse("bias", f"must be 'none', got {config['bias']!r}")
    fresh = config.get("init_lora_weights")
    if fresh not in _FRESH:
        config.refuse("init_lora_weights", f"= {fresh!r} changes the base model: not supported")
    for key in config.keys() - _READ - _OF_NO_EFFECT:
        if config[key]:
            config.refuse(key, f"= {json.dumps(config[key])[:80]} is not supported")
    return config.integer("r", least=1), config.number("lora_alpha")


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    file = directory / _TENSORS
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no {_TENSORS} (pickled weights are not read)")
    try:
        return load_file(local_copy(file))
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error


if __name__ == "__main__":
    main()
