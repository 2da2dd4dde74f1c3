"""A Qwen3-VL of Hugging Face, plain or with the PVM branch, to Orbax: `python -m
convert.hf_to_orbax`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from convert.layout import (
    BRANCH,
    EMBEDDING,
    HEAD,
    Slot,
    TensorSource,
    layout,
    parameter_tree,
    sources,
)
from convert.report import report
from convert.safetensors_files import DTYPES, KEPT, SafetensorsReader, cast, files_named
from convert.store import BlockWriter, blocks, create
from pvm_jax.checkpoint.directory import (
    CheckpointError,
    compare_shapes,
    copy_assets,
    refuse_peft,
    refuse_taken,
    refuse_unfinished,
    write_aside,
    write_config,
)
from pvm_jax.config import ModelConfig, TextConfig, dtype_name
from pvm_jax.data.tokenizer import has_tokenizer, read_tokenizer
from pvm_jax.files.hub import SETTINGS, fetch, named_on_hub
from pvm_jax.files.paths import any_path, checkpoint_path
from pvm_jax.files.writing import check_writable
from pvm_jax.hf_config import read_config
from pvm_jax.model.memory import PersistentVisualMemory
from pvm_jax.model.parameters import by_path
from pvm_jax.options import command, parse

_BUFFERS = ("I64", "BOOL")
"""Types of what is stored beside weights, and of no quantised ones."""
EXAMPLES = """
examples:
  python -m convert.hf_to_orbax Qwen/Qwen3-VL-8B-Instruct checkpoints/8b
  python -m convert.hf_to_orbax Qwen/Qwen3-VL-8B-Instruct@main checkpoints/8b
  python -m convert.hf_to_orbax ~/models/Qwen3-VL-4B-Instruct checkpoints/4b \\
      --pvm_layers 5 11 17 --pvm_hidden_size 512
  python -m convert.hf_to_orbax ~/models/Qwen3-VL-2B-Instruct checkpoints/2b \\
      --dtype float32 --pvm_visibility preceding
  python -m convert.hf_to_orbax ~/models/Qwen3-VL-8B-Instruct checkpoints/8b_plain --plain
A plain Qwen3-VL gets a fresh branch, at layers that its size decides; until trained, it changes
nothing (gate 0). Without a branch (--plain) it is what LoRA and full fine-tuning start from.
"""


@dataclass(frozen=True)
class ImportOptions:
    """What to convert, and the branch that it gets.

    Attributes:
        src: Hugging Face directory (config.json and safetensors), or a model of the Hub:
            OWNER/NAME, OWNER/NAME@REVISION.
        dst: directory to write; absent or empty.
        pvm_layers: decoder layers that get a branch; by default by size.
        pvm_hidden_size: the branch's width; by default four heads.
        pvm_visibility: images that a text token recalls: "all", as published, or those before it,
            "preceding"; by default the checkpoint's, else all.
        pvm_gate: of a fresh branch: "scalar", as published, or "token", which opens further for
            some tokens than for others; by default scalar.
        plain: without a branch: add none, leave the checkpoint's out.
        dtype: cast every tensor; by default as stored.
        seed: of a fresh branch.
    """

    src: str
    dst: str
    pvm_layers: list[int] | None = None
    pvm_hidden_size: int | None = None
    pvm_visibility: Literal["all", "preceding"] | None = None
    pvm_gate: Literal["scalar", "token"] | None = None
    plain: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    seed: int = 0


@command
def main(argv: Sequence[str]) -> None:
    """Parses `argv` (default: the process's arguments) and converts."""
    options, _ = parse(
        ImportOptions,
        argv,
        prog="python -m convert.hf_to_orbax",
        description=__doc__ or "",
        examples=EXAMPLES,
        by_place=["src", "dst"],
    )
    jax.config.update("jax_platforms", "cpu")
    convert(**vars(options))


def convert(
    src: str | Path,
    dst: str | Path,
    pvm_layers: Sequence[int] | None = None,
    pvm_hidden_size: int | None = None,
    pvm_visibility: str | None = None,
    pvm_gate: str | None = None,
    *,
    plain: bool = False,
    dtype: DTypeLike | None = None,
    seed: int = 0,
) -> None:
    """Writes the checkpoint `dst`; in memory are some 300 MB of it at a time, whatever the size.

    Args:
        src: a directory, or a text that names a model of the Hub (`pvm_jax.files.hub`).
        pvm_layers, pvm_hidden_size, pvm_visibility, pvm_gate: as `TextConfig` has them; None takes
            the checkpoint's, for a fresh branch the default (of the first two: by size).
        plain: without a branch: none is added, the checkpoint's own is left out.
        dtype: float32 or bfloat16, of everything; None keeps each tensor's own.
        seed: of a fresh branch.

    Raises:
        FileNotFoundError: if config.json or weights are missing.
        OSError: if the Hub does not give them, or `dst` holds something (FileExistsError).
        CheckpointError: if tensors are missing, unexpected, misshapen or of another type, or a file
            is broken; for a quantised checkpoint and an adapter of peft.
        ValueError: if the branch is both described and left out; naming file and key, for a
            config.json that is not computed here and a tokenizer that is not this model's.
    """
    dst, on_hub = checkpoint_path(dst), named_on_hub(src)
    refuse_taken(dst)
    src = fetch(on_hub, SETTINGS) if on_hub else any_path(src)
    _refuse_other(src)
    original = read_config(src)
    asked = _Branch(tuple(pvm_layers or ()) or None, pvm_hidden_size, pvm_visibility, pvm_gate)
    config, bare = _config(original, asked, plain=plain)
    if has_tokenizer(src):
        read_tokenizer(src)
    if on_hub:  # gigabytes: after all that can be refused without them
        check_writable(dst.parent)
        fetch(on_hub, files_named(src), beside=src)
    reader = SafetensorsReader(src)
    if plain:
        reader.tensors = {n: tensor for n, tensor in reader.tensors.items() if BRANCH not in n}
    fresh = bare and not any(BRANCH in name for name in reader.tensors)
    slots = layout(config)
    wanted = {name: slot for name, slot in slots.items() if not (fresh and BRANCH in name)}
    with reader:
        _check(src, reader, wanted, tied=config.tie_word_embeddings, one_dtype=dtype is not None)
        width = None if dtype is None else dtype_name(dtype)
        config = replace(config, param_dtype=width or DTYPES[reader.tensors[EMBEDDING].dtype])
        stored = sources(wanted)
        arrays = _arrays(reader, config, stored, width)
        branch = _fresh_branch(config, seed) if fresh else {}
        total = sum(prod(array.shape) * array.dtype.itemsize for array in arrays.values())
        with write_aside(dst) as aside, report(str(dst), len(slots), total) as advance:
            copy_assets(src, aside)
            write_config(aside, config, original)
            _write(aside, arrays, reader, stored=stored, branch=branch, advance=advance)


def _refuse_other(src: Path) -> None:
    """Raises a CheckpointError for half an export, and for an adapter of peft."""
    refuse_unfinished(src)
    refuse_peft(src)


class _Branch(NamedTuple):
    """The branch that was asked for; None: whatever there is."""

    layers: tuple[int, ...] | None
    hidden_size: int | None
    visibility: str | None
    gate: str | None


def _config(original: Mapping, branch: _Branch, *, plain: bool) -> tuple[ModelConfig, bool]:
    """The model's config, and whether its branch is to be made where there are no tensors of
    one."""
    if plain:
        if any(branch):
            raise ValueError(
                "--plain makes no branch: leave --pvm_layers, --pvm_hidden_size, --pvm_visibility"
                " and --pvm_gate out"
            )
        return ModelConfig.from_hf(original).without_pvm(), False
    config = ModelConfig.from_hf(original)
    own = config.text
    for flag, given, found in (
        ("--pvm_layers", branch.layers, own.pvm_layers),
        ("--pvm_hidden_size", branch.hidden_size, own.pvm_hidden_size),
        ("--pvm_gate", branch.gate, own.pvm_gate),
    ):
        if own.pvm_layers and given not in (None, found):
            raise ValueError(
                f"{flag} {given}: the checkpoint brings its own branch, with {found} (config.json);"
                " leave it out"
            )
    if not own.pvm_layers:
        config = config.with_pvm(
            branch.layers, branch.hidden_size, gate=branch.gate or TextConfig.pvm_gate
        )
    if branch.visibility is not None:
        config = replace(config, text=replace(config.text, pvm_visibility=branch.visibility))
    return config, not own.pvm_layers


def _check(
    src: Path, reader: SafetensorsReader, wanted: Mapping[str, Slot], *, tied: bool, one_dtype: bool
) -> None:
    """Raises a CheckpointError unless the files hold exactly the wanted tensors."""
    found = {name: stored.shape for name, stored in reader.tensors.items()}
    if (
        tied
        and HEAD in found
        and found[HEAD] == wanted[EMBEDDING].shape
        and _same(reader, HEAD, EMBEDDING)
    ):
        del found[HEAD]
    by_type: dict[str, list[str]] = {}
    for name in found:
        by_type.setdefault(reader.tensors[name].dtype, []).append(name)
    problems = []
    for dtype, names in by_type.items():
        if dtype not in DTYPES and not (dtype in _BUFFERS and wanted.keys().isdisjoint(names)):
            raise CheckpointError(
                f"{src} is quantised: {len(names)} tensors are {dtype} ({names[0]}): convert the"
                f" one in {', '.join(DTYPES)} that it was made of"
            )
        if dtype in DTYPES.keys() - KEPT.keys() and not one_dtype:
            problems.append(
                f"wrong type: {len(names)} tensors are {dtype} ({names[0]}): choose what they"
                " become with --dtype"
            )
    for path, source in sources(wanted).items():
        types = {reader.tensors[name].dtype for name in source.names if name in reader.tensors}
        if len(types) > 1 and types <= KEPT.keys() and not one_dtype:
            problems.append(
                f"mixed types: the layers of {path} are {' and '.join(sorted(types))}: choose one"
                " with --dtype"
            )
    compare_shapes(
        str(src), {name: slot.shape for name, slot in wanted.items()}, found, also=problems
    )


def _same(reader: SafetensorsReader, one: str, other: str) -> bool:
    """Whether two tensors of the same shape hold the same bytes."""
    a, b = reader.tensors[one], reader.tensors[other]
    if a.dtype != b.dtype or a.dtype not in DTYPES:
        return False
    pieces = zip(
        _pieces(reader, one, DTYPES[a.dtype]), _pieces(reader, other, DTYPES[b.dtype]), strict=True
    )
    return all(np.array_equal(left.view(np.uint8), right.view(np.uint8)) for left, right in pieces)


def _pieces(reader: SafetensorsReader, name: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    array = jax.ShapeDtypeStruct(reader.tensors[name].shape, dtype)
    return (content for _, content in _read(reader, TensorSource((name,), stacked=False), array))


def _arrays(
    reader: SafetensorsReader,
    config: ModelConfig,
    stored: Mapping[str, TensorSource],
    width: str | None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """What is written, by path: all of it in `width`; None: in the type that it is stored in, or
    where it is made here, in `config.param_dtype`."""

    def dtype(source: TensorSource | None) -> np.dtype | str:
        if width is not None or source is None:
            return width or config.param_dtype
        return DTYPES[reader.tensors[source.names[0]].dtype]

    return {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype(stored.get(path)))
        for path, leaf in parameter_tree(config).items()
    }


def _write(
    directory: Path,
    arrays: Mapping[str, jax.ShapeDtypeStruct],
    reader: SafetensorsReader,
    *,
    stored: Mapping[str, TensorSource],
    branch: Mapping[str, np.ndarray],
    advance: Callable[[int], None],
) -> None:
    """Writes the arrays out of a fresh `branch`, or out of what is `stored`."""
    with BlockWriter() as writer:
        for path, store in create(directory, arrays).items():
            contents = (
                _fresh(branch[path])
                if path in branch
                else _read(reader, stored[path], arrays[path])
            )
            for block, content in contents:
                writer.write(store[block], content)
                advance(content.nbytes)


def _read(
    reader: SafetensorsReader, source: TensorSource, array: jax.ShapeDtypeStruct
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The blocks of an array and their contents, cast to its dtype; each content lives until the
    next is asked for."""
    buffer = np.empty(0, array.dtype)
    for block in blocks(array.shape, array.dtype.itemsize):
        shape = [part.stop - part.start for part in block]
        buffer = buffer if buffer.size >= prod(shape) else np.empty(prod(shape), array.dtype)
        content = buffer[: prod(shape)].reshape(shape)
        if source.stacked:
            parts = zip(source.names[block[0]], content, strict=True)
            start = block[1].start * prod(array.shape[2:])
        else:
            parts = [(source.names[0], content)]
            start = block[0].start * prod(array.shape[1:])
        for name, part in parts:
            dtype = DTYPES[reader.tensors[name].dtype]
            if dtype == array.dtype:
                reader.read(name, start, part)
            else:
                raw = np.empty(part.shape, dtype)
                reader.read(name, start, raw)
                part[...] = cast(raw, array.dtype, name)
        yield block, content


def _fresh_branch(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """The parameters of an untrained branch, by path."""
    keys = jax.random.split(jax.random.key(seed), len(config.text.pvm_layers))
    branch = {
        str(layer): _fresh_memory(config, key)
        for layer, key in zip(config.text.pvm_layers, keys, strict=True)
    }
    return {path: np.asarray(leaf) for path, leaf in by_path({"pvm": branch}).items()}


@partial(jax.jit, static_argnames="config")
def _fresh_memory(config: ModelConfig, key: jax.Array) -> nnx.State:
    """The parameters of one layer's branch."""
    return nnx.as_pure(nnx.state(PersistentVisualMemory(config, rngs=nnx.Rngs(key))))


def _fresh(content: np.ndarray) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    for block in blocks(content.shape, content.dtype.itemsize):
        yield block, content[block]


if __name__ == "__main__":
    main()
