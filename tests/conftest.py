"""Every test runs on eight simulated CPU devices, in float32 at full precision."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Programs here compile far longer than they run.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
# Or else simulated devices may run a program's independent loops in different orders, and wait in them for each other for ever.
os.environ["XLA_FLAGS"] += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest

from convert.hf_to_orbax import convert
from pvm_jax import Qwen3VL, load

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(params=["shape_8b", "shape_4b"])
def golden(request) -> Path:
    """One of the reference checkpoints with what the authors' code computed (tests/golden/README.md)."""
    return GOLDEN / request.param


@pytest.fixture(scope="session")
def golden_checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The reference checkpoints, converted."""
    root = tmp_path_factory.mktemp("golden")
    for shape in ("shape_8b", "shape_4b"):
        convert(GOLDEN / shape, root / shape)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def golden_model(golden, golden_checkpoints) -> Qwen3VL:
    """The model of `golden`, through conversion and loading."""
    return load(golden_checkpoints[golden.name])
