"""What a run does when it is told to end: SIGTERM, which clusters send before they take a machine
away, and Ctrl-C.

All processes of a run stop after the same step, with a checkpoint, and the same command goes on
from there.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@contextmanager
def stop_requests(mesh: Mesh) -> Iterator[Callable[[], bool]]:
    """Listens to SIGTERM and Ctrl-C for the block. Yields what all processes call once a step: was
    the run asked to end?

    A second Ctrl-C ends the process at once. With several processes the answer is whether any of
    them had been told at the call before, the same for all: a flag of each travels through the
    devices behind the step that was given to them, so that nobody waits for it.
    """
    requests: list[int] = []
    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }
    # A shell starts jobs in the background with Ctrl-C ignored: it is not meant for them.
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def request(number: int, _: Any) -> None:
        requests.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, request)
    flags = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    anyone = jax.jit(lambda told: told.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    answers: list[jax.Array] = []

    def agreed() -> bool:
        told = np.full(1, bool(requests))
        answers.append(anyone(jax.make_array_from_callback((mesh.size,), flags, lambda _: told)))
        return len(answers) > 1 and bool(answers.pop(0))

    try:
        yield agreed if jax.process_count() > 1 else lambda: bool(requests)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
