"""Where TensorStore finds a checkpoint's arrays, and how they are stored in s3://.

For s3:// Orbax has no driver of arrays (google/orbax#359), but writes all else: what is in a
checkpoint, and that it is whole. There TensorStore's own driver is given each array, as a directory
in the format zarr3, in chunks that carry their checksums; every process writes its shards.
"""

import asyncio
import os
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from functools import cache
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from pvm_jax.files.paths import any_path, on_bucket
from pvm_jax.model.parameters import by_path

STATE = "state"
"""What Orbax calls the tree that is a checkpoint."""
CHUNK_BYTES = 64 * 2**20
READ_BYTES = 2**30
"""About as much waits in host memory on its way to the devices."""
_ATTEMPTS = 6
"""Of a request that fails: they take a minute."""
KEPT = {"fill_missing_data_reads": False}
"""Of a spec to read by: what is missing is not zeros."""
_saves = count()


def on_s3(path: Path) -> bool:
    """Whether `any_path` gave a path of s3://."""
    return on_bucket(path) and str(path).startswith("s3://")


def stored_apart(checkpoint: Path) -> bool:
    """Whether each array of what Orbax keeps at `checkpoint` is, or will be, a directory of its
    own: in s3://, and where such a checkpoint was copied to."""
    state = checkpoint / STATE
    return on_s3(checkpoint) or (state.exists() and not (state / "_METADATA").exists())


def in_database(state: Path) -> bool:
    """Whether all arrays in Orbax's directory `state` are together in a database (OCDBT), as it and
    the conversion write them."""
    return (state / "manifest.ocdbt").exists()


@cache
def _connection() -> ts.Context:
    # The default looks for files too, and says of each that is not there that this is an error.
    credentials = "environment" if os.environ.get("AWS_ACCESS_KEY_ID") else "default"
    retries = {"max_retries": _ATTEMPTS}
    return ts.Context({"aws_credentials": {"type": credentials}, "s3_request_retries": retries})


def new_context(cache_bytes: int = 0) -> ts.Context:
    """For arrays that are opened together: with one each, every array would open a database of its
    own, and they would outdate each other's commits."""
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}}, _connection())


def location(state: Path, path: str, *, database: bool) -> dict[str, Any]:
    """TensorStore's spec of the array `path` in Orbax's directory `state`, `in_database` or
    apart."""
    name = f"{path.replace('/', '.')}/"
    if not database:
        return {"driver": "zarr3", "kvstore": _place(state, name)}
    kvstore = {"driver": "ocdbt", "base": _place(state), "path": name}
    return {"driver": "zarr3", "kvstore": kvstore}


def _place(directory: Path, name: str = "") -> dict[str, Any]:
    if not on_bucket(directory):
        return {"driver": "file", "path": f"{directory.absolute()}/{name}"}
    scheme, _, place = str(directory).partition("://")
    bucket, _, key = place.partition("/")
    kvstore = {"driver": "gcs", "bucket": bucket, "path": f"{key}/{name}"}
    if scheme == "gs":
        return kvstore
    named = {  # as AWS's own programs are told; TensorStore does not read these
        "driver": "s3",
        "endpoint": _first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "aws_region": _first("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    return kvstore | {key: value for key, value in named.items() if value}


def _first(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


class ArraysApart(ocp.handlers.CheckpointableHandler):
    """By which Orbax writes and reads a tree of arrays that are `stored_apart`."""

    async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
        """Copies this process's shards of `checkpointable` off the devices; what is returned writes
        them."""
        arrays = by_path(checkpointable)
        for array in arrays.values():
            array.copy_to_host_async()
        shards = {path: list(_shards(array)) for path, array in arrays.items()}
        specs = {path: _new(array) for path, array in arrays.items()}
        return self._write(directory, specs, shards, number=next(_saves))

    async def _write(self, directory: Any, specs: dict, shards: dict, *, number: int) -> None:
        place = any_path(str(await directory.await_creation()))
        context = new_context()
        await asyncio.gather(
            *(
                _write(location(place, path, database=False) | specs[path], parts, context)
                for path, parts in shards.items()
            )
        )
        # Process 0 says that the checkpoint is whole when all have written.
        await ocp.multihost.sync_global_processes(f"wrote {place}", operation_id=f"arrays{number}")

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        """What returns the arrays of the tree `abstract_checkpointable` (`jax.ShapeDtypeStruct`s
        with a sharding)."""
        place = any_path(str(directory))
        if abstract_checkpointable is None:
            raise ValueError(f"{place}: nothing says which of its arrays are to be read")
        return self._load(place, abstract_checkpointable)

    async def _load(self, place: Path, abstract: Any) -> Any:
        stores = await _opened(place, by_path(abstract))
        arrays = []
        for group in _groups(by_path(abstract)):
            arrays += await asyncio.gather(
                *(_read(f"{place}/{path}", stores[path], leaf) for path, leaf in group.items())
            )
        return jax.tree.unflatten(jax.tree.structure(abstract), arrays)

    async def metadata(self, directory: Any) -> dict[str, Any]:
        """Shape and dtype of every array, in a tree of dicts."""
        place = any_path(str(directory))
        stores = await _opened(place, await _names(place))
        return traverse_util.unflatten_dict(
            {
                path: jax.ShapeDtypeStruct(store.shape, store.dtype.numpy_dtype)
                for path, store in stores.items()
            },
            sep="/",
        )

    def is_handleable(self, checkpointable: Any) -> bool:
        return all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(checkpointable))

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        leaves = jax.tree.leaves(abstract_checkpointable)
        return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def _shards(array: jax.Array) -> Iterator[tuple[Any, np.ndarray]]:
    """Index and content of what this process is to write of `array`."""
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, np.asarray(shard.data)


def new_array(shape: tuple[int, ...], dtype: np.dtype, chunk: tuple[int, ...]) -> dict[str, Any]:
    """What TensorStore is told, beside its `location`, of an array that is to be written."""
    return {
        "metadata": {
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            # Not compressed: weights hardly get smaller. The checksum tells damage from weights.
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        },
        # What is not stored is taken for damage, zeros too.
        "store_data_equal_to_fill_value": True,
    }


def _new(array: jax.Array) -> dict[str, Any]:
    """`new_array`, no chunk of which is of two processes."""
    shard = array.sharding.shard_shape(array.shape)
    chunk = _chunk_shape(array.shape, shard, array.dtype.itemsize)
    return new_array(array.shape, array.dtype, chunk)


def _chunk_shape(shape: tuple[int, ...], shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Parts of a `shard` of `shape`, cut along its first axes, of about CHUNK_BYTES; equal ones
    along an axis that is split, so that none is of two shards."""
    chunk = [max(size, 1) for size in shard]
    for axis, size in enumerate(chunk):
        parts = min(-(-prod(chunk) * itemsize // CHUNK_BYTES), size)
        if shard[axis] != shape[axis]:
            # An axis with no such number of parts stays whole.
            parts = next((n for n in range(parts, 2 * parts) if size % n == 0), 1)
        chunk[axis] = -(-size // parts)
    return tuple(chunk)


async def _write(spec: dict, parts: list[tuple[Any, np.ndarray]], context: ts.Context) -> None:
    if jax.process_index() == 0:
        await ts.open(spec, create=True, context=context)
    store = await ts.open(spec, open=True, assume_metadata=True, context=context)
    await asyncio.gather(*(store[index].write(content) for index, content in parts))


async def _opened(state: Path, paths: Iterable[str]) -> dict[str, ts.TensorStore]:
    """The arrays `paths`, open for reading."""
    database, context = in_database(state), new_context()
    specs = {path: location(state, path, database=database) | KEPT for path in paths}
    stores = [ts.open(spec, read=True, open=True, context=context) for spec in specs.values()]
    return dict(zip(specs, await asyncio.gather(*stores), strict=True))


async def _names(state: Path) -> list[str]:
    """The arrays that are stored in `state`."""
    place = _place(state)
    if in_database(state):
        place = {"driver": "ocdbt", "base": place}
    store, end = await ts.KvStore.open(place, context=new_context()), "/zarr.json"
    keys = [key.decode() for key in await store.list()]
    return [key.removesuffix(end).replace(".", "/") for key in keys if key.endswith(end)]


def _groups(abstract: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`abstract` in parts that are read at the same time: of about READ_BYTES."""
    group, size = {}, 0
    for path, leaf in abstract.items():
        group[path] = leaf
        size += prod(leaf.shape) * leaf.dtype.itemsize
        if size >= READ_BYTES:
            yield group
            group, size = {}, 0
    yield group


async def _read(name: str, store: ts.TensorStore, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if store.shape != leaf.shape:
        raise ValueError(f"{name} has the shape {store.shape}, expected {leaf.shape}")
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    kept = {str(index): index for index in places.values()}  # replicas are read once
    contents = await asyncio.gather(*(store[index].read() for index in kept.values()))
    parts = dict(zip(kept, contents, strict=True))
    shards = [
        jax.device_put(parts[str(index)].astype(leaf.dtype, copy=False), device)
        for device, index in places.items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def orbax_context(place: Path, *, partial: bool = False) -> ocp.Context:
    """How this project stores the arrays of what Orbax keeps at `place`, or of all below it;
    `partial` reads a part of what was stored."""
    context = ocp.Context()
    if stored_apart(place):
        registry = ocp.handlers.local_registry(include_global_registry=False)
        orbax_own = f"{ocp.handlers.PyTreeHandler.__module__}.PyTreeHandler"  # what it wrote too
        registry.add(ArraysApart, checkpointable_name=STATE, secondary_typestrs=[orbax_own])
        registry.add(ocp.handlers.JsonHandler)  # of metrics
        context.checkpointables.registry = registry
    if on_s3(place):  # where nothing can be renamed either, which Orbax knows of gs:// alone
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    context.array.saving.scoped_storage_options_creator = _storage_options
    context.pytree.loading.partial_load = partial
    return context


def _storage_options(key: Any, value: Any) -> Any:
    """Chunks that cut a stack of matrices between its layers first, so that one can be read without
    the others."""
    options = ocp.options.ArrayOptions.Saving.StorageOptions
    return options(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if jnp.ndim(value) > 2 else ())
