"""An Orbax checkpoint back to a Hugging Face directory: `python -m convert.orbax_to_hf`."""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts

from convert.layout import EMBEDDING, Slot, layout, parameter_tree
from convert.report import report
from convert.safetensors_files import Planned, write_safetensors
from convert.store import blocks, open_arrays
from pvm_jax.checkpoint import find
from pvm_jax.checkpoint_files import compare_shapes, copy_assets, read_config, write_aside, write_config
from pvm_jax.command_line import command_parser
from pvm_jax.config import ModelConfig

_READ_AHEAD = 4
EXAMPLES = """
examples:
  python -m convert.orbax_to_hf checkpoints/8b ~/models/Qwen3-VL-8B-PVM
  python -m convert.orbax_to_hf checkpoints/8b ~/models/Qwen3-VL-8B-plain --plain --max-shard-size 2GB
The first is for the authors' code, the second for transformers' own Qwen3VLForConditionalGeneration.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` (default: the command line) and converts."""
    parser = command_parser("python -m convert.orbax_to_hf", __doc__, EXAMPLES)
    parser.add_argument("src", type=str, help="checkpoint directory (convert.hf_to_orbax, pvm_jax.save)")
    parser.add_argument("dst", type=str, help="directory to write; absent or empty")
    parser.add_argument("--plain", action="store_true", help="leave the branch and its config keys out")
    parser.add_argument("--max-shard-size", type=str, default="5GB", help="largest safetensors file")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        convert(args.src, args.dst, plain=args.plain, max_shard_size=args.max_shard_size)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def convert(src: str | Path, dst: str | Path, *, plain: bool = False, max_shard_size: str = "5GB") -> None:
    """Writes the Hugging Face directory `dst`; in memory are some 300 MB of it at a time, whatever the size.

    Args:
        plain: leave the branch out.
        max_shard_size: as transformers writes it: "5GB", "500MB".

    Raises:
        FileNotFoundError, CheckpointError: if `src` is no whole checkpoint.
        FileExistsError: if `dst` holds something.
    """
    root = find(src)
    config = ModelConfig.from_hf(root)
    arrays = open_arrays(root)
    found = {path: tuple(array.shape) for path, array in arrays.items()}
    compare_shapes(str(root), {path: leaf.shape for path, leaf in parameter_tree(config).items()}, found)
    if plain:
        config = config.without_pvm()
    slots = layout(config)
    tensors = {name: Planned(arrays[slot.path].dtype.numpy_dtype, slot.shape) for name, slot in slots.items()}
    config = replace(config, param_dtype=tensors[EMBEDDING].dtype.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with write_aside(dst) as aside, report(str(dst), len(tensors), total) as advance:
        copy_assets(root, aside)
        write_config(aside, config, read_config(root))
        write_safetensors(aside, tensors, _contents(arrays, slots, advance), max_shard_size)


def _contents(
    arrays: Mapping[str, ts.TensorStore], slots: Mapping[str, Slot], advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """All tensors in order, in blocks; the next ones are read while one is written."""
    parts = (part for slot in slots.values() for part in _parts(arrays[slot.path], slot.index))
    reading: deque[ts.Future] = deque()
    while True:
        reading.extend(part.read() for part in islice(parts, _READ_AHEAD - len(reading)))
        if not reading:
            return
        content = reading.popleft().result()
        yield content
        advance(content.nbytes)


def _parts(array: ts.TensorStore, index: int | None) -> Iterator[ts.TensorStore]:
    layer = array if index is None else array[index]
    return (layer[block] for block in blocks(layer.shape, layer.dtype.numpy_dtype.itemsize))


if __name__ == "__main__":
    main()
