"""Every path in a bucket: converted, trained by two processes that are killed while they write a
step, asked and measured as on a local disk, bit for bit."""

import json
import time

import jax
import numpy as np
import pytest
from flax import nnx

from convert import dataset, hf_to_orbax, orbax_to_hf
from pvm_jax import load
from pvm_jax.__main__ import main
from pvm_jax.data.processor import Processor
from tests.pvm_jax.test_in_buckets import put
from tests.train import runs
from train.run.checkpoints import whole_steps
from train.run.events import read_starts

STEPS = 8


def prepare(place, target):
    """The checkpoint of the Hugging Face directory in `place`, and its data in shards."""
    hf_to_orbax.convert(place / "export", target / "ck")
    processor = Processor.from_pretrained(target / "ck")
    dataset.convert(place / "data.jsonl", target / "shards", processor)


def started(root, place, name):
    paths = {"checkpoint": "ck", "run_dir": "run", "data.sources": "shards"}
    options = [f"--{key}={place / value}" for key, value in paths.items()]
    return runs.start(root, name, *options, f"--max_steps={STEPS}", "--epochs=6", processes=2)


def ask_and_measure(place):
    """What the trained branch answers, and the report's numbers."""
    model = [f"--checkpoint={place / 'ck'}", f"--branch={place / 'run' / 'branch'}"]
    questions = [f"--input={place / 'shards'}", f"--output={place / 'answers.jsonl'}"]
    main(["generate", *model, *questions, "--max_new_tokens=8", "--batch_size=16"])
    what = ["--only", "accuracy", f"--data={place / 'shards'}", f"--output={place / 'report'}"]
    main(["measure", *model, *what, "--limit=4"])
    lines = (place / "answers.jsonl").read_bytes().splitlines()
    report = json.loads((place / "report" / "report.json").read_bytes())
    return [json.loads(line)["answers"] for line in lines], report["sections"]


@pytest.mark.slow
def test_as_on_a_disk(bucket, tmp_path):
    here = tmp_path / "here"
    runs.write_workplace(tmp_path, examples=32)
    orbax_to_hf.convert(tmp_path / "base", tmp_path / "export")
    put(tmp_path / "export", bucket / "export")
    for file in [tmp_path / "data.jsonl", *tmp_path.glob("*.png")]:
        (bucket / file.name).write_bytes(file.read_bytes())
    prepare(tmp_path, here)
    prepare(bucket, bucket)
    runs.finish(tmp_path, "here", started(tmp_path, here, "here"))

    processes = started(tmp_path, bucket, "there")
    steps, end = bucket / "run" / "steps", time.monotonic() + 300
    while not (steps / "4").exists() and time.monotonic() < end:
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.wait()
    whole = whole_steps(steps)
    print("killed with whole steps", whole, "of", sorted(step.name for step in steps.iterdir()))
    assert whole[-1] in (2, 4)
    runs.finish(tmp_path, "there", started(tmp_path, bucket, "there"))

    assert read_starts(bucket / "run" / "log") == [0, whole[-1]]
    assert runs.losses(bucket, "run") == runs.losses(here, "run")
    assert whole_steps(steps) == whole_steps(here / "run" / "steps") == [STEPS - 2, STEPS]
    trained = [load(at / "ck", branch=at / "run" / "branch") for at in (here, bucket)]
    for mine, other in zip(*(jax.tree.leaves(nnx.state(one)) for one in trained), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert ask_and_measure(here) == ask_and_measure(bucket)
