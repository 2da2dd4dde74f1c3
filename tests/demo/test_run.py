from pathlib import Path

import pytest

from demo.run import run_steps, show_comparison


def test_steps_run_in_order_and_are_skipped_once_done(tmp_path, capfd):
    """Commands of Python's own: they begin fast. The second round repeats nothing."""
    (tmp_path / "here").write_text("{}")
    steps = [
        (tmp_path / there, ["json.tool", tmp_path / here, tmp_path / there])
        for here, there in (("here", "there"), ("there", "last"))
    ]
    for _ in range(2):
        run_steps(steps)
    said = capfd.readouterr().out
    assert said.count("$ python -m json.tool") == 2
    assert said.count("is there: skipped") == 2


def test_a_failing_step_ends_the_run(tmp_path):
    steps = [(tmp_path / "never", ["json.tool", tmp_path / "nothing"])]
    with pytest.raises(RuntimeError, match="that command failed"):
        run_steps(steps)


def test_the_comparison_shows_words_ahead_beside_words_between(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    show_comparison(Path("demo/results"))
    said = capsys.readouterr().out
    assert said.count("Values read correctly, 3 seeds a method") == 2
    assert said.index("words between") < said.index("words ahead")
