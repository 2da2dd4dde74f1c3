"""Configs and command lines of the recipes, damaged: each means what it says, or is refused in one
line that names file or key."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from pvm_jax.options import parse
from tests.fuzz.mutations import VALUES, damaged, mutated, one_of, outcome, shuffled
from train.grpo.config import GRPOConfig
from train.published import with_config_files
from train.sft.config import SFTConfig

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "configs/sft_lora_qwen3_vl_4b.yaml": SFTConfig,
    "configs/grpo_qwen3_vl_4b.yaml": GRPOConfig,
    "demo/branch.yaml": SFTConfig,
    "demo/grpo.yaml": GRPOConfig,
}
KEYS = ("seed", "data", "sources", "path", "weight", "lora", "rank", "mesh", "config", "held_out")
KEYS += ("optimizer", "learning_rate", "rewards", "max_steps", "dry_run", "branch", "buckets", "")
CONTENTS = (*VALUES[:4], *VALUES[5:8], "none", "float32", "pvm", "1e-4", "gs://a/b", "${a}", "*a")
CONTENTS += (*VALUES[12:], {"path": "a", "weight": 2}, [{"tokens": 8, "patches": 4}], "~/x", "on")


def read(cls, argv):
    """What a recipe is told by `argv`."""
    flags = {"dry_run": "try it"}
    words = with_config_files(argv)
    return parse(cls, words, prog="train", description="", examples="", flags=flags)[0]


def leaves(value, above=""):
    """{dotted key: value} of all values that are no sections."""
    if isinstance(value, dict) and value:
        parts = value.items()
    elif is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, list) and value:
        parts = enumerate(value)
    else:
        return {above: value}
    found = [leaves(part, f"{above}.{key}".lstrip(".")) for key, part in parts]
    return {key: leaf for part in found for key, leaf in part.items()}


def says(given, taken):
    """Whether a value that was taken is what was given: texts are read as YAML where no text is
    wanted, `~` is the home."""
    if isinstance(given, str) and taken != given:
        given = Path(given).expanduser() if given[:1] == "~" else yaml.safe_load(given)
    if isinstance(given, str) and isinstance(taken, float):
        given = float(given)  # 1e-4 is a text in YAML 1.1
    return taken == given or str(taken) == str(given) or given in ({}, [])


def check_taken(case, config):
    """Raises AssertionError unless each value of the file is in the config as it was given."""
    taken = leaves(config)
    for key, value in leaves(case).items():
        key = re.sub(r"^sources$", "data.sources", key)
        if key in taken:
            assert says(value, taken[key]), key


@pytest.mark.parametrize(
    ("seed", "cases"), [pytest.param(0, 60), pytest.param(2, 600, marks=pytest.mark.slow)]
)
def test_a_damaged_config_is_refused_or_means_what_it_says(
    tmp_path, monkeypatch, seed, cases, peak
):
    monkeypatch.chdir(ROOT)
    rng = np.random.default_rng(seed)
    file = tmp_path / "config.yaml"
    for _ in range(cases):
        name = one_of(list(CONFIGS), rng)
        case = mutated(yaml.safe_load(Path(name).read_text()), rng, CONTENTS, KEYS)
        file.write_text(yaml.safe_dump(shuffled(case, rng)))
        keys = [str(file), *re.findall(r"\w+", str([*leaves(case), *case]))]
        keys += ["required", "Empty nested key", "path:"]
        found = outcome(lambda name=name: read(CONFIGS[name], ["--config", str(file)]), names=keys)
        if found.made is not None:
            check_taken(case, found.made)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_the_same_in_any_order_and_on_the_command_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    rng = np.random.default_rng(0)
    given = yaml.safe_load(Path(name).read_text())
    expected = read(CONFIGS[name], ["--config", name])
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(shuffled(given, rng)))
    assert read(CONFIGS[name], ["--config", str(tmp_path / "other.yaml")]) == expected
    sections = {
        f"{key}.{inner}": value
        for key, part in given.items()
        for inner, value in (part.items() if isinstance(part, dict) else [("", part)])
    }
    words = [
        f"--{key.rstrip('.')}={yaml.safe_dump(v, default_flow_style=True, width=10_000)}"
        for key, v in sections.items()
    ]
    words = [word.removesuffix("\n").removesuffix("\n...") for word in words]
    assert read(CONFIGS[name], words) == expected


WORDS = ("--seed", "--config", "--dry-run", "--data.buckets", "--held_out", "--", "-x", "3", "")
WORDS += (
    "[]",
    "{",
    "--data",
    "--optimizer.b1",
    "--epochs=",
    "--epochs=x",
    "true",
    "null",
    "--help=",
)


@pytest.mark.parametrize(
    ("seed", "cases"), [pytest.param(0, 60), pytest.param(2, 600, marks=pytest.mark.slow)]
)
def test_damaged_files_and_words_are_refused_by_name(tmp_path, monkeypatch, seed, cases, peak):
    monkeypatch.chdir(ROOT)
    rng = np.random.default_rng(seed)
    file = tmp_path / "config.yaml"
    for _ in range(cases):
        name = one_of(list(CONFIGS), rng)
        file.write_bytes(Path(name).read_bytes())
        argv = ["--config", str(file), "--epochs", "2", "--run_dir", "runs/a", "--mesh.fsdp=-1"]
        if rng.integers(2):
            file.write_bytes(damaged(file.read_bytes(), rng))
        else:
            at = int(rng.integers(len(argv) + 1))
            argv[at : at + int(rng.integers(2))] = [one_of(WORDS, rng)]
        names = [str(file), "required", "Empty nested key", "nothing"]
        names += re.findall(r"\w+", " ".join([*argv, file.read_text(errors="replace")]))
        outcome(lambda argv=argv, name=name: read(CONFIGS[name], argv), names=names)
