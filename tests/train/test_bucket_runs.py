"""Every path in a bucket: converted, trained by two processes that are killed while they write a
step, asked and measured as on a local disk, bit for bit."""

import json
import signal
import time

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from convert import dataset, hf_to_orbax, orbax_to_hf
from pvm_jax import load
from pvm_jax.__main__ import main
from pvm_jax.data.processor import Processor
from pvm_jax.files.bucket import BucketError
from tests.bucket_server import both_buckets
from tests.pvm_jax.test_in_buckets import put
from tests.tiny import CONFIG
from tests.train import runs
from tests.train.forks import Fork
from tests.train.saving import save_steps
from train.run.checkpoints import TrainCheckpoints, whole_steps
from train.run.events import EventWriter, read_starts

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


@both_buckets
def test_two_processes_that_are_killed_while_they_write_a_step(bucket, server, tmp_path):
    """SIGKILL comes with the first request to write after the step's first file is there."""
    steps, processes = bucket / "run" / "steps", []
    address = f"127.0.0.1:{runs.free_port()}"

    def torn():
        return [key for key in server.keys(bucket.name) if key.startswith("run/steps/4/")]

    def fault(method, path):
        if method not in ("POST", "PUT") or not torn():
            return None
        for process in processes:
            process.kill()
        return 503

    server.fault = fault
    for number in range(2):
        environment, output = runs.environment(devices=1), tmp_path / str(number)
        call = (save_steps, address, number, str(steps))
        processes.append(Fork(*call, environment=environment, output=output))
    assert [process.wait(600) for process in processes] == [-signal.SIGKILL] * 2
    server.fault = lambda method, path: None
    assert torn()
    assert whole_steps(steps) == [2]
    sharding = SingleDeviceSharding(jax.devices()[0])
    abstract = {"w": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding)}
    with TrainCheckpoints(steps, CONFIG, "backbone") as checkpoints:
        assert checkpoints.steps == [2]
        state = checkpoints.restore(abstract)
        np.testing.assert_array_equal(state["w"], np.full((8, 4), 2))
        checkpoints.save(4, state)
    assert whole_steps(steps) == [2, 4]


@pytest.mark.slow
@both_buckets
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


def test_events_that_a_closed_bucket_does_not_take_ask_for_no_room(bucket, storage):
    storage.fault = lambda method, path: 403
    told = r"is closed to this user .*; the same command then continues from the last step"
    with pytest.raises(BucketError, match=told) as error:
        EventWriter(bucket / "log", start=0)
    assert "free space" not in str(error.value)
