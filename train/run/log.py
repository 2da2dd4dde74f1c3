"""What a run tells: every step's metrics to its trackers, and the console how far it is."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from train.run.trackers import Tracker

FIRST = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
}
HEADLINE = {"grad_norm": "grad {:.3g}"}
_COLUMNS = 80
_QUIET_SECONDS = 60
_MOST_SKIPS = 10


class RunLog:
    """Collects the metrics of steps on the device and reads them `every` steps, so that no step
    waits for the log.

    Process 0 writes; the others only look for values that are not finite.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        *,
        start: int,
        total: int,
        every: int,
        peak: float | None,
        not_finite: Literal["stop", "skip"] = "stop",
        examples: Callable[[int], list[list[str]]] = lambda step: [],
        headline: Mapping[str, str] = MappingProxyType(HEADLINE),
        apart: Sequence[str] = (),
    ):
        """Args: trackers: get the metrics and samples; whoever opened them closes them. peak:
        FLOP/s of all devices together; None where unknown (no MFU is logged then). not_finite:
        whether a step whose loss or gradient is not finite ends the run, or is reported. examples:
        step -> the names of what each row of its batch holds, for that report. headline: metrics
        that the line of progress shows, each with how it is written. apart: phases of a step whose
        time is no part of the speed, since nothing is trained in it.
        """
        self.total, self.every, self.peak, self.not_finite, self.examples = (
            total,
            every,
            peak,
            not_finite,
            examples,
        )
        self._headline, self._apart = headline, apart
        self.console = Console(quiet=jax.process_index() != 0, highlight=False)
        self.console.soft_wrap = not self.console.is_terminal  # a file's lines stay whole
        self._trackers = trackers
        self._pending: list[tuple[int, Mapping[str, Any]]] = []
        self._phases: dict[str, float] = {}
        self._skipped_in_a_row = 0
        self._started = time.perf_counter()
        self._told = -math.inf
        self._live = Live(console=self.console, auto_refresh=False)
        self._estimated = False

    def __enter__(self) -> "RunLog":
        if not self.peak:
            kind = jax.devices()[0].device_kind
            self.print(f"MFU is not logged: train/step/flops.py does not know the peak of {kind!r}")
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()
        for tracker in self._trackers:
            tracker.flush()

    def print(self, message: str) -> None:
        """One line on the console, above the progress line."""
        self.console.print(message, markup=False)

    def add(self, step: int, metrics: Mapping[str, Any], *, timed: bool = True) -> None:
        """Takes the metrics of step `step` (from 0); reads them when enough have come, or at once,
        without a speed, unless `timed` (the step had to be compiled)."""
        self._pending.append((step, metrics))
        if not timed or (step + 1) % self.every == 0:
            self.flush(timed=timed)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Gives the trackers values that belong to step `step`, by name."""
        numbers = {name: float(value) for name, value in values.items()}
        for tracker in self._trackers:
            tracker.scalars(step, numbers)

    def sample(self, step: int, name: str, text: str, image: np.ndarray | None) -> None:
        """Gives the trackers a conversation (Markdown) and its image [H, W, 3] uint8."""
        for tracker in self._trackers:
            tracker.sample(step, name, text, image)

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Times what the run does besides its steps, as time/`name`: of step `step`, and then left
        out of the steps' speed, or, with None, as a part of every step, per step."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        if step is None:
            self._phases[name] = self._phases.get(name, 0) + seconds
        else:
            self.scalars(step, {f"time/{name}": seconds})
            self._started += seconds

    def restart_clock(self) -> None:
        """Leaves the time since the last flush (a compilation) out of the speed."""
        self._started = time.perf_counter()
        self._phases.clear()

    def flush(self, *, timed: bool = True) -> None:
        """Waits for the pending steps and writes them, with their speed unless `timed` is False (a
        compilation).

        Raises:
            FloatingPointError: if a loss or gradient norm is not finite; where such steps are
                skipped, if ten in a row were.
        """
        if not self._pending:
            return
        values = jax.device_get([metrics for _, metrics in self._pending])
        seconds = time.perf_counter() - self._started
        for (step, _), metrics in zip(self._pending, values, strict=True):
            self.scalars(
                step,
                {
                    name if "/" in name else f"train/{name}": value
                    for name, value in metrics.items()
                },
            )
            self._check(step, metrics)
        if timed and jax.process_index() == 0:
            training = seconds - sum(self._phases.get(name, 0) for name in self._apart)
            speed = {
                "tokens_per_second": sum(int(metrics["tokens"]) for metrics in values) / training
            }
            if self.peak:
                speed["mfu"] = (
                    sum(float(metrics["flops"]) for metrics in values) / training / self.peak
                )
            times = {"step": seconds} | self._phases
            last = self._pending[-1][0]
            self.scalars(last, {f"train/{name}": value for name, value in speed.items()})
            self.scalars(
                last, {f"time/{name}": value / len(values) for name, value in times.items()}
            )
            self._report(last + 1, values[-1] | speed, seconds / len(values))
        for tracker in self._trackers:
            tracker.flush()
        self._pending.clear()
        self.restart_clock()

    def _check(self, step: int, metrics: Mapping[str, Any]) -> None:
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        names = "; ".join(", ".join(row) for row in self.examples(step))
        what = (
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: not"
            f" finite. Its examples: {names}"
        )
        if self.not_finite == "stop":
            raise FloatingPointError(
                f"{what}. The last step checkpoint is from before it: lower"
                " optimizer.learning_rate, look at these examples, or set not_finite to skip"
            )
        self.print(f"skipped {what}")
        if self._skipped_in_a_row == _MOST_SKIPS:
            raise FloatingPointError(
                f"the last {_MOST_SKIPS} steps were not finite: the run cannot recover. {what}"
            )

    def _report(self, done: int, values: Mapping[str, Any], seconds_per_step: float) -> None:
        """How far the run is, on the live lines or, where there is no terminal, now and then."""
        left = timedelta(seconds=round((self.total - done) * seconds_per_step))
        if not self._estimated and done < self.total:
            self._estimated = True
            end = datetime.now() + left
            self.print(
                f"{self.total - done:,} steps to go: {left} at {seconds_per_step:.3g} s a step,"
                f" until {end:%Y-%m-%d %H:%M}"
            )
        facts = [f"step {done}/{self.total}"]
        facts += [written.format(values[name]) for name, written in FIRST.items()]
        facts += [f"ETA {left}"]
        facts += [written.format(values[name]) for name, written in self._headline.items()]
        if "mfu" in values:
            facts.append(f"MFU {values['mfu']:.1%}")
        facts += [
            f"{name} {value:+.4f}" for name, value in values.items() if name.startswith("gate/")
        ]
        if self.console.is_terminal:
            lines = in_columns(facts, min(self.console.width, _COLUMNS))
            self._live.update(Text(lines, no_wrap=True), refresh=True)
        elif time.monotonic() - self._told > _QUIET_SECONDS or done == self.total:
            self._told = time.monotonic()
            self.print(in_columns(facts, _COLUMNS))


def in_columns(facts: Sequence[str], columns: int) -> str:
    """The facts, two spaces between them, in lines of at most so many columns; the second line and
    those after it are indented."""
    lines = [facts[0]]
    for fact in facts[1:]:
        if len(lines[-1]) + 2 + len(fact) <= columns:
            lines[-1] += f"  {fact}"
        else:
            lines.append(f"  {fact}")
    return "\n".join(lines)
