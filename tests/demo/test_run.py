import pytest

from demo.run import run_steps


def test_steps_run_in_order_and_are_skipped_once_done(tmp_path, capfd):
    """The second round repeats nothing."""
    config = ["demo.task", tmp_path / "data", "--count", "2", "--mixture.sizes", "[1]"]
    for _ in range(2):
        run_steps([(tmp_path / "data" / "data.jsonl", config)])
    said = capfd.readouterr().out
    assert said.count("$ python -m demo.task") == 1
    assert said.count("is there: skipped") == 1


def test_a_failing_step_ends_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="that command failed"):
        run_steps([(tmp_path / "never", ["demo.task", tmp_path, "--mixture.sizes", "[9]"])])
