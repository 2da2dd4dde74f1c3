"""The reference batch with its labels, and a model that compiles fast."""

from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.data.example import Example
from pvm_jax.model.qwen3_vl import Qwen3VL
from tests import tiny
from tests.train import runs


@pytest.fixture
def golden_batch(golden) -> Batch:
    arrays = load_file(golden / "forward_inputs.safetensors")
    arrays["labels"] = load_file(golden / "grad_outputs.safetensors")["labels"]
    return Batch.from_hf(arrays, ModelConfig.from_hf(golden))


@pytest.fixture(scope="session")
def model() -> Qwen3VL:
    """The smallest model with every part in it, its gate open: it compiles fast."""
    return tiny.make_model(tiny.golden_config(remat="none"), gate=1)


@pytest.fixture(scope="session")
def eight_rows(model) -> Batch:
    """Eight rows with images of several sizes, one without any; each has its own share of learned
    tokens."""
    rng, config = np.random.default_rng(0), model.config

    def example(grids: list[tuple[int, int]], learned: float) -> Example:
        images = [
            [
                config.vision_start_token_id,
                *[config.image_token_id] * (rows * columns // 4),
                config.vision_end_token_id,
            ]
            for rows, columns in grids
        ]
        ids = np.concatenate([*images, rng.integers(0, 400, rng.integers(10, 24))]).astype(np.int32)
        patches = sum(rows * columns for rows, columns in grids)
        return Example(
            ids,
            rng.normal(size=(patches, config.vision.patch_dim)).astype(np.float32)
            if grids
            else None,
            np.array([(1, *grid) for grid in grids]) if grids else None,
            loss_mask=(np.arange(len(ids)) > sum(map(len, images)))
            & (rng.random(len(ids)) < learned),
        )

    grids = [
        [(2, 2)],
        [(4, 4)],
        [(2, 4), (4, 2)],
        [],
        [(2, 8)],
        [(4, 2)],
        [(2, 2), (2, 2)],
        [(4, 4)],
    ]
    rows = [
        [example(grid, learned)]
        for grid, learned in zip(grids, np.linspace(0.1, 1, 8), strict=True)
    ]
    return Batch.from_rows(rows, config, length=48, patches=16)


@pytest.fixture(scope="session")
def workplace_with_a_run(tmp_path_factory, worker_id) -> Path:
    """A workplace (tests/train/runs.py) with the run `whole`; all test workers share it."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "runs"
    with FileLock(f"{root}.lock"):
        if not root.exists():
            root.mkdir()
            runs.write_workplace(root, examples=32)
            with runs.programs_kept(root):
                runs.run(root, "whole", runs.LONG, "--checkpoint_every=100")
    return root
