"""Processes that begin with everything imported, which takes each of them seconds."""

import atexit
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import jax

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["train.sft.__main__", "train.grpo.__main__", __name__])


class Fork:
    """A process that does `function(*args)`, used as a subprocess.Popen is.

    Args:
        function: of a module, by whose name it is found.
        environment: of the process; JAX has not read its XLA_FLAGS.
        output: the file to which all is appended that it says.
    """

    def __init__(
        self, function: Callable, *args: Any, environment: Mapping[str, str], output: Path
    ):
        call = (function, args, dict(environment), output)
        self._process = _FORKS.Process(target=_call, args=call)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def call_main(module: str, argv: list[str], settings: Mapping[str, Any]) -> None:
    """What `python -m module` does, with these settings of JAX."""
    for name, value in settings.items():
        jax.config.update(name, value)
    import_module(f"{module}.__main__").main(argv)


def _call(function: Callable, args: tuple, environment: Mapping[str, str], output: Path) -> None:
    with open(output, "a") as file:
        for said in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), said.fileno())
    os.environ |= environment
    Finalize(None, atexit._run_exitfuncs, exitpriority=0)  # multiprocessing ends without them
    function(*args)
