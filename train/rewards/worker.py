"""The process that grades: reads (function's number, completion, example) from a pipe and writes
what it is worth.

`python -m train.rewards.worker FD` is started by train.rewards.pool.Rewards, not by a person. It is
a process of its own, and no child of multiprocessing, which would import the run's main module and
with it JAX.
"""

import resource
import signal
import sys
from multiprocessing.connection import Connection

from train.rewards.functions import load_reward_function


def main(connection: Connection) -> None:
    """Serves until the other end is closed.

    The first message is (functions, seconds, GiB of memory); the answer is None, or what is wrong
    with a function. Every other message is a completion to grade; the answer is (value, None), or
    (0, what went wrong).
    """
    functions, seconds, memory = connection.recv()
    _limit_memory(round(memory * 2**30))
    try:
        graders = [load_reward_function(function) for function in functions]
    except ValueError as error:
        connection.send(str(error))
        return
    connection.send(None)
    while True:
        try:
            number, completion, example = connection.recv()
        except EOFError:
            return
        # The other end ends what takes too long. Should it have been killed meanwhile, the kernel
        # does: in 2 x the time.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        try:
            answer = (_number(graders[number](completion, example)), None)
        except MemoryError:
            answer = (0.0, f"took more than {memory:g} GiB of memory")
        except Exception as error:
            answer = (0.0, f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def _limit_memory(size: int) -> None:
    """Of what is written to alone: libraries reserve addresses that they never use."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    size = size if most == resource.RLIM_INFINITY else min(size, most)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


_TOO_LARGE = 1e30


def _number(value: object) -> float:
    """What a grader returned, as a float.

    Raises:
        ValueError: if it is no number, or none that float32 holds with those that are added to it.
    """
    number = float(value)  # pyright: ignore[reportArgumentType]: what is no number raises TypeError or ValueError
    if not abs(number) < _TOO_LARGE:
        raise ValueError(f"the reward is {number}")
    return number


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
