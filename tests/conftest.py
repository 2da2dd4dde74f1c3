"""Every test runs on eight simulated CPU devices, in float32 at full precision."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(params=["shape_8b", "shape_4b"])
def golden(request) -> Path:
    """One of the reference checkpoints with what the authors' code computed (tests/golden/README.md)."""
    return GOLDEN / request.param
