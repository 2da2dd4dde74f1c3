"""The steps of a training run on disk: written in the background, restored whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from pvm_jax.checkpoint.arrays import orbax_context, stored_apart
from pvm_jax.checkpoint.directory import CheckpointError, reason_of
from pvm_jax.checkpoint.identity import exact_identity
from pvm_jax.config import ModelConfig
from pvm_jax.files.paths import any_path, on_bucket

_STATE = "state"
"""The step's own identity, in what it carries; steps that were written before lack it."""


_REMEDY = {
    False: "Make room there, or the directory writable",
    True: "Make the bucket writable again",
}
_COMMITTED = "commit_success.txt"
"""What Orbax writes last into a step in a bucket."""


class TrainCheckpoints:
    """The steps of one training run: what is trained and the optimizer's state. The data needs no
    state: a run's batches are numbered, and the step says which one is next.

    Writing goes on in the background; a step that was not finished does not exist. Every step
    carries the model's config and the identity of the backbone that the run started from, and is
    restored into no other; and its own identity, by which a bit that flips on disk, or on the way
    there and back, is noticed.
    """

    def __init__(
        self,
        directory: str | Path,
        config: ModelConfig,
        backbone: str,
        *,
        keep: int = 2,
        best: str | None = None,
        maximize: bool = False,
    ):
        """Opens `directory`, or makes it; removes what an interrupted save left in it.

        Args:
            backbone: `backbone_identity` of the parameters that the run starts from.
            keep: this many newest steps stay.
            best: a metric's name; the step where it was lowest (highest with `maximize`) stays as
                well.

        Raises:
            OSError: if there can be no directory, or it cannot be written.
        """
        policies = ocp.training.preservation_policies
        preserved: list[Any] = [policies.LatestN(keep)]
        if best is not None:
            # BestN keeps the end of the sorted list.
            preserved.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[best], reverse=not maximize, n=1
                )
            )
        preservation: Any = policies.AnyPreservationPolicy(preserved)
        self._best = best
        model = {key: value for key, value in config.to_hf().items() if key != "dtype"}
        self._run = {"model": model, "backbone": backbone}
        self.directory = any_path(directory).absolute()
        in_bucket = on_bucket(self.directory)  # where the claim of the run has been written already
        if (
            not in_bucket
            and self.directory.exists()
            and not (self.directory.is_dir() and os.access(self.directory, os.W_OK))
        ):
            raise OSError(
                f"{self.directory} is no directory that can be written: a run's steps go there"
            )
        # A run that was copied from a bucket goes on as it was stored there.
        newest = max(whole_steps(self.directory), default=0)
        context = orbax_context(self.directory / str(newest))
        # Otherwise a directory that cannot be made leaves threads that keep the process for five
        # minutes.
        context.asynchronous.create_directories_asynchronously = False
        context.array.saving.use_compression = (
            False  # saves a tenth of the bytes, costs twice the processor time of all else
        )
        self._steps = ocp.training.Checkpointer(
            str(self.directory),
            context=context,
            preservation_policy=preservation,
            cleanup_tmp_directories=True,
        )
        self._last: int | None = None

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, and the one that is being written, ascending."""
        return [checkpoint.step for checkpoint in self._steps.checkpoints]

    @property
    def latest(self) -> int | None:
        """The newest of `steps`."""
        return self.steps[-1] if self.steps else None

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Copies `state` off the devices and returns; the files are written in the background.

        Args:
            state: a pytree of arrays (trained parameters, optimizer state).

        Raises:
            ValueError: if the metric that decides which step is best is not among `metrics`.
            CheckpointError: if this save, or the one before it in the background, failed.
        """
        if self._best is not None and self._best not in (metrics or {}):
            raise ValueError(
                f"step {step}: the metric {self._best!r} decides which step is best, but was not"
                " given"
            )
        with self._explaining_failed_saves():
            self._steps.wait()
            self._last = step
            if jax.default_backend() == "cpu":
                # Orbax reads a CPU's arrays where they are: a step that wants to reuse their memory
                # would wait for the writing.
                state = _copied(state)
            self._steps.save_checkpointables_async(
                step,
                {"state": state},
                force=True,
                metrics=(
                    None
                    if metrics is None
                    else {name: float(value) for name, value in metrics.items()}
                ),
                custom_metadata=self._run | {_STATE: exact_identity(state)},
            )

    def restore(self, abstract: Any, step: int | None = None) -> Any:
        """The state of `step` (None: the latest) in the shardings of `abstract`, whatever mesh and
        processes wrote it.

        Args:
            abstract: the state's tree with `jax.ShapeDtypeStruct(shape, dtype, sharding=...)`
                leaves.

        Raises:
            FileNotFoundError: if there is no such step.
            CheckpointError: if the step is another model's or another backbone's, or cannot be
                read, or is not what was saved.
        """
        step = self.latest if step is None else step
        if step is None or step not in self.steps:
            raise FileNotFoundError(f"{self.directory}: no step {step}; there are {self.steps}")
        with self._explaining_unreadable(step):
            saved: Any = self._steps.checkpointables_metadata(step).custom_metadata
            if not saved:
                raise ValueError("it does not say which model it is of")
        for key, mine in self._run.items():
            if saved.get(key) != mine:
                raise CheckpointError(
                    f"{self.directory}: step {step} was saved with another {key}:"
                    f" {_difference(saved.get(key), mine)}. Continue the run with what it began"
                    " with, or give another --run_dir"
                )
        with self._explaining_unreadable(step):
            state = self._steps.load_checkpointables(step, {"state": abstract})["state"]
            if saved.get(_STATE, found := exact_identity(state)) != found:
                raise ValueError(f"it was saved as {saved[_STATE]} and is read as {found}")
        return state

    def close(self) -> None:
        """Waits for the last save.

        Raises:
            CheckpointError: if it failed.
        """
        with self._explaining_failed_saves():
            self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _explaining_failed_saves(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the layers below say about a disk
            # Orbax has forgotten the steps that this save was to replace; they are still there.
            whole = max(whole_steps(self.directory), default=None)
            then = (
                "starts anew" if whole is None else f"continues from step {whole}, which is whole"
            )
            raise CheckpointError(
                f"{self.directory}: step {self._last} could not be written: {reason_of(error)}."
                f" {_REMEDY[on_bucket(self.directory)]}: the same command then {then}"
            ) from error

    @contextmanager
    def _explaining_unreadable(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the layers below say about a file
            before = [other for other in self.steps if other < step]
            then = f"continues from step {before[-1]}" if before else "starts anew"
            raise CheckpointError(
                f"{self.directory / str(step)} cannot be restored: {reason_of(error)}. It is"
                " another run's, or its files are damaged; if so, remove this directory: the same"
                f" command then {then}"
            ) from error


@jax.jit
def _copied(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


def whole_steps(directory: Path) -> list[int]:
    """The steps in `directory` that were written to their end, in order."""
    found = directory.iterdir() if directory.is_dir() else ()
    steps = [step for step in found if step.name.isdigit()]
    # There, and in what was copied from there, a step has its name before it is whole.
    in_bucket = on_bucket(directory) or any(map(stored_apart, steps))
    return sorted(int(step.name) for step in steps if not in_bucket or (step / _COMMITTED).exists())


def _difference(saved: Any, mine: Any) -> str:
    """What `saved` says and `mine` says otherwise, key by key where both are nested dicts."""
    if not (isinstance(saved, dict) and isinstance(mine, dict)):
        return f"{saved}, now {mine}"
    old, new = (traverse_util.flatten_dict(values, sep=".") for values in (saved, mine))
    return ", ".join(
        f"{key} {old.get(key)}, now {new.get(key)}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    )
