"""What a process of test_bucket_runs.py does; it imports nothing that a fork has not imported."""

from functools import partial

import fsspec.config
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests.tiny import CONFIG
from train.config import DistributedConfig
from train.run.checkpoints import TrainCheckpoints
from train.run.distributed import joined


def save_steps(address: str, process: int, directory: str) -> None:
    """What each of two processes of one device does."""
    fsspec.config.set_conf_env(fsspec.config.conf)  # it was imported before there was a storage
    with joined(DistributedConfig(address, 2, process), with_traceback=True):
        sharding = NamedSharding(jax.make_mesh((2,), ("x",)), PartitionSpec("x"))
        with TrainCheckpoints(directory, CONFIG, "backbone") as checkpoints:
            for step in (2, 4):
                part = partial(_part, step)
                w = jax.make_array_from_callback((8, 4), sharding, part)
                checkpoints.save(step, {"w": w})


def _part(step: int, index: tuple[slice, ...]) -> np.ndarray:
    return np.full((8, 4), step, np.float32)[index]
