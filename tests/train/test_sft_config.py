"""Configuration by files and options: what is refused, and with which words; the shipped
recipes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pvm_jax.options import parse
from pvm_jax.presets import PRESETS
from train.config import Bucket
from train.sft import __main__ as sft
from train.sft.config import SFTConfig

CONFIGS = Path(__file__).parents[2] / "configs"
FILE = """
checkpoint: ckpt
run_dir: run
data:
  sources: data.jsonl
  buckets:
  - {tokens: 128, patches: 64}
"""


@pytest.fixture
def read(tmp_path):
    """(options, text of the YAML file) -> config."""

    def read(*options, text=FILE):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return parse(
            SFTConfig, ["--config", str(file), *options], prog="sft", description="", examples=""
        )[0]

    return read


def test_options_override_the_file(read):
    config = read("--optimizer.learning_rate", "2e-5", "--trainable=all", "--mesh.tensor=2")
    assert (config.optimizer.learning_rate, config.trainable, config.mesh.tensor) == (
        2e-5,
        "all",
        2,
    )
    assert config.data.buckets == [Bucket(128, 64)]


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        (["--optimizer.learnin_rate=1"], FILE, "Did you mean 'optimizer.learning_rate'?"),
        (["--bacth_size=1"], FILE, "Did you mean 'batch_size'?"),
        (
            [],
            FILE.replace("run_dir", "run_dr"),
            "Option 'run_dr' is not accepted. Did you mean 'run_dir'?",
        ),
        ([], FILE.replace("sources:", "sourses:"), "Did you mean 'data.sources'?"),
        ([], FILE.replace("tokens", "tokns"), "Did you mean 'tokens'?"),
        ([], FILE.replace("checkpoint: ckpt", ""), "required: checkpoint"),
        (["--trainable=pwm"], FILE, "trainable"),
        (
            ["--batch_size=10", "--accumulation=4"],
            FILE,
            "batch_size 10 must be a multiple of accumulation 4",
        ),
        (["--optimizer.warmup=10"], FILE, "optimizer.warmup is a share of the steps"),
        (["--optimizer.learning_rate=-1"], FILE, "optimizer.learning_rate must not be negative"),
        (["--optimizer.b2=1"], FILE, "optimizer.b2 must be in [0, 1)"),
        (["--optimizer.clip_norm=.nan"], FILE, "optimizer.clip_norm must be finite, got nan"),
        (
            ["--data.sources=[{path: a, weight: .inf}]"],
            FILE,
            "sources: the weight of a must be a finite number above 0, got inf",
        ),
        (["--data.sources=[{path: a, wieght: 1}]"], FILE, "a source is a path, or path and weight"),
        (
            ["--held_out.sources=a", "--held_out.every=0"],
            FILE,
            "held_out: needs sources, every >= 1, samples >= 0 and max_new_tokens >= 1",
        ),
        (["--seed=-1"], FILE, "seed must be in [0, 2^31), got -1"),
        (["--run_dir="], FILE, "run_dir: a path is empty"),
        ([], FILE.replace("64}", "63}"), "patches a multiple of 4"),
        (["--data.hide_images=2"], FILE, "data.hide_images is a share of the rows in [0, 1]"),
        (
            ["--data.hide_images={until: 1}"],
            FILE,
            "data.hide_images.until is a share of the steps in (0, 1), got 1.0",
        ),
        (
            ["--data.hide_images.until=.5", "--data.hide_images.then=-1"],
            FILE,
            "data.hide_images.then is a share of the rows in [0, 1], got -1.0",
        ),
        (["--data.hide_images={untl: 0.5}"], FILE, "Did you mean 'until'?"),
    ],
)
def test_what_is_wrong_is_named(read, options, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(*options, text=text)


def test_help_has_examples_and_print_config_is_complete(capsys):
    for option in ("--help", "--print_config"):
        with pytest.raises(SystemExit) as exit_info:
            sft.main(["--config", str(CONFIGS / "sft_qwen3_vl_4b.yaml"), option])
        assert exit_info.value.code == 0
    output = capsys.readouterr().out
    assert (
        "python -m train.sft --config configs/sft_qwen3_vl_4b.yaml --trainable decoder"
        " --mesh.tensor 4\n" in output
    )
    assert "eps: 1.0e-08" in output


def test_a_config_that_comes_with_the_package_has_a_name(tmp_path, monkeypatch, capsys):
    """From any folder; a file of that name there comes first, and another name is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("checkpoint: my checkpoint\n")
    words = {}
    for name in ("sft_qwen3_vl_8b", "mine", "sft_qwen3_vl_9b"):
        with pytest.raises(SystemExit):
            sft.main(["--config", name, "--print_config"])
        words[name] = capsys.readouterr()
    assert "checkpoint: checkpoints/qwen3_vl_8b" in words["sft_qwen3_vl_8b"].out
    assert "checkpoint: my checkpoint" in words["mine"].out
    assert "no config of that name comes with the package; there are grpo_qwen3_vl_2b, " in (
        words["sft_qwen3_vl_9b"].err
    )


@pytest.mark.parametrize("size", PRESETS)
def test_shipped_recipes_are_the_published_one(size):
    """Those of 2B and 32B, which the paper does not have, by the same settings."""
    file = CONFIGS / f"sft_qwen3_vl_{size}.yaml"
    config, _ = parse(SFTConfig, [f"--config={file}"], prog="sft", description="", examples="")
    assert config.checkpoint == f"checkpoints/qwen3_vl_{size}"
    optimizer = config.optimizer
    assert (config.trainable, config.batch_size, config.epochs, config.dtype) == (
        "pvm",
        64,
        1,
        "bfloat16",
    )
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup) == (1e-4, "cosine", 0.1)


@pytest.mark.parametrize("size", PRESETS)
def test_the_recipe_that_looks_first_hides_all_images_at_first_and_changes_nothing_else(size):
    def read(name):
        options = [f"--config={CONFIGS / name}.yaml"]
        return parse(SFTConfig, options, prog="sft", description="", examples="")[0]

    published, first = (read(f"sft_qwen3_vl_{size}{suffix}") for suffix in ("", "_look_first"))
    data = first.data
    assert [data.hidden_share(step, 8000) for step in (0, 3999, 4000, 7999)] == [1, 1, 0, 0]
    assert published == replace(
        first, run_dir=published.run_dir, data=replace(data, hide_images=0.0)
    )
