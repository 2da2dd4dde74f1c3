"""Where a run's curves and sample answers go besides TensorBoard: Weights & Biases, Trackio and
MLflow.

A tracker that cannot be opened ends the run before a model is loaded; one that fails later is named
once, and the run goes on: what it computes does not depend on who watches.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import traverse_util

from pvm_jax.files.paths import any_path, on_bucket
from train.config import LogConfig, RunConfig

STEP = "step"
"""The axis of all curves: a run that goes on from a checkpoint repeats steps, and trackers count
what they are given."""

_RUN_TAG = "pvm_run"
_PARAMS_A_CALL = 100
_PARAM_CHARACTERS = 500
_MLFLOW_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""By itself it asks a server that is gone for many minutes, in which nothing is trained."""


class Tracker(Protocol):
    """What a run's metrics and samples are given to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values that belong to step `step`, by name."""

    def sample(self, step: int, name: str, text: str, image: np.ndarray | None) -> None:
        """A conversation (Markdown) and its image [H, W, 3] uint8."""

    def flush(self) -> None:
        """Called when what was given is to outlive the process; for those that see to it by
        themselves, nothing."""

    def close(self, *, failed: bool) -> None:
        """The process ends; `failed`: by an error."""


def check_installed(config: LogConfig) -> None:
    """Raises ImportError if a package that process 0 would log to is missing."""
    if jax.process_index() == 0:
        for name in config.to:
            if name in TRACKERS and find_spec(name) is None:
                raise ImportError(
                    f"log.to: {name} is not installed: pip install 'pvm-jax[{name}]', or leave it"
                    " out"
                )


@contextmanager
def opened_trackers(config: RunConfig, run_id: str) -> Iterator[list[Tracker]]:
    """The trackers of `config.log` but TensorBoard, in process 0 (the others have none), with the
    run `run_id`: the one that was begun there, or a new one. They are closed after the block.

    Raises:
        ImportError: as `check_installed`.
        RuntimeError: if one cannot be opened.
    """
    check_installed(config.log)
    opened: list[Tracker] = []
    failed = True
    try:
        if jax.process_index() == 0:
            name = config.log.name or any_path(config.run_dir).absolute().name
            for kind in config.log.to:
                if kind in TRACKERS:
                    opened.append(_opened(kind, config, name, run_id))
        yield opened
        failed = False
    finally:
        for tracker in opened:
            tracker.close(failed=failed)


def _opened(kind: str, config: RunConfig, name: str, run_id: str) -> Tracker:
    try:
        return _Forgiving(kind, TRACKERS[kind](config, name, run_id))
    except Exception as error:  # whatever the package and its server say
        raise RuntimeError(
            f"log.to: {kind} cannot be opened ({error}): see to that, or leave it out"
        ) from error


class _Forgiving(Tracker):
    """A tracker whose failures are told, the first of them, and end nothing."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker, self._told = name, tracker, False

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._telling():
            self._tracker.scalars(step, values)

    def sample(self, step: int, name: str, text: str, image: np.ndarray | None) -> None:
        with self._telling():
            self._tracker.sample(step, name, text, image)

    def flush(self) -> None:
        with self._telling():
            self._tracker.flush()

    def close(self, *, failed: bool) -> None:
        with self._telling():
            self._tracker.close(failed=failed)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as in _opened
            if not self._told:
                print(
                    f"{self._name} takes no values ({error}): what it shows of this run has gaps,"
                    " the run goes on",
                    file=sys.stderr,
                )
            self._told = True


class _WandB(Tracker):
    def __init__(self, config: RunConfig, name: str, run_id: str):
        import wandb  # pyright: ignore[reportMissingImports]

        run_dir = any_path(config.run_dir)
        # What it keeps on this machine stays there where the run is in a bucket.
        folder = Path("wandb" if on_bucket(run_dir) else run_dir / "log").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self._images, self._html = wandb.Image, wandb.Html
        self._run = wandb.init(
            project=config.log.project,
            name=name,
            id=run_id,
            resume="allow",
            config=asdict(config),
            dir=folder,
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("*", step_metric=STEP)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({STEP: step, **values})

    def sample(self, step: int, name: str, text: str, image: np.ndarray | None) -> None:
        shown = (
            self._html(f"<pre>{escape(text)}</pre>")
            if image is None
            else self._images(image, caption=text)
        )
        self._run.log({STEP: step, name: shown})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio(Tracker):
    def __init__(self, config: RunConfig, name: str, run_id: str):
        import trackio  # pyright: ignore[reportMissingImports]

        self._images, self._markdown = trackio.Image, trackio.Markdown
        # It knows runs by their names: two directories of one name are two runs.
        self._run = trackio.init(
            project=config.log.project,
            name=f"{name}-{run_id}",
            resume="allow",
            config=asdict(config),
            embed=False,
        )
        self._finish = trackio.finish

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def sample(self, step: int, name: str, text: str, image: np.ndarray | None) -> None:
        shown = self._markdown(text) if image is None else self._images(image, caption=text)
        self._run.log({name: shown}, step=step)

    def close(self, *, failed: bool) -> None:
        self._finish()


class _MLflow(Tracker):
    def __init__(self, config: RunConfig, name: str, run_id: str):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        for limit, number in _MLFLOW_LIMITS.items():
            os.environ.setdefault(limit, number)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # what it warns of is raised too
        self._client, self._metric = MlflowClient(), Metric
        experiment = self._client.get_experiment_by_name(config.log.project)
        place = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(config.log.project)
        )
        found = self._client.search_runs([place], f"tags.{_RUN_TAG} = '{run_id}'")
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        created = self._client.create_run(place, tags={_RUN_TAG: run_id}, run_name=name)
        self._run = created.info.run_id
        values = traverse_util.flatten_dict(asdict(config), sep=".").items()
        params = [Param(key, str(value)[:_PARAM_CHARACTERS]) for key, value in values]
        for first in range(0, len(params), _PARAMS_A_CALL):
            self._client.log_batch(self._run, params=params[first : first + _PARAMS_A_CALL])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        metrics = [self._metric(name, value, _now(), step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def sample(self, step: int, name: str, text: str, image: np.ndarray | None) -> None:
        self._client.log_text(self._run, text, f"{name}/{step:08d}.md")
        if image is not None:
            self._client.log_image(self._run, image, key=name, step=step)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def _now() -> int:
    """Milliseconds, as MLflow has times."""
    return time.time_ns() // 10**6


TRACKERS: dict[str, Any] = {"wandb": _WandB, "trackio": _Trackio, "mlflow": _MLflow}
