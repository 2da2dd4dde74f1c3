"""Whose a run directory is: one process's at a time, and one run's for good once it has a step
there."""

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import sync_global_devices

from pvm_jax.data.stored import Conversations
from pvm_jax.files.lock import sole_writer
from pvm_jax.files.writing import write_whole
from train.data.contents import contents_of
from train.data.loading import open_sources
from train.run.checkpoints import whole_steps

NOTE = "run.json"
SIZES = "sizes.npy"
"""The lengths of the run's examples, in its directory."""
_ID = "id"

# What may change between a run and its continuation: none of it changes what is computed.
_FREE_KEYS = {
    "accumulation",
    "attention",
    "checkpoint_every",
    "distributed",
    "held_out",
    "keep",
    "log",
    "log_every",
    "loss_chunk",
    "mesh",
    "not_finite",
    "remat",
    "reward_memory",
    "reward_time_limit",
    "reward_workers",
    "rollout_mesh",
    "rollout_parts",
    "run_dir",
}
_FREE_DATA_KEYS = {"threads", "prefetch", "measure_anew", "videos"}


@contextmanager
def claimed(
    config: Any, run_dir: Path, steps: Path, *, every_column: bool = False
) -> Iterator[list[Conversations]]:
    """Keeps other processes out of `run_dir` for the block, and other runs for good: a note says
    what is computed there, from which data. A run without a step in `steps` owns nothing; the next
    one takes its place. Gives the sources of the data, opened.

    Args:
        config: a recipe's, with its `data`.
        every_column: as `open_conversations` takes it.

    Raises:
        OSError: if a run is going on there, `run_dir` cannot be written, or it is not the same
            directory for all processes.
        ValueError: if it holds another run, or its data have changed and `data.measure_anew` does
            not say to go on; else as `open_conversations`.
    """
    # All are connected before one of them may have to watch an old lock.
    sync_global_devices("connected")
    with sole_writer(run_dir, lock=run_dir / ".lock", otherwise="give another --run_dir"):
        sources = open_sources(config.data, every_column=every_column)
        mine = _computed(config, sources)
        if jax.process_index() == 0:
            _take(config, mine, run_dir, steps)
        sync_global_devices(f"claimed {run_dir}")
        note = run_dir / NOTE
        if not note.exists():
            raise FileNotFoundError(
                f"{note}: process 0 wrote it, process {jax.process_index()} does not see it:"
                " run_dir must be on a file system that all hosts share"
            )
        _compare(config, mine, note)
        yield sources


def run_id(run_dir: Path) -> str:
    """What trackers know the run by that `run_dir` was claimed for: the same whenever it goes on.
    (A run that began before runs had one has its directory's name.)"""
    return json.loads((run_dir / NOTE).read_text()).get(_ID, run_dir.name)


def _computed(config: Any, sources: Sequence[Conversations]) -> dict[str, Any]:
    """What a run with other values is another run than `config`'s by."""
    mine = {key: value for key, value in asdict(config).items() if key not in _FREE_KEYS}
    data = {key: value for key, value in mine["data"].items() if key not in _FREE_DATA_KEYS}
    contents = [contents_of(source, config.data.threads) for source in sources]
    return mine | {"data": data, "contents": contents}


def _take(config: Any, mine: dict[str, Any], run_dir: Path, steps: Path) -> None:
    """Writes the note, and forgets the sizes of other examples, where there is no run or the user
    says to measure anew."""
    note = run_dir / NOTE
    begun = bool(whole_steps(steps))
    other = _changed(mine, note) if note.exists() else list(mine)
    new_data = config.data.measure_anew and not set(other) - {"contents"}
    if (begun and not new_data) or not (other or new_data):
        return
    try:
        (run_dir / SIZES).unlink(missing_ok=True)
        known = {_ID: run_id(run_dir) if begun else secrets.token_hex(4)}
        write_whole(note, (json.dumps(mine | known, indent=2) + "\n").encode())
    except OSError as error:
        raise OSError(
            f"run_dir {run_dir} cannot be written ({error}): give another --run_dir, or free space"
        ) from error


def _compare(config: Any, mine: dict[str, Any], note: Path) -> None:
    """Raises ValueError unless `note` says the same as `mine`."""
    other = _changed(mine, note)
    if other == ["contents"]:
        theirs = json.loads(note.read_text())["contents"]
        paths = [
            source.path
            for source, old, new in zip(config.data.mixture, theirs, mine["contents"], strict=True)
            if old != new
        ]
        raise ValueError(
            f"{', '.join(paths)} no longer holds what the run in {note.parent} has read: put that"
            " back, or set data.measure_anew to true to go on with what is there now (an example"
            " may then be read twice, or never), or give another --run_dir"
        )
    if other:
        raise ValueError(
            f"{note.parent} holds a run with another {', '.join(other)} (see {note}): continue it"
            " with the same values, or give another --run_dir"
        )


def _changed(mine: dict[str, Any], note: Path) -> list[str]:
    """The keys of `mine` that `note` gives another value, or none."""
    try:
        other = json.loads(note.read_text())
    except ValueError as error:
        raise ValueError(
            f"{note} is damaged ({error}): remove it to continue with what this command says, or"
            " give another --run_dir"
        ) from error
    return [key for key in mine if mine[key] != other.get(key)]
