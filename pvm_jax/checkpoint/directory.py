"""A checkpoint directory's plain files: how it comes into being, config.json, the tokenizer's and
processor's files."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from absl.logging import get_absl_logger
from jax.experimental.multihost_utils import sync_global_devices

from pvm_jax.config import ModelConfig
from pvm_jax.files.bucket import BucketError
from pvm_jax.files.cache import SETTINGS_SUFFIXES
from pvm_jax.files.lock import sole_writer
from pvm_jax.files.paths import any_path, on_bucket
from pvm_jax.files.writing import copy_file, remove_tree
from pvm_jax.hf_config import BRANCH_CHOICES

_MAX_LINES = 100
UNFINISHED = "UNFINISHED"
"""The file that says of a directory in a bucket that it is not whole."""
PEFT = "adapter_config.json"
"""What makes a directory an adapter of the peft library."""


def _message_alone(record: logging.LogRecord) -> bool:
    record.exc_info = record.exc_text = None
    return True


# What fails in Orbax's threads they log, with a hundred lines of where, and raise too.
get_absl_logger().addFilter(_message_alone)


class CheckpointError(ValueError):
    """A directory is no (whole) checkpoint, or not one of this model."""


def reason_of(error: BaseException) -> str:
    """The first line of what was wrong to begin with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


@contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """A directory to fill beside `path`, which takes its place when the block ends well and
    vanishes when it does not.

    In a bucket, which renames nothing, it is `path` itself, and the file UNFINISHED is in it until
    the end.

    Raises:
        FileExistsError: if `path` is there and not an empty directory.
        OSError: if another process writes there.
        ValueError: for a URL that is no bucket's (`any_path`).
    """
    target = any_path(path).absolute()
    with sole_writer(target):
        refuse_taken(target)
        aside, primary = aside_of(target), jax.process_index() == 0
        if primary:
            _begin(aside)
        sync_global_devices(f"made {aside}")
        try:
            yield aside
        except BaseException:
            if primary:
                _discard(aside)
            raise
        sync_global_devices(f"wrote {aside}")
        if primary:
            _finish(aside, target)
        sync_global_devices(f"finished {target}")


def _begin(aside: Path) -> None:
    """Makes it, empty; what an interrupted write left there is removed."""
    remove_tree(aside)
    aside.mkdir(parents=True)
    if on_bucket(aside):
        (aside / UNFINISHED).write_text("being written, or left by a process that was ended\n")


def _finish(aside: Path, target: Path) -> None:
    if on_bucket(aside):
        (aside / UNFINISHED).unlink()
    else:
        os.replace(aside, target)


def refuse_unfinished(directory: Path) -> None:
    """Raises a CheckpointError for what `write_aside` did not finish."""
    aside = aside_of(directory)
    left = aside / UNFINISHED if on_bucket(directory) else aside
    if left.exists():
        raise CheckpointError(
            f"{directory} was never finished: {left} is what an interrupted write left. Run it"
            " again"
        )


def refuse_taken(target: Path) -> None:
    """Raises FileExistsError if `target` is there and not an empty directory, nor what an
    interrupted write left in a bucket."""
    if on_bucket(target) and (target / UNFINISHED).exists():
        return
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(
            f"{target.absolute()} exists and is not empty: choose another place or remove it"
        )


def _discard(directory: Path) -> None:
    """Removes a directory into which Orbax's threads may write for a moment after one of them has
    failed."""
    for _ in range(20):
        try:
            remove_tree(directory)
        except BucketError:
            return  # it is marked as unfinished
        time.sleep(0.05)
        if not directory.exists():
            return


def copy_assets(source: str | Path, target: Path) -> None:
    """Copies the tokenizer's, processor's and generation's files, not the weights, their index or
    config.json."""
    for file in sorted(any_path(source).iterdir()):
        own = file.name == "config.json" or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in SETTINGS_SUFFIXES and not own:
            copy_file(file, target / file.name)


def write_config(directory: Path, config: ModelConfig, original: Mapping[str, Any]) -> None:
    """Writes `config` as Hugging Face's config.json, over the keys of `original` (a parsed
    config.json), which stay.

    Where the original speaks of RoPE in transformers 5's way (`rope_parameters`), so does what is
    written.
    """
    ours = config.to_hf()
    merged = {**original, **ours}
    for section in ("text_config", "vision_config"):
        theirs = original.get(section) or {}
        # transformers 4 and 5 call the vision section by different names, and read either.
        merged[section] = {
            **theirs,
            **ours[section],
            "model_type": theirs.get("model_type", ours[section]["model_type"]),
        }
    text = merged["text_config"]
    if text.get("rope_parameters"):
        rope = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
        text["rope_parameters"] = text["rope_parameters"] | rope
    # Those of the original's branch, if this is without one.
    for key in ("pvm_layers", "pvm_hidden_size", *BRANCH_CHOICES):
        if key not in ours["text_config"]:
            text.pop(key, None)
    for part in (merged, merged["text_config"], merged["vision_config"]):
        part.pop("torch_dtype", None)
        if "dtype" in part:
            part["dtype"] = ours["dtype"]
    (directory / "config.json").write_text(json.dumps(merged, indent=2) + "\n")


def compare_shapes(
    what: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    also: list[str] | None = None,
) -> None:
    """Raises a CheckpointError that lists every missing, unexpected and misshaped tensor, and the
    lines in `also`."""
    lines = [f"  missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    lines += [
        f"  unexpected: {name} {shape}" for name, shape in found.items() if name not in expected
    ]
    lines += [
        f"  wrong shape: {name}: expected {shape}, found {found[name]}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    lines += [f"  {line}" for line in also or ()]
    if lines:
        rest = [f"  and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
        shown = [
            f"{what} does not fit its config.json ({len(lines)} problems):",
            *lines[:_MAX_LINES],
            *rest,
        ]
        raise CheckpointError("\n".join(shown))


def refuse_peft(directory: Path) -> None:
    """Raises a CheckpointError if `directory` holds an adapter of the peft library."""
    if (directory / PEFT).exists():
        raise CheckpointError(
            f"{directory} holds a PEFT adapter ({PEFT}): python -m convert.adapter {directory} DST"
            " --checkpoint CHECKPOINT makes one of it that stands beside a checkpoint"
        )


def aside_of(target: Path) -> Path:
    """Where `write_aside` fills what becomes `target`."""
    return target if on_bucket(target) else target.with_name(f".{target.name}.partial")
