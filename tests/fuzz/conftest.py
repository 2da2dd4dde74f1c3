"""What all fuzz tests share."""

import resource
import sys

import pytest

MOST = 300 * 2**20
"""Bytes by which a test may raise the process's peak of memory."""


@pytest.fixture
def peak():
    """Fails a test that takes more memory than its cases are worth."""

    def bytes_now() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )

    before = bytes_now()
    yield
    assert bytes_now() - before < MOST
