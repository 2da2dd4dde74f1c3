"""Reward functions as a user might write them; the workers of test_rewards.py import them."""

import os
import subprocess
import sys
import time
from pathlib import Path


def length(completion, example):
    return len(completion) + example["bonus"]


def sleeps(completion, example):
    if completion == "sleep":
        time.sleep(600)
    return 1


def sleeps_with_a_child(completion, example):
    child = subprocess.Popen(["sleep", "600"])
    Path(example["children"]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def raises(completion, example):
    raise KeyError("no such key")


def is_greedy(completion, example):
    return len(bytearray(len(completion) * 2**30)) / 2**30


def dies(completion, example):
    if completion == "die":
        os._exit(3)
    return 1


def is_nan(completion, example):
    return float("nan")


def is_none(completion, example):
    return None


def is_huge(completion, example):
    return 1e300


def imports_jax(completion, example):
    """1 if JAX was there before, and 2 if it may take an accelerator."""
    return ("jax" in sys.modules) + 2 * (os.environ["JAX_PLATFORMS"] != "cpu")


not_callable = 3
