"""Runs of several processes: they compute what one computes, stop together, and one alone can go
on."""

import os
import signal
import time

import jax
import numpy as np
import pytest
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh

from pvm_jax.sharding import MESH_AXES, batch_sharding, local_rows, make_mesh, place_rows
from tests.close import assert_close
from tests.train import runs
from tests.train.forks import Fork
from train.config import DistributedConfig
from train.run.distributed import join, joined
from train.run.preemption import stop_requests


@pytest.fixture(scope="module")
def root(workplace_with_a_run):
    with runs.programs_kept(workplace_with_a_run):
        yield workplace_with_a_run


def shared(losses, others):
    """Both losses of every step that both have."""
    steps = sorted(set(losses) & set(others))
    return (np.array([next(iter(values[step])) for step in steps]) for values in (losses, others))


def test_two_processes_stop_together_and_one_goes_on(root):
    """Four devices of two processes (data 2, tensor 2) against one device; SIGTERM to process 1
    alone."""
    mesh = ["--mesh.data=2", "--mesh.tensor=2"]
    started = runs.start(root, "two", runs.LONG, *mesh, processes=2, devices=2)
    try:
        while started[1].poll() is None and len(runs.losses(root, "two")) < 2:
            time.sleep(0.2)
        started[1].send_signal(signal.SIGTERM)
        first, second = runs.finish(root, "two", started)
    finally:
        for process in started:
            process.kill()
    alone, two = runs.losses(root, "whole"), runs.losses(root, "two")
    assert sorted(alone) == list(range(runs.STEPS))
    stopped = len(two)
    assert 2 <= stopped < runs.STEPS
    assert_close(*shared(two, alone), 1e-5)
    assert f"stopped after step {stopped}; the same command continues" in first
    assert "4 devices in 2 processes" in first
    assert "loss" not in second, "process 0 alone tells"
    assert len(list((root / "two" / "log").iterdir())) == 1
    assert (root / "two" / "steps" / str(stopped)).is_dir()

    runs.run(root, "two", runs.LONG)
    assert (root / "two" / "branch").is_dir()
    both = runs.losses(root, "two")
    assert sorted(both) == list(range(runs.STEPS))
    assert all(len(values) == 1 for values in both.values()), "no step was done twice"
    assert_close(*shared(both, alone), 1e-5)


def rows_and_signals(address: str, process: int) -> None:
    """What each of two processes of four devices does."""
    with joined(DistributedConfig(address, 2, process), with_traceback=False):
        order = [0, 4, 1, 5, 2, 6, 3, 7]  # as a slice's wires may have it
        devices = np.array(jax.devices())[order].reshape(4, 2, 1)
        mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
        sharding, count = batch_sharding(mesh), 16
        rows = local_rows(sharding, count)
        whole = np.arange(2 * count).reshape(count, 2)
        assert rows == [row for row in range(count) if row // 2 % 2 == process], rows
        placed = place_rows({"x": whole[rows]}, sharding, count)
        np.testing.assert_array_equal(process_allgather(placed, tiled=True)["x"], whole)
        answers = []
        with stop_requests(mesh) as stop_requested:
            for step in range(6):
                if (step, process) == (2, 1):
                    os.kill(os.getpid(), signal.SIGTERM)
                answers.append(stop_requested())
        assert answers == [False] * 3 + [True] * 3, answers
        if process == 1:
            raise ValueError("process 1 alone fails")
        print("process 0 goes on", flush=True)
        time.sleep(120)  # its end would break off what process 1 still receives of it


def test_rows_need_not_be_neighbours_and_all_hear_of_a_signal_at_the_same_step(tmp_path):
    """And a process that fails alone ends at once, without waiting for the others."""
    address, environment = f"127.0.0.1:{runs.free_port()}", runs.environment(devices=4)
    files = [tmp_path / str(process) for process in range(2)]
    started = [
        Fork(rows_and_signals, address, process, environment=environment, output=file)
        for process, file in enumerate(files)
    ]
    try:
        status, said = started[1].wait(120), files[1].read_text()
        assert status == 2, said
        assert "error: process 1 alone fails\n" in said
        assert "Traceback" not in said
        until = time.monotonic() + 60
        while "process 0 goes on" not in (said := files[0].read_text()):
            assert time.monotonic() < until, said
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.fixture
def ctrl_c():
    """Sets what SIGINT does, for one test."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_ends_at_once_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_requests(make_mesh()) as stop_requested:
        assert not stop_requested()
        signal.raise_signal(signal.SIGINT)
        assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_where_ctrl_c_is_ignored_it_stays_so(ctrl_c):
    ctrl_c(signal.SIG_IGN)
    with stop_requests(make_mesh()) as stop_requested:
        signal.raise_signal(signal.SIGINT)
        assert not stop_requested()


def test_who_waits_in_vain_says_for_whom(root):
    where = [
        f"--distributed.coordinator_address=127.0.0.1:{runs.free_port()}",
        "--distributed.process_id=1",
    ]
    options = ["--distributed.num_processes=2", "--distributed.timeout=1", *where]
    (process,) = runs.start(root, "lonely", *options)
    (said,) = runs.finish(root, "lonely", [process], code=2)
    assert (
        "\nerror: process 1 of 2 waited 1 s (distributed.timeout) for the other processes at"
        " 127.0.0.1:" in f"\n{said}"
    )
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 2}, "coordinator_address is missing"),
        ({"process_id": 1}, "coordinator_address is missing"),
        ({"coordinator_address": "10.0.0.1"}, "is host:port, got '10.0.0.1'"),
        (
            {"coordinator_address": "10.0.0.1:1234", "num_processes": 2},
            "needs num_processes and process_id, got 2 and None",
        ),
        (
            {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 2},
            "counts from 0 to num_processes - 1 = 1",
        ),
        ({"timeout": 0}, "timeout 0 must be at least 1"),
        ({"num_processes": 0}, "num_processes 0 and timeout 300 must be at least 1"),
    ],
)
def test_what_is_missing_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**options)


@pytest.mark.parametrize("options", [{"num_processes": 1}, {}])
def test_a_process_without_a_cluster_is_alone(monkeypatch, options):
    """Also as the only task of a SLURM job, where JAX would take one GPU of all."""
    calls = []

    def initialize(**arguments):
        calls.append(arguments)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    join(DistributedConfig(**options))
    assert len(calls) == (0 if options else 1)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    join(DistributedConfig(**options))
    assert len(calls) == (0 if options else 1)


def test_a_cluster_that_does_not_say_enough_is_an_error(monkeypatch):
    def initialize(**_):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(
        ValueError,
        match=r"Number of processes must be defined.*give distributed\.coordinator_address",
    ):
        join(DistributedConfig())
