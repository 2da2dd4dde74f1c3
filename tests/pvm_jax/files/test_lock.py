"""Two writers to one place: the second is refused and harms nothing."""

import signal
import subprocess
import sys

import pytest

from convert.dataset import convert
from pvm_jax.__main__ import main
from pvm_jax.checkpoint.directory import write_aside
from pvm_jax.files.lock import sole_writer

HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_writer_is_refused_and_a_killed_one_is_gone(tmp_path):
    target = tmp_path / "new" / "result"
    target.parent.mkdir()
    hold = [sys.executable, "-c", HOLD, target.with_name(".result.lock")]
    holder = subprocess.Popen(hold, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(OSError, match=f"{target} is being written by another .* give another"),
            sole_writer(target, otherwise="give another --output"),
        ):
            pass
        with sole_writer(tmp_path / "new" / "other"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with sole_writer(target):
        assert [path.name for path in target.parent.iterdir()] == [".result.lock"]
    assert not list(target.parent.iterdir())


def test_two_conversions_to_one_directory(tmp_path):
    """The second neither takes the first one's files away nor its report."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "no answer"}]}\n')
    (tmp_path / "shards.rejected.jsonl").write_text("the first one's\n")
    with write_aside(tmp_path / "shards") as aside:
        (aside / "half").write_text("written")
        with pytest.raises(OSError, match="shards is being written by another process"):
            convert(data, tmp_path / "shards")
        assert (aside / "half").read_text() == "written"
    assert (tmp_path / "shards.rejected.jsonl").read_text() == "the first one's\n"
    assert (tmp_path / "shards" / "half").exists()


def test_a_second_generate_to_one_file_is_refused_before_anything_is_loaded(tmp_path, refused):
    (tmp_path / "answers.jsonl").write_text('{"source": ')
    arguments = ["--checkpoint=none", f"--input={tmp_path}/questions.jsonl"]
    arguments += [f"--output={tmp_path}/answers.jsonl"]
    with sole_writer(tmp_path / "answers.jsonl"):
        said = refused(main, ["generate", *arguments])
    assert "answers.jsonl is being written by another process: wait" in said
    assert "or give another --output" in said
    assert (tmp_path / "answers.jsonl").read_text() == '{"source": '


def test_a_second_measure_to_one_folder_is_refused(tmp_path, refused):
    arguments = ["--checkpoint=none", "--data=none", f"--output={tmp_path}/report"]
    with sole_writer(tmp_path / "report"):
        said = refused(main, ["measure", *arguments])
    assert "report is being written by another process" in said


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(OSError, match=f"{tmp_path}/file/out cannot be written .*: choose another"),
        sole_writer(tmp_path / "file" / "out"),
    ):
        pass
