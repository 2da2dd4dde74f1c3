"""Orbax behind one door: whole models, the branch or an adapter alone. (A run's steps:
train/run/checkpoints.py.)

A checkpoint is a directory: `config.json` and the tokenizer's and processor's files as Hugging Face
names them, `params/`, an Orbax pytree of the model's parameters (paths as in model/qwen3_vl.py),
and its checksums. It lives on a local or mounted file system, or in a bucket (gs://, s3://), into
which all processes of a run write by TensorStore's own drivers.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from pvm_jax.checkpoint.arrays import READ_BYTES, STATE, orbax_context
from pvm_jax.checkpoint.checksums import verify_checksums, write_checksums
from pvm_jax.checkpoint.directory import (
    CheckpointError,
    compare_shapes,
    copy_assets,
    reason_of,
    refuse_peft,
    refuse_unfinished,
    write_aside,
    write_config,
)
from pvm_jax.checkpoint.identity import backbone_identity, branch_identity
from pvm_jax.config import LoRAConfig, ModelConfig, TextConfig, dtype_name
from pvm_jax.data.side_files import read_stop_tokens
from pvm_jax.files.bucket import BucketError
from pvm_jax.files.hub import convert_first
from pvm_jax.files.paths import checkpoint_path, on_bucket
from pvm_jax.hf_config import read_config
from pvm_jax.model.lora import is_adapter
from pvm_jax.model.parameters import by_path, part_of
from pvm_jax.model.qwen3_vl import Qwen3VL, abstract_model
from pvm_jax.sharding import param_shardings

PARAMS = "params"
# Keys of config.json that say what is stored alone, and the identity of the backbone that it
# belongs to.
_BRANCH_KEY = "pvm_branch"
_LORA_KEY = "lora_adapter"
_EMBEDDING = "language_model/embed_tokens/weight"


def load(
    path: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: DTypeLike | None = None,
    branch: str | Path | None = None,
    lora: str | Path | None = None,
) -> Qwen3VL:
    """Restores a model straight into its sharding on `mesh`, whatever mesh wrote it.

    Args:
        path: a checkpoint directory (`convert.hf_to_orbax`, `save`).
        mesh: from `make_mesh`; None puts everything on the default device.
        dtype: float32 or bfloat16: of parameters (cast while reading) and activations. None keeps
            every parameter's stored dtype; activations then take the embedding table's.
        branch: another checkpoint to take the PVM branch from, a branch alone (`save_branch`) or a
            whole model.
        lora: an adapter to put beside the weights (`save_lora`).

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        CheckpointError: if it is no checkpoint, an unfinished one or one of other shapes; if the
            branch or the adapter was trained on another backbone.
        ValueError: for another dtype, or a URL (`pvm_jax.files.paths.checkpoint_path`).
    """
    branch, lora = (part and checkpoint_path(part) for part in (branch, lora))  # refused at once
    root = find(path)
    for key, argument, what in (
        (_BRANCH_KEY, "branch", "a PVM branch"),
        (_LORA_KEY, "lora", "a LoRA adapter"),
    ):
        if key in read_config(root):
            raise CheckpointError(
                f"{root} holds {what} alone: load its backbone, with {argument}={str(path)!r}"
            )
    config = ModelConfig.from_hf(root)
    if branch is not None:
        config = config.without_pvm()
    stored = stored_arrays(root)
    if _EMBEDDING not in stored:
        raise CheckpointError(f"{root / PARAMS} has no {_EMBEDDING}: it holds no whole model")
    width = dtype_name(stored[_EMBEDDING].dtype if dtype is None else dtype)
    config = replace(config, dtype=width, param_dtype=width, stop_tokens=read_stop_tokens(root))
    graphdef, params = nnx.split(abstract_model(config))
    model = nnx.merge(graphdef, nnx.State(_restore(root, params, mesh, dtype, stored)))
    model = model if branch is None else load_branch(branch, model, dtype=dtype)
    return model if lora is None else load_lora(lora, model, dtype=dtype)


def save(path: str | Path, model: Qwen3VL, *, assets: str | Path | None = None) -> None:
    """Writes a whole model.

    Args:
        path: absent or empty; it appears only when everything is written.
        assets: a checkpoint or Hugging Face directory whose tokenizer, processor and generation
            files are carried along, and whose config.json keeps its keys that this project does not
            know.

    Raises:
        FileExistsError: if `path` holds something.
        ValueError: if the model has a LoRA adapter.
    """
    if model.config.lora is not None:
        raise ValueError(
            "this model has a LoRA adapter, which is stored apart from its backbone: save_lora; "
            "python -m convert.orbax_to_hf --lora writes the two as one"
        )
    with write_aside(checkpoint_path(path)) as aside:
        if jax.process_index() == 0:
            original = {} if assets is None else dict(read_config(assets))
            original.pop(_BRANCH_KEY, None)
            original.pop(_LORA_KEY, None)
            write_config(aside, model.config, original)
            if assets is not None:
                copy_assets(assets, aside)
        _write(aside, nnx.to_pure_dict(nnx.state(model)))


def save_branch(path: str | Path, model: Qwen3VL) -> None:
    """Writes the PVM branch alone (megabytes), with the identity of the backbone that it belongs
    to.

    Raises:
        FileExistsError: if `path` holds something.
        ValueError: if the model has no branch.
    """
    if not model.config.text.pvm_layers:
        raise ValueError("this model has no PVM branch to save (config.text.pvm_layers is empty)")
    params = nnx.to_pure_dict(nnx.state(model))
    made_for = {"backbone": backbone_identity(params)}
    with write_aside(checkpoint_path(path)) as aside:
        if jax.process_index() == 0:
            write_config(aside, model.config, {_BRANCH_KEY: made_for})
        _write(aside, {"pvm": params["pvm"]})


def load_branch(path: str | Path, model: Qwen3VL, *, dtype: DTypeLike | None = None) -> Qwen3VL:
    """`model` with the PVM branch of another checkpoint, sharded as the model is; its own branch,
    if any, is replaced.

    A branch that was saved alone fits one backbone only. A whole checkpoint's branch is taken as it
    is: the caller decides to leave that checkpoint's backbone.

    Raises:
        FileNotFoundError, CheckpointError: as in `load`.
    """
    root = find(path)
    text, made_for = read_branch(root)
    params = nnx.to_pure_dict(nnx.state(model))
    if made_for is not None:
        check_made_for(root, "backbone", made_for, backbone_identity(params))
    config = model.config.with_branch_of(text)
    graphdef, abstract = nnx.split(abstract_model(config))
    branch = _restore(root, nnx.State({"pvm": abstract["pvm"]}), _mesh_of(params), dtype)
    return nnx.merge(graphdef, nnx.State(params | branch))


def save_lora(path: str | Path, model: Qwen3VL) -> None:
    """Writes the model's LoRA adapter alone, with its config and the identity of what it belongs
    to.

    Raises:
        FileExistsError: if `path` holds something.
        ValueError: if the model has no adapter.
    """
    if model.config.lora is None:
        raise ValueError("this model has no LoRA adapter to save (config.lora is None)")
    params = nnx.state(model)
    made_for = {"backbone": backbone_identity(params), "branch": branch_identity(params)}
    write_lora(path, model.config, nnx.to_pure_dict(nnx.state(model, is_adapter)), made_for)


def write_lora(path: str | Path, config: ModelConfig, adapter: dict, made_for: Mapping) -> None:
    """Writes the tree `adapter` of a model of `config`; `made_for` as `read_lora` gives it.

    Raises:
        FileExistsError: if `path` holds something.
    """
    with write_aside(checkpoint_path(path)) as aside:
        if jax.process_index() == 0:
            lora = {} if config.lora is None else asdict(config.lora)
            write_config(aside, config, {_LORA_KEY: {**lora, "made_for": dict(made_for)}})
        _write(aside, adapter)


def load_lora(path: str | Path, model: Qwen3VL, *, dtype: DTypeLike | None = None) -> Qwen3VL:
    """`model` with the adapter that `save_lora` wrote, sharded as the model is; its own adapter, if
    any, is replaced.

    An adapter fits one backbone only, and if it was trained beside a branch that was not silent,
    that branch only.

    Raises:
        FileNotFoundError, CheckpointError: as in `load`.
    """
    root = find(path)
    lora, made_for = read_lora(root)
    params = nnx.to_pure_dict(nnx.state(model, lambda *leaf: not is_adapter(*leaf)))
    check_made_for(root, "backbone", made_for["backbone"], backbone_identity(params))
    if made_for["branch"] is not None:
        check_made_for(root, "branch", made_for["branch"], branch_identity(params))
    graphdef, adapters, _ = nnx.split(
        abstract_model(replace(model.config, lora=lora)), is_adapter, ...
    )
    stored = _restore(root, adapters, _mesh_of(params), dtype)
    return nnx.merge(graphdef, nnx.State(params), nnx.State(stored))


def read_branch(root: Path) -> tuple[TextConfig, str | None]:
    """The config that says a branch's layers, width and gate, and the identity of the backbone that
    it was trained on (None: the checkpoint is a whole model).

    Raises:
        CheckpointError: if the checkpoint at `root` has no branch.
    """
    text, stored = ModelConfig.from_hf(root).text, read_config(root)
    if not text.pvm_layers or _LORA_KEY in stored:
        raise CheckpointError(f"{root} has no PVM branch (config.json: text_config.pvm_layers)")
    made_for = stored.object(_BRANCH_KEY, None)
    return text, None if made_for is None else made_for.text("backbone")


def read_lora(root: Path) -> tuple[LoRAConfig, dict[str, str | None]]:
    """An adapter's config, and the identities of the "backbone" and the "branch" (None: absent or
    silent) it was trained on.

    Raises:
        CheckpointError: if the checkpoint at `root` is no adapter.
    """
    stored = read_config(root).object(_LORA_KEY, None)
    if stored is None:
        raise CheckpointError(f"{root} is no LoRA adapter (config.json: no {_LORA_KEY})")
    made_for = stored.object("made_for")
    try:
        lora = LoRAConfig(
            rank=stored.integer("rank", least=1),
            alpha=stored.number("alpha"),
            targets=stored.text("targets"),
        )
    except ValueError as error:
        raise CheckpointError(f"{root / 'config.json'}: {error}") from error
    return lora, {
        "backbone": made_for.text("backbone"),
        "branch": made_for.text("branch", None),
    }


def check_made_for(root: Path, part: str, made_for: str | None, identity: str | None) -> None:
    """Raises a CheckpointError unless the model's `part` has the identity that what is stored at
    `root` was made for."""
    if identity != made_for:
        raise CheckpointError(
            f"{root} was trained on the {part} {made_for}, this model's is {identity}: "
            "load it with the checkpoint that it was trained on"
        )


def _mesh_of(params: Mapping[str, Any]) -> jax.sharding.Mesh | None:
    sharding = params["language_model"]["embed_tokens"]["weight"].sharding
    mesh = sharding.mesh if isinstance(sharding, jax.NamedSharding) else None
    assert not isinstance(mesh, jax.sharding.AbstractMesh)
    return mesh


def find(path: str | Path) -> Path:
    """The absolute path of a checkpoint directory.

    Raises:
        FileNotFoundError, CheckpointError: saying what is there instead.
        ValueError: as `checkpoint_path`.
    """
    root = checkpoint_path(path).absolute()
    if on_bucket(root):
        refuse_unfinished(root)
    if (
        (root / "config.json").is_file()
        and (root / PARAMS).is_dir()
        and ocp.is_orbax_checkpoint(str(root / PARAMS))
    ):
        return root
    refuse_unfinished(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no checkpoint directory at {root}{convert_first(path)}")
    refuse_peft(root)
    if any(root.glob("*.safetensors")):
        raise CheckpointError(
            f"{root} is a Hugging Face checkpoint: convert it first, python -m convert.hf_to_orbax"
            f" {path} DST"
        )
    names = ", ".join(sorted(file.name for file in root.iterdir())) or "nothing"
    raise CheckpointError(
        f"{root} is no checkpoint: expected config.json and {PARAMS}/, found {names}"
    )


def stored_arrays(root: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of everything in a checkpoint, by path.

    Raises:
        CheckpointError: if what Orbax wrote about it cannot be read.
    """
    with explaining_damage(root):
        with orbax_context(root / PARAMS):
            metadata: Any = ocp.checkpointables_metadata(str(root / PARAMS)).metadata[STATE]
        if not isinstance(metadata, Mapping):  # Orbax only warns of what it cannot read
            raise ValueError("no metadata of arrays")
        stored = by_path(metadata)
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in stored.items()}


def _restore(
    root: Path,
    params: nnx.State,
    mesh: jax.sharding.Mesh | None,
    dtype: DTypeLike | None,
    stored: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> dict[str, Any]:
    """Reads the tree `params` (abstract, in its `nnx.Param`s); the checkpoint, of which `stored`
    (`stored_arrays`) may be known, may hold parts that are not asked for."""
    verify_checksums(root)
    expected, stored = by_path(params), stored or stored_arrays(root)
    width = None if dtype is None else dtype_name(dtype)
    shapes = {path: tuple(leaf.shape) for path, leaf in stored.items()}
    wanted = {part_of(path) for path in expected}
    found = {path: shape for path, shape in shapes.items() if part_of(path) in wanted}
    compare_shapes(str(root), {path: tuple(leaf.shape) for path, leaf in expected.items()}, found)
    if mesh is None:
        shardings = dict.fromkeys(expected, SingleDeviceSharding(jnp.zeros(()).device))
    else:
        shardings = by_path(param_shardings(params, mesh))
    abstract = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, width or stored[path].dtype, sharding=shardings[path]
        )
        for path, leaf in expected.items()
    }
    context = orbax_context(root / PARAMS, partial=True)
    # What waits in host memory on its way to the devices. Orbax counts whole chunks, and refuses a
    # limit below one request.
    largest = max(
        math.prod(leaf.shape) * stored[path].dtype.itemsize for path, leaf in expected.items()
    )
    context.memory.read_concurrent_bytes = largest + READ_BYTES
    with explaining_damage(root), context:
        asked = {STATE: traverse_util.unflatten_dict(abstract, sep="/")}
        return ocp.load_checkpointables(str(root / PARAMS), asked)[STATE]


@contextmanager
def explaining_damage(root: Path) -> Iterator[None]:
    """Turns whatever the layers below say about the files of the checkpoint at `root` into a
    CheckpointError."""
    try:
        yield
    except (CheckpointError, BucketError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # none of the files' faults
    except Exception as error:
        silent = "The bucket gives no answer (try again), or files" if on_bucket(root) else "Files"
        raise CheckpointError(
            f"{root / PARAMS} cannot be read: {reason_of(error)}. {silent} are damaged or"
            " missing: write or copy this checkpoint again"
        ) from error


def _write(directory: Path, params: dict[str, Any]) -> None:
    try:
        with orbax_context(directory / PARAMS):
            ocp.save(str(directory / PARAMS), params)
        if jax.process_index() == 0:
            write_checksums(directory, PARAMS)
    except Exception as error:  # whatever the layers below say about a disk
        then = "Give" if on_bucket(directory) else "Make room there and give"
        raise CheckpointError(
            f"{directory} could not be written: {reason_of(error)}. {then} the same command again"
        ) from error
