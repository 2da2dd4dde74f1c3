"""A model's parameters by path, and the part of the model that each belongs to."""

from typing import Any, Literal

import jax
from flax import nnx

from pvm_jax.model.lora import is_adapter


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a parameter tree by path, as in "language_model/norm/weight"."""
    pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    leaves, _ = jax.tree.flatten_with_path(pure)
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path: tuple) -> str:
    """A JAX key path as by_path writes it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def part_of(path: str) -> Literal["backbone", "branch", "lora"]:
    """The part of a model that the parameter at `path` belongs to; each can be stored alone."""
    keys = path.split("/")
    if is_adapter(tuple(keys)):
        return "lora"
    return "branch" if keys[0] == "pvm" else "backbone"
