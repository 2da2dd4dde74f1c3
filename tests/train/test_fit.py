"""What a run takes of each device, ahead of time: compiled for this machine's simulated devices;
for a TPU where libtpu is."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from pvm_jax.config import ModelConfig
from pvm_jax.sharding import make_mesh
from tests import tiny
from tests.hub_server import hub
from train.config import Bucket, DataConfig
from train.fit import __main__ as fit
from train.fit.__main__ import FitConfig, read_model_config
from train.fit.footprint import largest
from train.fit.sft import measure
from train.sft.program import SFTProgram
from train.step.compile_ahead import gpu_devices, refused_bytes, tpu_devices

__all__ = ["hub"]
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "shape_8b"
BUCKET, GIB = Bucket(32, 16), 2**30
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def fit_config(**kwargs) -> FitConfig:
    data = DataConfig("not_read", [BUCKET, Bucket(16, 16)])
    return FitConfig(
        **{"checkpoint": "not_read", "run_dir": "not_written", "data": data}
        | {"topology": "v5e:4x4", "batch_size": 32}
        | kwargs
    )


@pytest.fixture(scope="module")
def model_config() -> ModelConfig:
    return tiny.golden_config()


@pytest.fixture(scope="module")
def branch(model_config):
    """Config, mesh and footprint of fine-tuning the branch on data 2 x fsdp 2, two rows of a device
    at a time."""
    config, mesh = (
        fit_config(batch_size=16, accumulation=2, remat="none"),
        make_mesh(2, 2, devices=jax.devices()[:4]),
    )
    return config, mesh, measure(config, model_config, BUCKET, mesh, usable=GIB)


def test_parts_are_what_a_device_holds_of_real_arrays(branch, model_config):
    config, mesh, footprint = branch
    program = SFTProgram.of(config, model_config, 1, mesh)

    def held(tree) -> int:
        arrays = jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), tree
        )
        return sum(
            shard.data.nbytes for x in jax.tree.leaves(arrays) for shard in x.addressable_shards[:1]
        )

    assert footprint.rows == 2
    assert footprint.frozen == held(program.frozen) > 0
    assert footprint.params == held(program.state.params)
    assert (
        footprint.moments
        == held((program.state.opt_state, program.state.step))
        > 2 * footprint.params
    )
    assert footprint.batch == held(program.abstract_batch(BUCKET, config.batch_size))
    assert (
        footprint.temporaries > 2 * footprint.params
    )  # gradients, and their sum over micro-batches


def test_what_does_not_fit_says_what_would_help(branch):
    config = replace(branch[0], trainable="all", remat="full")
    footprint = replace(
        branch[2],
        config=config,
        frozen=0,
        params=GIB,
        moments=2 * GIB,
        temporaries=10 * GIB,
        batch=0,
        usable=14 * GIB,
    )
    assert footprint.fits
    assert footprint.verdict()[-1] == "fits: 1.00 GiB of 14.00 GiB are left"
    tight = replace(footprint, usable=9 * GIB)
    assert not tight.fits
    advice = "\n".join(tight.verdict())
    assert "does not fit: 4.00 GiB more than the usable 9.00 GiB" in advice
    # Of 10 GiB of temporaries two are gradients; half of the rest goes with one of two rows.
    assert "accumulation: 4, 1 rows at a time in place of 2 (about 4.00 GiB less, enough)" in advice
    # 5 GiB of parameters, moments and gradients lie in two copies.
    assert (
        "mesh: {data: 1, fsdp: -1}, parameters in 2 times as many parts (about 2.50 GiB less)"
        in advice
    )
    # 8 GiB go with rows, so 1 GiB of 9 is left for what four devices hold 5 GiB each of.
    assert "20 such chips" in advice
    assert "trainable: pvm or lora (about 4.50 GiB less, enough)" in advice
    assert "data.buckets without {tokens: 32, patches: 16}" in advice
    assert "remat: full" not in advice
    one_row = replace(tight, rows=1, config=replace(tight.config, remat="dots", trainable="pvm"))
    advice = "\n".join(one_row.advice())
    assert "remat: full" in advice
    assert "mesh.tensor: 2 and accumulation: 4" in advice
    assert "trainable" not in advice
    refused = replace(footprint, refusal="RESOURCE_EXHAUSTED: fragmented")
    assert not refused.fits
    assert "the compiler refuses: RESOURCE_EXHAUSTED: fragmented" in "\n".join(refused.verdict())


def test_the_compilers_refusals_are_read():
    used = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
        " Exceeded hbm capacity by 4.75G."
    )
    temporaries = (
        "the total memory required for HLO temporaries (512.0M) exceeds available HBM (15.75G)."
    )
    assert refused_bytes(used, 0) == 20.5 * GIB
    assert refused_bytes(temporaries, GIB) == 1.5 * GIB
    assert refused_bytes("INTERNAL: Mosaic failed to compile", 0) is None


def test_command_prints_the_table_and_exits_by_whether_it_fits(
    branch, monkeypatch, capsys, refused
):
    """Of a recipe whose hidden images follow a schedule, too."""
    monkeypatch.setattr(fit, "tpu_devices", lambda topology: jax.devices())
    for usable, status, recipe in (
        (GIB, 0, "sft_qwen3_vl_8b_look_first"),
        (10, 1, "sft_qwen3_vl_8b"),
    ):
        config = str(ROOT / "configs" / f"{recipe}.yaml")
        arguments = ["--config", config, "--model", "8b", "--topology", "v5e:2x4"]
        monkeypatch.setattr(fit, "usable_bytes", lambda mesh, usable=usable: usable)
        monkeypatch.setattr(
            "train.fit.sft.measure", lambda *_, usable: replace(branch[2], usable=usable)
        )
        with pytest.raises(SystemExit) as exit_:
            fit.main(arguments)
        assert exit_.value.code == status
    out = capsys.readouterr().out
    assert "rows of 16,384 tokens and 16,384 patches, 64 a step, 1 a chip at a time" in out
    for part in (
        "frozen parameters",
        "trained parameters",
        "optimizer state",
        "batch",
        "temporaries",
        "total",
        "fits",
        "does not",
    ):
        assert part in out
    assert (
        "1 rows do not divide over the mesh's data x fsdp = 8: accumulation must divide 8"
        in refused(fit.main, [*arguments, "--accumulation", "64"])
    )


def test_only_shapes_that_no_other_covers_are_compiled():
    small, wide, long = Bucket(16, 64), Bucket(32, 64), Bucket(64, 16)
    assert largest([small, wide, long, Bucket(64, 16)]) == [wide, long, long]
    assert largest([small, wide]) == [wide]


def test_model_is_the_checkpoints_or_a_preset_or_a_config_file(tmp_path):
    assert read_model_config(fit_config(model="8b")) == ModelConfig.preset("8b")
    assert read_model_config(fit_config(checkpoint=str(GOLDEN))) == ModelConfig.from_hf(GOLDEN)
    plain = fit_config(model=str(ROOT / "demo" / "base" / "config.json"))
    assert read_model_config(plain).text.pvm_layers  # as conversion would give it
    golden = ModelConfig.from_hf(GOLDEN)
    preceding = replace(
        golden, text=replace(golden.text, pvm_visibility="preceding", pvm_gate="token")
    )
    (tmp_path / "config.json").write_text(json.dumps(preceding.to_hf()))
    branched = read_model_config(replace(plain, branch=str(tmp_path))).text
    assert (branched.pvm_layers, branched.pvm_hidden_size) == (
        golden.text.pvm_layers,
        golden.text.pvm_hidden_size,
    )
    assert branched.pvm_visibility == "preceding"  # which decides what kernel attends
    assert branched.pvm_gate == "token"
    with pytest.raises(
        FileNotFoundError, match="no checkpoint at nowhere: say what it will be, as in --model 8b"
    ):
        read_model_config(fit_config(checkpoint="nowhere"))
    with pytest.raises(ValueError, match="model '9b': no such file, and unknown preset"):
        read_model_config(fit_config(model="9b"))


def test_a_model_of_the_hub_is_its_config_alone(hub):
    hub.repositories["models/demo/small"] = ROOT / "demo" / "base"
    found = read_model_config(fit_config(model="demo/small"))
    assert found == ModelConfig.from_hf(ROOT / "demo" / "base").with_pvm()
    assert hub.files_given() == {"config.json"}
    with pytest.raises(OSError, match="demo/nothing: nothing of this name is here, and as a model"):
        read_model_config(fit_config(model="demo/nothing"))


def test_devices_are_asked_for_in_one_way_and_their_absence_says_what_to_install():
    for kwargs in ({"topology": None}, {"devices": 8}):
        with pytest.raises(ValueError, match="give either topology"):
            fit_config(**kwargs)
    with pytest.raises(RuntimeError, match=r"JAX sees no GPU here.*jax\[cuda13\]"):
        gpu_devices(8)
    if not HAS_LIBTPU:
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jax\[tpu\]=="):
            tpu_devices("v5e:4x4")


needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu, the TPU's compiler")


@needs_libtpu
def test_a_program_for_tpus_has_their_attention_kernel(model_config):
    mesh = make_mesh(devices=tpu_devices("v5e:2x2"))
    config = fit_config()
    program = SFTProgram.of(config, model_config, 1, mesh)
    with jax.set_mesh(mesh):
        lowered = program.step.lower(
            program.state, program.frozen, program.abstract_batch(BUCKET, config.batch_size)
        )
    assert "tpu_custom_call" in lowered.as_text()


@needs_libtpu
def test_a_tpu_slice_without_a_tpu():
    def run(*arguments: str) -> subprocess.CompletedProcess:
        data = (
            "--data.sources=not_read",
            "--data.buckets=[{tokens: 128, patches: 128}]",
            "--checkpoint=not_read",
            "--run_dir=not_written",
        )
        command = (sys.executable, "-m", "train.fit", "--model", str(GOLDEN), *data, *arguments)
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("XLA_FLAGS", "JAX_PLATFORMS")
        }
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    small = run("--topology", "v5e:2x2", "--batch_size", "4")
    assert small.returncode == 0, small.stderr
    assert "4 x TPU v5 lite of 15.75 GiB usable" in small.stdout
    assert "\nfits: 15." in small.stdout
    large = run("--topology", "v5e:2x2", "--batch_size", "400000", "--attention", "xla")
    assert large.returncode == 1, large.stderr
    assert "does not fit" in large.stdout
    assert "accumulation" in large.stdout
    unknown = run("--topology", "v5e:3")
    assert unknown.returncode == 2
    assert "topology 'v5e:3'" in unknown.stderr
