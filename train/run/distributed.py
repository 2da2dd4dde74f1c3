"""Several processes, one run: how they find each other, and how one that fails ends."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from pvm_jax.options import report
from train.config import DistributedConfig


@contextmanager
def joined(config: DistributedConfig, *, with_traceback: bool) -> Iterator[None]:
    """Makes this process one of the run's, for the block; to be entered before anything touches a
    device.

    A process whose block fails ends at once, as `report` says: it would otherwise wait in vain for
    the others, who wait for it inside a step. They are ended by JAX, which misses it within 100 s
    (at once if it was process 0).

    Raises:
        RuntimeError: if JAX has started on its devices already.
        ValueError: if a cluster was found that does not say enough about itself.
    """
    join(config)
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        status = report(error, with_traceback=with_traceback)
        sys.stdout.flush()
        os._exit(status)


def join(config: DistributedConfig) -> None:
    """Starts jax.distributed where the run has other processes: those that `config` or the
    cluster's own means name.

    TPU slices, SLURM (a process for each GPU, as srun starts them), Open MPI and Kubernetes jobs
    are found by JAX. A process that waits longer than `config.timeout` for the others ends with a
    message that says for whom.
    """
    # It would keep SIGTERM from ending a process that has not begun to train; preemption.py is told
    # by Python.
    jax.config.update("jax_enable_preemption_service", False)
    if config.num_processes == 1 or (
        config.num_processes is None and os.environ.get("SLURM_NTASKS") == "1"
    ):
        return  # JAX would give a lone SLURM task one of its GPUs
    where = f"at {config.coordinator_address}" if config.coordinator_address else "of this cluster"
    with _time_limit(config, where):
        if config.coordinator_address:
            jax.distributed.initialize(
                config.coordinator_address,
                config.num_processes,
                config.process_id,
                cluster_detection_method="deactivate",
                initialization_timeout=_FOREVER,
            )
            return
        try:
            jax.distributed.initialize(initialization_timeout=_FOREVER)
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise ValueError(
                    f"the processes of this cluster could not be found ({error}): give"
                    " distributed.coordinator_address, distributed.num_processes and"
                    " distributed.process_id, or distributed.num_processes 1"
                ) from error
            # No cluster, no coordinator: this process is alone.


_FOREVER = 7 * 24 * 3600  # s


@contextmanager
def _time_limit(config: DistributedConfig, where: str) -> Iterator[None]:
    """Ends the process after `config.timeout`: JAX's own limit aborts it without a word about who
    was missing."""

    def end() -> None:
        who = (
            "this process"
            if config.process_id is None
            else f"process {config.process_id} of {config.num_processes}"
        )
        error = TimeoutError(
            f"{who} waited {config.timeout} s (distributed.timeout) for the other"
            f" processes {where}. Start the same command on every host, each with its own"
            " process_id; all must reach the coordinator, which is process 0"
        )
        os._exit(report(error, with_traceback=False))

    timer = threading.Timer(config.timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
