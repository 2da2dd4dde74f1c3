"""What a backbone is given on its way to Hugging Face: another checkpoint's branch, a LoRA
adapter's updates."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from convert.layout import parameter_tree
from convert.store import open_arrays, stored_identity
from pvm_jax.checkpoint.directory import compare_shapes
from pvm_jax.checkpoint.identity import branch_identity
from pvm_jax.checkpoint.store import check_made_for, read_branch, read_lora
from pvm_jax.config import ModelConfig
from pvm_jax.model.parameters import part_of

Arrays = Mapping[str, ts.TensorStore]


class Update(NamedTuple):
    """What is added to a weight: scale * B A, with A [..., rank, in] and B [..., out, rank] in
    float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    def merged(self, weight: np.ndarray, index: int | None, rows: slice) -> np.ndarray:
        """`weight` [rows, in], these rows of layer `index` of a stack (None: of a matrix), with the
        update; added in float32."""
        a, b = (self.a, self.b) if index is None else (self.a[index], self.b[index])
        return (weight.astype(np.float32) + self.scale * (b[rows] @ a)).astype(weight.dtype)


def take_branch(root: Path, config: ModelConfig, arrays: Arrays) -> tuple[ModelConfig, Arrays]:
    """`config` and `arrays` of a checkpoint, with the branch stored at `root` in place of their
    own.

    Raises:
        CheckpointError: if there is no branch, or one that was trained on another backbone.
    """
    text, made_for = read_branch(root)
    backbone = {path: array for path, array in arrays.items() if part_of(path) == "backbone"}
    if made_for is not None:
        check_made_for(root, "backbone", made_for, stored_identity(backbone))
    config = config.with_branch_of(text)
    return config, {**backbone, **part_arrays(root, "branch", config)}


def read_updates(root: Path, config: ModelConfig, arrays: Arrays) -> dict[str, Update]:
    """The updates of the adapter stored at `root` to `arrays` of a checkpoint of `config`, by the
    weight's path.

    Raises:
        CheckpointError: if there is no adapter, or one that was trained on another backbone or
            beside another branch.
    """
    lora, made_for = read_lora(root)
    backbone = {path: array for path, array in arrays.items() if part_of(path) == "backbone"}
    check_made_for(root, "backbone", made_for["backbone"], stored_identity(backbone))
    if made_for["branch"] is not None:
        branch = {
            path: array.read().result()
            for path, array in arrays.items()
            if part_of(path) == "branch"
        }
        check_made_for(root, "branch", made_for["branch"], branch_identity(branch))
    adapters = part_arrays(root, "lora", replace(config, lora=lora))
    read = {path: array.read().result().astype(np.float32) for path, array in adapters.items()}
    linears = {path.removesuffix("/lora/a") for path in read if path.endswith("/a")}
    return {
        f"{path}/weight": Update(read[f"{path}/lora/a"], read[f"{path}/lora/b"], lora.scale)
        for path in linears
    }


def part_arrays(root: Path, part: str, config: ModelConfig) -> Arrays:
    """The arrays of one part of a model of `config`, stored at `root`.

    Raises:
        CheckpointError: if they are not those of that config.
    """
    arrays = {path: array for path, array in open_arrays(root).items() if part_of(path) == part}
    expected = {
        path: leaf.shape for path, leaf in parameter_tree(config).items() if part_of(path) == part
    }
    compare_shapes(
        str(root), expected, {path: tuple(array.shape) for path, array in arrays.items()}
    )
    return arrays
