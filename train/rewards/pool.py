"""Rewards of completions, computed by plain functions in processes that may hang, raise or die
without harm to the run."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import numpy as np

from train.rewards.functions import SOLUTION, check_name

_OURS = str(Path(__file__).parents[2])
"""The folder in which this package lies."""

START_LIMIT = 300
"""Seconds that a worker may take to import its graders."""

Task = tuple[int, str, Mapping[str, Any]]
"""The function's number, the completion and its example."""
Grade = tuple[float, str | None]
"""The value, and what went wrong."""


@dataclass(frozen=True)
class RewardConfig:
    """One of the functions whose weighted sum is the reward.

    Attributes:
        function: "format", "accuracy" (train/rewards/functions.py), or the import path
            "package.module:function" of your own: (completion, example) -> float.
        weight: of its value in the sum.
    """

    function: str
    weight: float = 1.0

    def __post_init__(self):
        check_name(self.function)


def reward_names(configs: Sequence[RewardConfig]) -> tuple[str, ...]:
    """The functions' names. Raises ValueError if there is none, or one twice."""
    names = tuple(config.function for config in configs)
    if not names or len(set(names)) < len(names):
        raise ValueError(
            "rewards: needs at least one function, each of them once, got"
            f" {', '.join(names) or 'none'}"
        )
    return names


@dataclass(frozen=True)
class RewardTable:
    """What N completions are worth.

    Attributes:
        names: of the R functions.
        values: [N, R] float64, each function's value before its weight; 0 where it failed.
        totals: [N] float64, the weighted sums.
        failures: for each name how many completions it raised on, took too long for, died of, or
            gave no number under 1e30 for.
        errors: for each name that failed, what went wrong the first time.
    """

    names: tuple[str, ...]
    values: np.ndarray
    totals: np.ndarray
    failures: dict[str, int]
    errors: dict[str, str]


class Rewards:
    """A context manager that grades completions in `workers` processes; outside of it there are
    none.

    What a grader leaves behind in its process (caches, a loaded model) is there for the next
    completion. A grader that takes more than `time_limit` seconds is killed with all that it
    started, and its process replaced.

    Args:
        configs: the functions, in the order of the table's columns.
        time_limit: seconds for one function and one completion.
        memory: GiB that a process may write to; a grader that asks for more fails.
        workers: processes.

    Raises:
        ValueError: for settings out of their range, and, on entering, for a function that cannot be
            imported.
    """

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        *,
        time_limit: float = 10.0,
        memory: float = 4.0,
        workers: int = 4,
    ):
        names = reward_names(configs)
        if time_limit <= 0 or memory <= 0 or workers < 1:
            raise ValueError(
                f"rewards: needs time_limit > 0, memory > 0 and workers >= 1, got {time_limit},"
                f" {memory} and {workers}"
            )
        self.names, self._weights = (
            names,
            np.array([config.weight for config in configs], np.float64),
        )
        self._workers = [_Worker(names, time_limit, memory) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(len(self._workers))
        try:
            for _ in self._threads.map(_Worker.start, self._workers):
                pass
        except BaseException:
            self.__exit__()
            raise
        for worker in self._workers:
            self._idle.put(worker)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._threads is not None
        self._threads.shutdown(cancel_futures=True)
        self._threads = None
        for worker in self._workers:
            worker.kill()

    def __call__(
        self, completions: Sequence[str], examples: Sequence[Mapping[str, Any]]
    ) -> RewardTable:
        """Grades each completion with each function; `examples` are their rows of the data, one for
        each.

        Raises:
            ValueError: if the two are not equally many, or a row lacks what "accuracy" compares
                with.
            RuntimeError: outside of the context; if no process can be started for one that was
                killed.
        """
        if len(completions) != len(examples):
            raise ValueError(f"{len(completions)} completions with {len(examples)} examples")
        if "accuracy" in self.names and not all(
            str(example.get(SOLUTION, "")).strip() for example in examples
        ):
            raise ValueError(f'the reward "accuracy" needs {SOLUTION!r} in every example')
        if self._threads is None:
            raise RuntimeError("Rewards grades inside its context: `with Rewards(...) as rewards:`")
        cells = list(product(range(len(completions)), range(len(self.names))))
        tasks = ((column, completions[row], examples[row]) for row, column in cells)
        values = np.zeros((len(completions), len(self.names)))
        failures, errors = dict.fromkeys(self.names, 0), {}
        for (row, column), (value, error) in zip(
            cells, self._threads.map(self._grade, tasks), strict=True
        ):
            values[row, column] = value
            if error is not None:
                failures[self.names[column]] += 1
                errors.setdefault(self.names[column], error)
        return RewardTable(self.names, values, values @ self._weights, failures, errors)

    def _grade(self, task: Task) -> Grade:
        worker = self._idle.get()
        try:
            return worker.grade(task)
        finally:
            self._idle.put(worker)


def _python_path() -> str:
    """PYTHONPATH of a process that finds what this one finds, and as `train` this package: a folder
    that holds another comes after it."""

    def is_other(path: str) -> bool:
        theirs = [Path(path, "train.py"), Path(path, "train", "__init__.py")]
        return path != _OURS and any(map(Path.exists, theirs))

    others = [path for path in sys.path if is_other(path)]
    return os.pathsep.join([*(path for path in sys.path if path not in others), _OURS, *others])


class _Worker:
    """A process of train.rewards.worker, and the next one when it has ended."""

    def __init__(self, names: tuple[str, ...], time_limit: float, memory: float):
        self.names, self.time_limit, self.memory = names, time_limit, memory
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.connection, theirs = Pipe()
        # Should a grader import JAX, it must not take the accelerator that the run has.
        environment = os.environ | {"PYTHONPATH": _python_path(), "JAX_PLATFORMS": "cpu"}
        # -P: not from the folder that it starts in, which -m alone looks into first.
        command = [sys.executable, "-P", "-m", "train.rewards.worker", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a grader prints goes to stderr
                # Ctrl-C is the run's; and all that a grader starts can be killed with it
                start_new_session=True,
            )
        try:
            self.connection.send((self.names, self.time_limit, self.memory))
            if not self.connection.poll(START_LIMIT):
                raise RuntimeError(
                    f"a process for the rewards took more than {START_LIMIT} s to start"
                )
            wrong = self.connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                "a process for the rewards ended while it started: see above for what it wrote"
            ) from error
        if wrong is not None:
            raise ValueError(wrong)

    def grade(self, task: Task) -> Grade:
        try:
            self.connection.send(task)
            if self.connection.poll(self.time_limit):
                return self.connection.recv()
            error = f"took more than {self.time_limit} s"
        except (EOFError, OSError):
            error = "its process ended"
        self.kill()
        self.start()
        return 0.0, error

    def kill(self) -> None:
        if self.process is not None:
            self.connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
