"""Orbax behind one door: whole models, the branch alone, and the steps of a training run.

A checkpoint is a directory: `config.json` and the tokenizer's and processor's files as Hugging Face names them, and
`params/`, an Orbax pytree of the model's parameters (paths as in model.py). It lives on a local or mounted file system.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from pvm_jax.checkpoint_files import (
    CheckpointError,
    aside_of,
    compare_shapes,
    copy_assets,
    read_config,
    write_aside,
    write_config,
)
from pvm_jax.config import ModelConfig
from pvm_jax.model import Qwen3VL, abstract_model
from pvm_jax.sharding import param_shardings

PARAMS = "params"
_BRANCH = "pvm/"
_BRANCH_KEY = "pvm_branch"
_EMBEDDING = "language_model/embed_tokens/weight"
_CHUNK_BYTES = 64 * 2**20
_READ_BYTES = 2**30


def load(
    path: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    branch: str | Path | None = None,
) -> Qwen3VL:
    """Restores a model straight into its sharding on `mesh`, whatever mesh wrote it.

    Args:
        path: a checkpoint directory (`convert.hf_to_orbax`, `save`).
        mesh: from `make_mesh`; None puts everything on the default device.
        dtype: "float32" or "bfloat16": of parameters (cast while reading) and activations. None keeps every parameter's
            stored dtype; activations then take the embedding table's.
        branch: another checkpoint to take the PVM branch from, a branch alone (`save_branch`) or a whole model.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        CheckpointError: if it is no checkpoint, an unfinished one or one of other shapes; if the branch was trained on
            another backbone.
    """
    root = find(path)
    if _BRANCH_KEY in read_config(root):
        raise CheckpointError(f"{root} holds a PVM branch alone: load its backbone, with branch={str(path)!r}")
    config = ModelConfig.from_hf(root)
    if branch is not None:
        config = config.without_pvm()
    width = dtype or jnp.dtype(stored_arrays(root)[_EMBEDDING].dtype).name
    config = replace(config, dtype=width, param_dtype=width)
    graphdef, params = nnx.split(abstract_model(config))
    model = nnx.merge(graphdef, nnx.State(_restore(root, params, mesh, dtype)))
    return model if branch is None else load_branch(branch, model, dtype=dtype)


def save(path: str | Path, model: Qwen3VL, *, assets: str | Path | None = None) -> None:
    """Writes a whole model.

    Args:
        path: absent or empty; it appears only when everything is written.
        assets: a checkpoint or Hugging Face directory whose tokenizer, processor and generation files are carried
            along, and whose config.json keeps its keys that this project does not know.

    Raises:
        FileExistsError: if `path` holds something.
    """
    with write_aside(path) as aside:
        if jax.process_index() == 0:
            original = {} if assets is None else read_config(assets)
            original.pop(_BRANCH_KEY, None)
            write_config(aside, model.config, original)
            if assets is not None:
                copy_assets(assets, aside)
        _write(aside, nnx.to_pure_dict(nnx.state(model)))


def save_branch(path: str | Path, model: Qwen3VL) -> None:
    """Writes the PVM branch alone (megabytes), with the identity of the backbone that it belongs to.

    Raises:
        FileExistsError: if `path` holds something.
        ValueError: if the model has no branch.
    """
    if not model.config.text.pvm_layers:
        raise ValueError("this model has no PVM branch to save (config.text.pvm_layers is empty)")
    params = nnx.to_pure_dict(nnx.state(model))
    identity = backbone_identity(params)
    with write_aside(path) as aside:
        if jax.process_index() == 0:
            write_config(aside, model.config, {_BRANCH_KEY: {"backbone": identity}})
        _write(aside, {"pvm": params["pvm"]})


def load_branch(path: str | Path, model: Qwen3VL, *, dtype: str | None = None) -> Qwen3VL:
    """`model` with the PVM branch of another checkpoint, sharded as the model is; its own branch, if any, is replaced.

    A branch that was saved alone fits one backbone only. A whole checkpoint's branch is taken as it is: the caller
    decides to leave that checkpoint's backbone.

    Raises:
        FileNotFoundError, CheckpointError: as in `load`.
    """
    root = find(path)
    config = ModelConfig.from_hf(root)
    if not config.text.pvm_layers:
        raise CheckpointError(f"{root} has no PVM branch (config.json: text_config.pvm_layers)")
    params = nnx.to_pure_dict(nnx.state(model))
    if made_for := read_config(root).get(_BRANCH_KEY):
        identity = backbone_identity(params)
        if identity != made_for["backbone"]:
            raise CheckpointError(
                f"{root} was trained on the backbone {made_for['backbone']}, this model's is {identity}: "
                "load it with the checkpoint that it was trained on"
            )
    config = model.config.with_pvm(config.text.pvm_layers, config.text.pvm_hidden_size)
    graphdef, abstract = nnx.split(abstract_model(config))
    sharding = params["language_model"]["embed_tokens"]["weight"].sharding
    mesh = sharding.mesh if isinstance(sharding, jax.NamedSharding) else None
    assert not isinstance(mesh, jax.sharding.AbstractMesh)
    branch = _restore(root, nnx.State({"pvm": abstract["pvm"]}), mesh, dtype)
    return nnx.merge(graphdef, nnx.State(params | branch))


def backbone_identity(params: Any) -> str:
    """A short hexadecimal name of all parameters outside the branch.

    It depends on their bfloat16 values alone: not on the sharding, nor on whether they are held in float32 or bfloat16.

    Args:
        params: the parameter tree (`nnx.state(model)`, pure or not, or nested dicts).
    """
    lines = [
        # One tensor after the other: on CPUs a sum needs its terms in memory.
        f"{path} {tuple(leaf.shape)} {int(_checksum(leaf)):08x}"
        for path, leaf in sorted(by_path(params).items())
        if not path.startswith(_BRANCH)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """The sum over x of its bfloat16 bits times (2 * flat index + 1), modulo 2^32."""

    def part_sum(part: jax.Array, start: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(part.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        index = jnp.broadcast_to(start, part.shape)
        for axis in range(part.ndim):
            stride = jnp.uint32(math.prod(part.shape[axis + 1 :]))
            index += jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis) * stride
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    if x.ndim < 3:
        return part_sum(x, jnp.uint32(0))
    starts = jnp.arange(len(x), dtype=jnp.uint32) * jnp.uint32(math.prod(x.shape[1:]))
    return jnp.sum(jax.lax.map(lambda args: part_sum(*args), (x, starts)), dtype=jnp.uint32)


class TrainCheckpoints:
    """The steps of one training run: what is trained and the optimizer's state. The data needs no state: a run's batches are
    numbered, and the step says which one is next.

    Writing goes on in the background; a step that was not finished does not exist. Every step carries the model's
    config and the identity of the backbone that the run started from, and is restored into no other.
    """

    def __init__(
        self,
        directory: str | Path,
        config: ModelConfig,
        backbone: str,
        *,
        keep: int = 2,
        best: str | None = None,
        maximize: bool = False,
    ):
        """Opens `directory`, or makes it.

        Args:
            backbone: `backbone_identity` of the parameters that the run starts from.
            keep: this many newest steps stay.
            best: a metric's name; the step where it was lowest (highest with `maximize`) stays as well.
        """
        policies = ocp.training.preservation_policies
        preserved: list[Any] = [policies.LatestN(keep)]
        if best is not None:
            # BestN keeps the end of the sorted list.
            preserved.append(policies.BestN(get_metric_fn=lambda metrics: metrics[best], reverse=not maximize, n=1))
        preservation: Any = policies.AnyPreservationPolicy(preserved)
        self._best = best
        model = {key: value for key, value in config.to_hf().items() if key != "dtype"}
        self._run = {"model": model, "backbone": backbone}
        self._steps = ocp.training.Checkpointer(
            str(Path(directory).absolute()),
            context=_context(),
            preservation_policy=preservation,
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return [checkpoint.step for checkpoint in self._steps.checkpoints]

    @property
    def latest(self) -> int | None:
        return self.steps[-1] if self.steps else None

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Copies `state` off the devices and returns; the files are written in the background.

        Args:
            state: a pytree of arrays (trained parameters, optimizer state).

        Raises:
            ValueError: if the metric that decides which step is best is not among `metrics`.
        """
        if self._best is not None and self._best not in (metrics or {}):
            raise ValueError(f"step {step}: the metric {self._best!r} decides which step is best, but was not given")
        self._steps.save_checkpointables_async(
            step,
            {"state": state},
            force=True,
            metrics=None if metrics is None else {name: float(value) for name, value in metrics.items()},
            custom_metadata=self._run,
        )

    def restore(self, abstract: Any, step: int | None = None) -> Any:
        """The state of `step` (None: the latest) in the shardings of `abstract`, whatever mesh and processes wrote it.

        Args:
            abstract: the state's tree with `jax.ShapeDtypeStruct(shape, dtype, sharding=...)` leaves.

        Raises:
            FileNotFoundError: if there is no such step.
            CheckpointError: if the step is another model's or another backbone's.
        """
        step = self.latest if step is None else step
        if step is None or step not in self.steps:
            raise FileNotFoundError(f"{self._steps.directory}: no step {step}; there are {self.steps}")
        saved: Any = self._steps.metadata(step).custom_metadata or {}
        for key, mine in self._run.items():
            if saved.get(key) != mine:
                raise CheckpointError(
                    f"{self._steps.directory}: step {step} was saved with another {key}: {saved.get(key)}, now {mine}"
                )
        return self._steps.load_checkpointables(step, {"state": abstract})["state"]

    def close(self) -> None:
        """Waits for the last save."""
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a parameter tree by path, as in "language_model/norm/weight"."""
    pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    leaves, _ = jax.tree.flatten_with_path(pure)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def find(path: str | Path) -> Path:
    """The absolute path of a checkpoint directory.

    Raises:
        FileNotFoundError, CheckpointError: saying what is there instead.
    """
    root = Path(path).absolute()
    if (root / "config.json").is_file() and (root / PARAMS).is_dir() and ocp.is_orbax_checkpoint(str(root / PARAMS)):
        return root
    if aside_of(root).exists():
        raise CheckpointError(f"{root} was never finished: {aside_of(root)} is what an interrupted write left. Run it again")
    if not root.is_dir():
        raise FileNotFoundError(f"no checkpoint directory at {root}")
    if any(root.glob("*.safetensors")):
        raise CheckpointError(
            f"{root} is a Hugging Face checkpoint: convert it first, python -m convert.hf_to_orbax {path} DST"
        )
    names = sorted(file.name for file in root.iterdir())
    raise CheckpointError(f"{root} is no checkpoint: expected config.json and {PARAMS}/, found {', '.join(names) or 'nothing'}")


def stored_arrays(root: Path) -> dict[str, Any]:
    """Shape and dtype of everything in a checkpoint, by path."""
    return by_path(ocp.metadata(str(root / PARAMS)).metadata)


def _restore(root: Path, params: nnx.State, mesh: jax.sharding.Mesh | None, dtype: str | None) -> dict[str, Any]:
    """Reads the tree `params` (abstract, in its `nnx.Param`s); what else the checkpoint holds must be a branch."""
    expected, stored = by_path(params), stored_arrays(root)
    shapes = {path: tuple(leaf.shape) for path, leaf in stored.items()}
    wants_branch = any(path.startswith(_BRANCH) for path in expected)
    wants_backbone = _EMBEDDING in expected
    found = {path: s for path, s in shapes.items() if (wants_branch if path.startswith(_BRANCH) else wants_backbone)}
    compare_shapes(str(root), {path: tuple(leaf.shape) for path, leaf in expected.items()}, found)
    if mesh is None:
        shardings = dict.fromkeys(expected, SingleDeviceSharding(jnp.zeros(()).device))
    else:
        shardings = by_path(param_shardings(params, mesh))
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype or stored[path].dtype, sharding=shardings[path])
        for path, leaf in expected.items()
    }
    context = _context(partial=True)
    # What waits in host memory on its way to the devices. Orbax counts whole chunks, and refuses a limit below one request.
    largest = max(math.prod(leaf.shape) * stored[path].dtype.itemsize for path, leaf in expected.items())
    context.memory.read_concurrent_bytes = largest + _READ_BYTES
    with context:
        return ocp.load(str(root / PARAMS), traverse_util.unflatten_dict(abstract, sep="/"))


def _write(directory: Path, params: dict[str, Any]) -> None:
    with _context():
        ocp.save(str(directory / PARAMS), params)


def _context(*, partial: bool = False) -> ocp.Context:
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = _storage_options
    context.pytree.loading.partial_load = partial
    return context


def _storage_options(key: Any, value: Any) -> Any:
    """Chunks that cut a stack of matrices between its layers first, so that one can be read without the others."""
    options = ocp.options.ArrayOptions.Saving.StorageOptions
    return options(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if jnp.ndim(value) > 2 else ())
