"""The wheel: what is in it, and that it works where nothing else of the repository is."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

from demo.task import Mixture, make_example, write

ROOT = Path(__file__).parents[1]
PACKAGES = ("pvm_jax", "convert", "train")
WITHOUT_NETWORK = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from what the repository has, beside it."""
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*PACKAGES, "configs", "demo"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip(sys.executable, "wheel", "--no-build-isolation", "--wheel-dir", target, source)
    return next(target.glob("*.whl"))


def pip(python: str | Path, command: str, *arguments: object) -> None:
    words = [sys.executable, "-m", "pip", "--python", python, command, *WITHOUT_NETWORK, *arguments]
    subprocess.run([str(word) for word in words], check=True)


def test_it_holds_the_packages_and_the_configs_and_no_demo(wheel):
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in Path(ROOT / package).rglob("*.py")
    }
    configs = {f"train/configs/{file.name}" for file in (ROOT / "configs").iterdir()}
    assert names == code | configs | {"pvm_jax/py.typed"}


@pytest.mark.slow
def test_it_converts_and_trains_in_another_folder(wheel, tmp_path):
    """A folder with a `train.py` of the user's own, who grades by a function of theirs."""
    python, pvm = fresh_environment(tmp_path / "venv")
    pip(python, "install", wheel)
    place = tmp_path / "place"
    place.mkdir()
    (place / "train.py").write_text("raise SystemExit('this is not the train that was asked for')")
    (place / "grades.py").write_text("def length(completion, example):\n    return len(completion)")
    write([make_example(Mixture(sizes=(1,), lines=(1, 1)), i) for i in range(8)], place)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [pvm, *arguments],
            cwd=place,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    run("convert", str(ROOT / "demo" / "base"), "base", "--pvm_layers", "1")
    small = ("--config=sft_qwen3_vl_8b", "--checkpoint=base", "--data.sources=data.jsonl")
    small += ("--data.buckets=[{tokens: 32, patches: 4}]", "--accumulation=1", "--max_steps=2")
    run("train", "sft", *small, "--run_dir=run", "--batch_size=8", "--epochs=2")
    assert json.loads((place / "run" / "branch" / "config.json").read_text())
    refine = ("--config=grpo_qwen3_vl_8b", "--branch=run/branch", "--run_dir=refined", *small[1:])
    refine += ("--rewards=[{function: 'grades:length'}]", "--held_out=null", "--group_size=2")
    run("train", "grpo", *refine, "--max_completion_tokens=8", "--prompts_per_step=8")
    assert (place / "refined" / "model" / "config.json").exists()


def fresh_environment(venv: Path) -> tuple[Path, Path]:
    """(python, pvm) of a new virtual environment that sees what this one has installed, without
    what is installed to be edited: a path in a .pth file reads no other .pth files."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    paths = {"base": str(venv), "platbase": str(venv)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = Path(sysconfig.get_path("scripts", vars=paths))
    return scripts / "python", scripts / "pvm"
