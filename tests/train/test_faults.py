"""What a run survives, by doing it to real processes: signals, kills, a full disk, damaged files.

`make faults` kills a run of SFT twenty times and one of GRPO ten times; the default suite the
former once. SIGTERM is sent in test_loop.py, which compares what comes after, and to one of two
processes in test_distributed.py.
"""

import os
import random
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from pvm_jax.checkpoint.directory import CheckpointError
from pvm_jax.checkpoint.store import load
from pvm_jax.config import ModelConfig
from pvm_jax.model.parameters import by_path
from tests.full_disk import full_disk
from tests.train import runs
from train.run.checkpoints import TrainCheckpoints
from train.run.events import EventWriter, read_starts
from train.sft import __main__ as sft


@pytest.fixture(scope="module")
def root(workplace_with_a_run):
    with runs.programs_kept(workplace_with_a_run):
        yield workplace_with_a_run


def kill(
    root: Path, run_dir: str, *more: str, kills: int, module: str = "train.sft"
) -> tuple[int, list[int]]:
    """Starts a run again and again and ends it `kills` times with SIGKILL at random moments.

    A third of the moments are while a checkpoint is written beside a complete one, a third some
    steps after it goes on, a third in the start of a process. Checks after each that the next life
    goes on at the newest step that was complete. Returns after how many kills a half-written
    checkpoint lay there, of that life or of one before it, and at which step each life begins, the
    next one too.
    """
    rng, half_written, begins = random.Random(kills + 1), 0, [0]
    for number in range(kills):
        (process,) = runs.start(root, run_dir, *more, module=module)
        try:
            _await_moment(
                root, run_dir, process, ("writing", "stepping", "starting")[number % 3], rng
            )
            assert process.poll() is None, (
                f"it ended before kill {number}: {runs.output_file(root, run_dir, 0).read_text()}"
            )
        finally:
            process.kill()
            process.wait()
        complete, torn = steps_on_disk(root / run_dir / "steps")
        half_written += bool(torn)
        started = read_starts(root / run_dir / "log")
        assert started == begins[: len(started)], (
            "a life went on from a step that was not the newest complete one"
        )
        begins = [*started, max(complete, default=0)]
        print(f"kill {number + 1}: complete steps {complete}, half-written {torn}")
    return half_written, begins


def kill_until_it_ends(
    root: Path, run_dir: str, *more: str, kills: int, module: str = "train.sft"
) -> int:
    """`kill`, and lets the run finish then."""
    half_written, begins = kill(root, run_dir, *more, kills=kills, module=module)
    runs.finish(root, run_dir, runs.start(root, run_dir, *more, module=module))
    assert read_starts(root / run_dir / "log") == begins
    return half_written


def _await_moment(root, run_dir, process, moment, rng):
    """Returns at a random time of the kind `moment` in the life of `process`, or when it ended."""
    if moment == "starting":
        time.sleep(rng.uniform(0, 4))
        return
    done, logged = len(runs.losses(root, run_dir)), rng.randint(1, 4)
    steps = root / run_dir / "steps"
    torn = set(steps_on_disk(steps)[1])
    while process.poll() is None:
        if moment == "stepping" and len(runs.losses(root, run_dir)) >= done + logged:
            break
        complete, writing = steps_on_disk(steps)
        if moment == "writing" and complete and set(writing) - torn:
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.03))


def steps_on_disk(directory: Path) -> tuple[list[int], list[str]]:
    """The complete steps, ascending, and the names of what else is there."""
    names = os.listdir(directory) if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit()), [
        name for name in names if not name.isdigit()
    ]


def assert_equal_endings(root, run_dir, undisturbed="whole", count=runs.STEPS):
    """Every loss that any life logged, and the final parameters, are bit for bit those of the
    undisturbed run."""
    whole, other = (runs.losses(root, name) for name in (undisturbed, run_dir))
    assert sorted(whole) == list(range(count))
    assert all(len(values) == 1 for values in whole.values())
    assert other == whole
    trained = [
        by_path(nnx.state(load(root / "base", branch=root / name / "branch")))
        for name in (undisturbed, run_dir)
    ]
    for path, leaf in trained[0].items():
        np.testing.assert_array_equal(leaf, trained[1][path], err_msg=path)
    complete, torn = steps_on_disk(root / run_dir / "steps")
    assert complete == [count - 2, count]
    assert not torn


def test_a_run_that_is_killed_and_finds_a_full_disk_ends_bit_for_bit_like_an_undisturbed_one(
    root, refused
):
    half_written, begins = kill(root, "troubled", runs.LONG, kills=1)
    assert half_written > 0, "the kill did not come while a checkpoint was written"

    with runs.one_device(), full_disk(100_000):
        alone = "--distributed.num_processes=1"
        said = refused(sft.main, runs.arguments(root, "troubled", runs.LONG, alone))
    steps = root / "troubled" / "steps"
    assert f"{steps}: step " in said
    assert "could not be written" in said
    assert "File too large" in said
    assert f"the same command then continues from step {begins[-1]}, which is whole" in said
    complete, torn = steps_on_disk(steps)
    assert complete[-1] == begins[-1] < runs.STEPS
    assert torn

    runs.run(root, "troubled", runs.LONG)
    assert read_starts(root / "troubled" / "log") == [*begins, begins[-1]]
    assert_equal_endings(root, "troubled")


@pytest.mark.slow
def test_twenty_kills(root):
    epochs, steps = "--epochs=40", 160
    runs.finish(root, "longer", runs.start(root, "longer", epochs))
    half_written = kill_until_it_ends(root, "killed_longer", epochs, kills=20)
    print(f"a half-written checkpoint lay there after {half_written} of 20 kills")
    assert half_written >= 5
    assert_equal_endings(root, "killed_longer", "longer", steps)


@pytest.mark.slow
def test_kills_of_grpo(root):
    """In rollouts, rewards, updates and while a checkpoint is written."""
    more = ("--epochs=10", "--log_every=1")
    runs.finish(root, "grpo", runs.start(root, "grpo", *more, module="train.grpo"))
    half_written = kill_until_it_ends(root, "grpo_killed", *more, kills=10, module="train.grpo")
    print(f"a half-written checkpoint lay there after {half_written} of 10 kills")
    assert half_written > 0
    assert_equal_endings(root, "grpo_killed", "grpo", 40)


class TestSteps:
    """Of a tiny state, in this process."""

    weight = np.arange(60_000, dtype=np.float32).reshape(200, 300)
    state = {"weight": weight, "step": np.int32(7)}  # noqa: RUF012

    @pytest.fixture
    def directory(self, tmp_path):
        """With the complete steps 1 and 2."""
        with self.open(tmp_path / "steps") as steps:
            steps.save(1, self.arrays())
            steps.save(2, self.arrays())
        return tmp_path / "steps"

    def arrays(self):
        return jax.device_put(self.state)

    def open(self, directory, **options):
        return TrainCheckpoints(directory, ModelConfig.preset("2b"), "abc", **options)

    def assert_restores(self, directory, step):
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.arrays()
        )
        with self.open(directory) as steps:
            assert steps.latest == step
            restored = steps.restore(abstract)
        jax.tree.map(np.testing.assert_array_equal, restored, self.state)

    @pytest.mark.parametrize("notices", ["the next save", "the end"])
    def test_a_save_that_failed_in_the_background_is_told(self, tmp_path, notices):
        with self.open(tmp_path, keep=1) as steps:
            steps.save(1, self.arrays())
        steps = self.open(tmp_path, keep=1)
        message = (
            f"{tmp_path}: step 2 could not be written: .*Make room there.* continues from step 1,"
            " which is whole"
        )
        with full_disk():
            steps.save(2, self.arrays())
            with pytest.raises(CheckpointError, match=message):
                steps.save(3, self.arrays()) if notices == "the next save" else steps.close()
        self.assert_restores(tmp_path, 1)

    def test_a_directory_that_goes_away(self, directory):
        steps = self.open(directory)
        directory.rename(directory.with_name("elsewhere"))
        directory.write_text("in the way")
        with pytest.raises(CheckpointError, match=f"{directory}: step 3 could not be written"):
            steps.save(3, self.arrays())
        self.assert_restores(directory.with_name("elsewhere"), 2)

    @pytest.mark.parametrize("name", ["run.json", "run.json/steps"])
    def test_a_file_in_the_way(self, tmp_path, name):
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(OSError, match=str(tmp_path / name)):
            self.open(tmp_path / name)

    def test_a_directory_that_cannot_be_written(self, directory, monkeypatch):
        """Root may write everywhere but on a file system mounted read-only: what os.access says
        then is played here."""
        monkeypatch.setattr("os.access", lambda *_: False)
        with pytest.raises(OSError, match=f"{directory} is no directory that can be written"):
            self.open(directory)

    @pytest.mark.parametrize(
        "harm", [lambda file: os.truncate(file, file.stat().st_size // 2), Path.unlink]
    )
    def test_damaged_files(self, directory, harm):
        """Whatever file of a complete step is hurt, it is restored equal or not at all."""
        pristine = {file: file.read_bytes() for file in directory.glob("2/**/*") if file.is_file()}
        told = 0
        for file, content in pristine.items():
            harm(file)
            try:
                self.assert_restores(directory, 2)
            except CheckpointError as error:
                told += 1
                what, then = str(error).split("cannot be restored: ")
                assert what == f"{directory / '2'} "
                assert "remove this directory: the same command then continues from step 1" in then
            file.write_bytes(content)
        assert told >= 4  # three files of arrays, and the one that says which model it is of
        (directory / "2").rename(directory.with_name("2"))
        self.assert_restores(directory, 1)


def test_events_that_cannot_be_written_name_their_directory(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        EventWriter(tmp_path / "file", start=0)
    writer = EventWriter(tmp_path / "log", start=0)
    told = rf"{tmp_path / 'log'}.*cannot be written.*free space there"
    with full_disk(100), pytest.raises(OSError, match=told):  # noqa: PT012
        writer.scalars(0, {"train/loss": 1.0})
        writer.flush()
