"""An Orbax checkpoint back to a Hugging Face directory: `python -m convert.orbax_to_hf`."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from convert.card import write_card
from convert.layout import EMBEDDING, Slot, layout, parameter_tree
from convert.merge import Arrays, Update, read_updates, take_branch
from convert.report import report
from convert.safetensors_files import Planned, write_safetensors
from convert.store import blocks, open_arrays
from pvm_jax.checkpoint.directory import (
    compare_shapes,
    copy_assets,
    refuse_taken,
    write_aside,
    write_config,
)
from pvm_jax.checkpoint.store import explaining_damage, find
from pvm_jax.config import ModelConfig
from pvm_jax.files.hub import check_name, make_model, push
from pvm_jax.files.paths import any_path, local_path
from pvm_jax.files.writing import copy_file
from pvm_jax.hf_config import read_config
from pvm_jax.options import command, parse

_READ_AHEAD = 4
CODE = Path(__file__).with_name("modeling_pvm_qwen3_vl.py")
"""The branch in PyTorch, for transformers: copied, never imported here."""
AUTO_MAP = {
    "AutoModel": f"{CODE.stem}.PVMQwen3VLModel",
    "AutoModelForImageTextToText": f"{CODE.stem}.PVMQwen3VLForConditionalGeneration",
    "AutoModelForMultimodalLM": f"{CODE.stem}.PVMQwen3VLForConditionalGeneration",
}
"""The key of config.json by which transformers finds the classes of that file."""
EXAMPLES = """
examples:
  python -m convert.orbax_to_hf checkpoints/8b ~/models/Qwen3-VL-8B-PVM
  python -m convert.orbax_to_hf checkpoints/8b ~/models/Qwen3-VL-8B-PVM --branch runs/sft/branch
  python -m convert.orbax_to_hf checkpoints/8b ~/models/Qwen3-VL-8B-plain \\
      --plain --max_shard_size 2GB
  python -m convert.orbax_to_hf checkpoints/8b ~/models/Qwen3-VL-8B-LoRA \\
      --plain --lora runs/sft_lora/lora
  python -m convert.orbax_to_hf checkpoints/8b exported/8b --branch runs/sft/branch \\
      --push_to_hub OWNER/NAME --private --base_model Qwen/Qwen3-VL-8B-Instruct \\
      --report out/report
The first two are for the authors' code, and for transformers with trust_remote_code=True; the
next two for transformers' own Qwen3VLForConditionalGeneration.
"""


@dataclass(frozen=True)
class ExportOptions:
    """What to convert, and what to put in or leave out.

    Attributes:
        src: checkpoint directory (convert.hf_to_orbax, pvm_jax.save).
        dst: directory to write; absent or empty.
        plain: leave the branch and its config keys out.
        branch: take the PVM branch from this checkpoint.
        lora: add this LoRA adapter's updates to the weights.
        max_shard_size: largest safetensors file.
        push_to_hub: send `dst` to this model of the Hub, OWNER/NAME, with a card.
        private: make it a private one, if it is to be made.
        base_model: for the card, the name of the model that this was made of.
        report: for the card, the folder that `measure` wrote.
    """

    src: str
    dst: str
    plain: bool = False
    branch: str | None = None
    lora: str | None = None
    max_shard_size: str = "5GB"
    push_to_hub: str | None = None
    private: bool = False
    base_model: str | None = None
    report: str | None = None

    def __post_init__(self):
        if self.push_to_hub is None and (self.private or self.base_model or self.report):
            raise ValueError("--private, --base_model and --report are for --push_to_hub")
        if self.base_model is not None:
            check_name("--base_model", self.base_model)


@command
def main(argv: Sequence[str]) -> None:
    """Parses `argv` (default: the process's arguments) and converts."""
    options, _ = parse(
        ExportOptions,
        argv,
        prog="python -m convert.orbax_to_hf",
        description=__doc__ or "",
        examples=EXAMPLES,
        by_place=["src", "dst"],
    )
    jax.config.update("jax_platforms", "cpu")
    how = {
        name: getattr(options, name)
        for name in ("src", "dst", "plain", "branch", "lora", "max_shard_size")
    }
    if options.push_to_hub is None:
        convert(**how)
    else:
        _convert_and_push(options, how)


def _convert_and_push(options: ExportOptions, how: dict[str, Any]) -> None:
    """All that can be refused is refused before a tensor is read: what the card tells, `dst`, and
    the right to write to the Hub."""
    root, dst = find(options.src), local_path(options.dst)
    refuse_taken(dst)
    config = ModelConfig.from_hf(root)
    if options.branch is not None:
        config = config.with_branch_of(ModelConfig.from_hf(find(options.branch)).text)
    if options.plain:
        config = config.without_pvm()
    parts = {"branch": options.branch, "lora": options.lora, "checkpoint": options.src}
    card = write_card(
        (options.push_to_hub or "").rpartition("/")[2],
        config,
        base_model=options.base_model,
        parts={part: find(path) for part, path in parts.items() if path is not None},
        report=None if options.report is None else any_path(options.report),
    )
    model = make_model(options.push_to_hub or "", private=options.private)
    convert(**how)
    (dst / "README.md").write_text(card)
    push(dst, model, message="Export by pvm-jax")
    print(f"pushed to {model.to_url()}")


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    plain: bool = False,
    branch: str | Path | None = None,
    lora: str | Path | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Writes the Hugging Face directory `dst`; in memory are some 300 MB of it at a time, whatever
    the size.

    Args:
        plain: leave the branch out.
        branch: a checkpoint to take the branch from, instead of the one in `src`.
        lora: an adapter; W + alpha / rank B A is computed in float32, and stored in the dtype of W.
        max_shard_size: as transformers writes it: "5GB", "500MB".

    Raises:
        FileNotFoundError, CheckpointError: if `src` is no whole checkpoint, or not what branch or
            adapter were trained on.
        FileExistsError: if `dst` holds something.
        ValueError: if a branch is given and to be left out.
    """
    if plain and branch is not None:
        raise ValueError(
            f"--plain leaves the branch out that --branch {branch} puts in: give one of them"
        )
    root, dst = find(src), any_path(dst)
    config = ModelConfig.from_hf(root)
    arrays: Arrays = open_arrays(root)
    found = {path: tuple(array.shape) for path, array in arrays.items()}
    compare_shapes(
        str(root), {path: leaf.shape for path, leaf in parameter_tree(config).items()}, found
    )
    if branch is not None:
        config, arrays = take_branch(find(branch), config, arrays)
    updates = {} if lora is None else read_updates(find(lora), config, arrays)
    if plain:
        config = config.without_pvm()
    slots = layout(config)
    tensors = {
        name: Planned(arrays[slot.path].dtype.numpy_dtype, slot.shape)
        for name, slot in slots.items()
    }
    config = replace(config, param_dtype=tensors[EMBEDDING].dtype.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with write_aside(dst) as aside, report(str(dst), len(tensors), total) as advance:
        copy_assets(root, aside)
        _write_config_and_code(aside, config, read_config(root))
        write_safetensors(
            aside, tensors, _contents(root, arrays, slots, updates, advance), max_shard_size
        )


def _write_config_and_code(
    directory: Path, config: ModelConfig, original: Mapping[str, Any]
) -> None:
    """config.json, and where there is a branch the code that runs it. Other code that the
    `original` names is not carried along: nor is its name."""
    kept = {key: value for key, value in original.items() if key != "auto_map"}
    if config.text.pvm_layers:
        kept["auto_map"] = AUTO_MAP
        copy_file(CODE, directory / CODE.name)
    write_config(directory, config, kept)


def _contents(
    root: Path,
    arrays: Arrays,
    slots: Mapping[str, Slot],
    updates: Mapping[str, Update],
    advance: Callable[[int], None],
) -> Iterator[np.ndarray]:
    """All tensors in order, in blocks; the next ones are read while one is written."""
    parts = (
        (slot, block) for slot in slots.values() for block in _blocks(arrays[slot.path], slot.index)
    )
    reading: deque[tuple[Slot, slice, ts.Future]] = deque()
    while True:
        for slot, block in islice(parts, _READ_AHEAD - len(reading)):
            reading.append((slot, block[0], _layer(arrays[slot.path], slot.index)[block].read()))
        if not reading:
            return
        slot, rows, future = reading.popleft()
        with explaining_damage(root):
            content = future.result()
        yield (
            updates[slot.path].merged(content, slot.index, rows)
            if slot.path in updates
            else content
        )
        advance(content.nbytes)


def _layer(array: ts.TensorStore, index: int | None) -> ts.TensorStore:
    return array if index is None else array[index]


def _blocks(array: ts.TensorStore, index: int | None) -> Iterator[tuple[slice, ...]]:
    return blocks(_layer(array, index).shape, array.dtype.numpy_dtype.itemsize)


if __name__ == "__main__":
    main()
