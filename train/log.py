"""What a run tells: TensorBoard scalars of every step, and one line of progress."""

import math
import time
from datetime import timedelta
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from train.step import Metrics


class RunLog:
    """Collects the metrics of steps on the device and reads them `every` steps, so that no step waits for the log.

    Process 0 writes; the others only look for a loss that is not finite.
    """

    def __init__(self, directory: Path, *, start: int, total: int, every: int, peak: float | None):
        """`peak`: FLOP/s of all devices together; None where unknown (no MFU is logged then)."""
        self.total, self.every, self.peak = total, every, peak
        self.console = Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)
        self._writer = SummaryWriter(str(directory), purge_step=start) if jax.process_index() == 0 else None
        self._pending: list[tuple[int, Metrics]] = []
        self._started = time.perf_counter()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total, completed=start, line="")

    def __enter__(self) -> "RunLog":
        if not self.peak:
            kind = jax.devices()[0].device_kind
            self.print(f"MFU is not logged: train/flops.py does not know the peak of {kind!r}")
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        if self._writer:
            self._writer.close()

    def print(self, message: str) -> None:
        """One line on the console, above the progress line."""
        self.console.print(message, markup=False)

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of step `step` (from 0); reads them when enough have come."""
        self._pending.append((step, metrics))
        if (step + 1) % self.every == 0:
            self.flush()

    def restart_clock(self) -> None:
        """Leaves the time since the last flush (a compilation, a checkpoint) out of the speed."""
        self._started = time.perf_counter()

    def flush(self, *, timed: bool = True) -> None:
        """Waits for the pending steps and writes them, with their speed unless `timed` is False (a compilation).

        Raises:
            FloatingPointError: if a loss or gradient norm is not finite.
        """
        if not self._pending:
            return
        values = jax.device_get([metrics for _, metrics in self._pending])
        seconds = time.perf_counter() - self._started
        for (step, _), scalars in zip(self._pending, values, strict=True):
            self._write(step, scalars)
            if not (math.isfinite(scalars["loss"]) and math.isfinite(scalars["grad_norm"])):
                raise FloatingPointError(
                    f"step {step}: loss {scalars['loss']}, gradient norm {scalars['grad_norm']}: not finite. The last step "
                    "checkpoint is from before it; lower optimizer.learning_rate or look at the examples of this step"
                )
        if timed:
            speed = {"tokens_per_second": sum(int(scalars["tokens"]) for scalars in values) / seconds}
            if self.peak:
                speed["mfu"] = sum(float(scalars["flops"]) for scalars in values) / seconds / self.peak
            last = self._pending[-1][0]
            self._write(last, speed)
            self._report(last + 1, values[-1] | speed, seconds / len(values))
        self._pending.clear()
        self.restart_clock()

    def _write(self, step: int, scalars: dict) -> None:
        if self._writer:
            for name, value in scalars.items():
                self._writer.add_scalar(name if "/" in name else f"train/{name}", float(value), step)

    def _report(self, done: int, scalars: dict, seconds_per_step: float) -> None:
        line = f"loss {scalars['loss']:.4f}  grad {scalars['grad_norm']:.3g}  lr {scalars['learning_rate']:.2e}"
        line += "".join(f"  {name} {value:+.4f}" for name, value in scalars.items() if name.startswith("gate/"))
        line += f"  {scalars['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in scalars:
            line += f"  MFU {scalars['mfu']:.1%}"
        if self.console.is_terminal:
            self._progress.update(self._task, completed=done, line=line)
        else:
            left = timedelta(seconds=round((self.total - done) * seconds_per_step))
            self.print(f"step {done}/{self.total}  {line}  ETA {left}")
