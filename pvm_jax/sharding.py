"""The mesh and the ONE table that says which mesh axis splits which logical axis."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Parameters name their axes in layers.py's `axes=`, activations in `constrain`. "embed" is the
# parameters' model dimension, "hidden" the activations': the latter stays whole because the batch
# already uses the fsdp axis. "loss_rows" and "loss_vocab": a training step's logits, see
# train/step/loss.py.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "samples": (),
    "length": (),
    "hidden": (),
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "loss_rows": ("data",),
    "loss_vocab": ("fsdp", "tensor"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "norm": (),
    "rank": (),
}


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """A mesh over `devices` (default: all there are) with the axes (data, fsdp, tensor); one size
    may be -1: "what is left".

    Raises:
        ValueError: if the sizes do not multiply to the number of devices.
    """
    sizes = mesh_sizes(
        data, fsdp, tensor, devices=jax.device_count() if devices is None else len(devices)
    )
    # Auto axes: with the default (Explicit) an embedding gather is refused.
    return jax.make_mesh(
        sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def mesh_sizes(
    data: int, fsdp: int, tensor: int, *, devices: int, name: str = "mesh"
) -> tuple[int, ...]:
    """The sizes of a mesh's axes, a single -1 resolved to what the others leave of `devices`.

    Raises:
        ValueError: naming the mesh, if they do not multiply to `devices`.
    """
    sizes = [data, fsdp, tensor]
    rest = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and rest:
        sizes[sizes.index(-1)] = devices // rest
    if math.prod(sizes) != devices or min(sizes) < 1:
        raise ValueError(
            f"{name} data={data} fsdp={fsdp} tensor={tensor} does not cover the {devices} devices"
            " exactly"
        )
    return tuple(sizes)


def tensor_mesh(tensor: int) -> jax.sharding.Mesh | None:
    """The mesh of the first `tensor` devices that share one model, to generate with; None for a
    single device.

    Raises:
        ValueError: if there are fewer.
    """
    if not 1 <= tensor <= jax.device_count():
        raise ValueError(
            f"tensor must be 1 to {jax.device_count()}, as many as there are devices, got {tensor}"
        )
    return (
        None
        if tensor == 1
        else make_mesh(data=1, fsdp=1, tensor=tensor, devices=jax.devices()[:tensor])
    )


def platform() -> str:
    """Of the devices that what is traced will run on, which need not be here: cpu, gpu, tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """As JAX names these devices' kind: "TPU v6 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def computing_on(mesh: jax.sharding.Mesh | None) -> AbstractContextManager[Any]:
    """What computes inside is split over `mesh`; None: over nothing."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def partition_spec(names: tuple[str, ...], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Mesh axes for an array whose axes are called `names`; an axis that a mesh axis does not
    divide stays whole."""
    spec = []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(axis for axis in RULES[name] if mesh.shape.get(axis, 1) > 1)
        divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
        spec.append(axes if axes and divides else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Pins an activation to the table's sharding on the mesh in context (`jax.set_mesh`); without a
    mesh, `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, mesh))


def by_row(x: jax.Array, *names: str) -> jax.Array:
    """`constrain` of x [..., S, D]; on a TPU, D lies side by side in memory, the gradient's too.

    Left to itself, the TPU's compiler lays a residual stream out with tokens side by side, and the
    products of a backward pass that write it so take up to twice as long. A decoding step (S = 1)
    is left to itself: its order is the better one there.
    """
    x, mesh = constrain(x, *names), jax.sharding.get_abstract_mesh()
    if platform() != "tpu" or x.shape[-2] == 1:
        return x
    pinned = partial(with_layout_constraint, layouts=Layout(tuple(range(x.ndim))))
    if mesh.empty:
        return pinned(x)
    # The partitioner does not know the constraint: it would gather x as a whole.
    spec = partition_spec(names, x.shape, mesh)
    return jax.shard_map(pinned, in_specs=spec, out_specs=spec)(x)


def gathered(weight: jax.Array, *names: str) -> jax.Array:
    """A parameter as a product wants it: whole along the model dimension, which fsdp splits at
    rest. Its gradient goes back to where the parameter lies.

    Left to itself, the TPU's compiler multiplies by one part after the other, and adds the whole
    result up in memory as many times.
    """
    whole = ("hidden" if name == "embed" else name for name in names)
    return constrain(constrain(weight, *names), *whole)


def is_whole(name: str, size: int) -> bool:
    """Whether a product finds an axis that the table calls `name` whole on every device: a
    parameter's model dimension is by then, see `gathered`."""
    mesh, whole = jax.sharding.get_abstract_mesh(), PartitionSpec(None)
    return mesh.empty or name == "embed" or partition_spec((name,), (size,), mesh) == whole


def divides(name: str, size: int) -> bool:
    """Whether the mesh in context, if any, can split an axis of this size as the table says of
    `name`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or size % math.prod(mesh.shape[axis] for axis in RULES[name]) == 0


def param_shardings(params: nnx.State, mesh: jax.sharding.Mesh) -> nnx.State:
    """The sharding of every parameter: a pure tree like `params` with NamedShardings as leaves.

    `params` comes from `nnx.split` (arrays or ShapeDtypeStructs, still wrapped in `nnx.Param`: the
    wrapper names the axes). A mesh with Explicit axes (`jax.make_mesh`'s default) counts as one
    with Auto axes.
    """
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        mesh = jax.sharding.Mesh(
            mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names)
        )

    def sharding(param: nnx.Variable) -> NamedSharding:
        value = param.get_raw_value()
        names = param.get_metadata("axes")
        names = ("layers",) * (value.ndim - len(names)) + names
        return NamedSharding(mesh, partition_spec(names, value.shape, mesh))

    return nnx.as_pure(
        jax.tree.map(
            lambda p: p.replace(sharding(p)), params, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
    )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Splits the leading axis (the batch) over data and fsdp; every leaf of a `Batch` takes it."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def local_rows(sharding: NamedSharding, count: int) -> list[int]:
    """Those of a batch's `count` rows that this process's devices hold under `batch_sharding`,
    ascending.

    They need not be neighbours: on a TPU slice the mesh orders devices by the wires between them,
    not by their hosts.
    """
    indices = sharding.addressable_devices_indices_map((count,)).values()
    return sorted({row for index in indices if index for row in range(count)[index[0]]})


def place_rows(rows: Any, sharding: NamedSharding, count: int) -> Any:
    """The global batch of `count` rows, a pytree of arrays, of which `rows` (NumPy) holds this
    process's `local_rows`."""
    place = {row: place for place, row in enumerate(local_rows(sharding, count))}

    def global_array(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            return x[place[start] : place[start] + stop - start]

        return jax.make_array_from_callback((count, *x.shape[1:]), sharding, part)

    return jax.tree.map(global_array, rows)
