"""What a run writes for TensorBoard, and what it does about steps that are not finite."""

from contextlib import closing

import numpy as np
import pytest

from train.run.events import EventWriter, read_starts, read_values
from train.run.log import RunLog


def metrics(loss=1.0, **more):
    return {
        "loss": np.float32(loss),
        "grad_norm": np.float32(2),
        "learning_rate": np.float32(0.1),
        "tokens": 50,
    } | more


@pytest.fixture
def open_log(tmp_path):
    def open_log(**options):
        return RunLog([writer], **({"start": 0, "total": 100, "every": 2, "peak": None} | options))

    with closing(EventWriter(tmp_path, start=0)) as writer:
        yield open_log


def test_every_step_is_written_once_it_is_read(open_log, tmp_path):
    with open_log() as log:
        for step in range(5):
            with log.phase("data"):
                log.add(step, metrics(step, **{"gate/1": np.float32(0.5)}))
        log.scalars(4, {"held_out/loss": 3.0})
        with log.phase("checkpoint", 4):
            pass
        log.sample(4, "sample/0", "what it says", np.zeros((4, 6, 3), np.uint8))
    values = read_values(tmp_path)
    assert values["train/loss"] == [
        (step, float(step)) for step in range(4)
    ]  # the fifth waits for a sixth
    assert values["gate/1"] == [(step, 0.5) for step in range(4)]
    assert values["held_out/loss"] == [(4, 3.0)]
    for name in ("train/tokens_per_second", "time/step", "time/data"):
        assert [step for step, _ in values[name]] == [1, 3]
    assert values["time/data"][0][1] <= values["time/step"][0][1]
    assert values["time/checkpoint"][0][0] == 4
    assert "what it says" in values["sample/0/text_summary"][0][1]
    assert values["sample/0"][0][1].startswith(b"\x89PNG")
    assert "train/mfu" not in values


def test_runs_that_begin_in_one_second_keep_what_each_wrote(tmp_path):
    for start in (0, 2, 2, 5):
        with closing(EventWriter(tmp_path, start=start)) as writer:
            writer.scalars(start, {"loss": start})
    assert read_starts(tmp_path) == [0, 2, 2, 5]
    assert read_values(tmp_path)["loss"] == [(step, step) for step in (0, 2, 2, 5)]


def test_mfu_is_the_work_over_the_peak_and_the_live_line_shows_it(
    open_log, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "200")
    with open_log(peak=1e9) as log:
        for step in range(4):
            log.add(step, metrics(step, flops=np.float32(3e6)))
    values = read_values(tmp_path)
    for (_, mfu), (_, speed) in zip(
        values["train/mfu"], values["train/tokens_per_second"], strict=True
    ):
        assert mfu == pytest.approx(speed / 50 * 3e6 / 1e9, rel=1e-5)
    shown = capsys.readouterr().out
    assert "loss 3.0000" in shown
    assert "MFU" in shown
    assert "ETA" in shown


def test_the_console_fits_80_columns_with_step_loss_rate_and_eta_first(open_log, capsys):
    gates = {f"gate/{layer}": np.float32(0.5) for layer in (8, 16, 24)}
    with open_log(total=10**5, peak=1e9) as log:
        for step in range(2):
            log.add(step, metrics(step, flops=np.float32(3e6), **gates))
    to_go, first, *rest = capsys.readouterr().out.splitlines()
    assert to_go.startswith("99,998 steps to go: ")
    assert max(map(len, (first, *rest))) <= 80
    facts = ["step 2/100000", "loss 1.0000", "lr 1.00e-01", "tokens/s", "ETA"]
    places = [first.find(fact) for fact in facts]
    assert -1 not in places
    assert places == sorted(places)
    assert all(line.startswith("  ") for line in rest)
    assert "gate/24 +0.5000" in rest[-1]


def test_a_step_that_is_not_finite_stops_the_run_and_names_its_examples(open_log):
    with open_log(examples=lambda step: [["a.jsonl:3", "b.jsonl:9"], [f"c.jsonl:{step}"]]) as log:
        log.add(6, metrics())
        with pytest.raises(
            FloatingPointError,
            match=r"step 7: loss nan.*a\.jsonl:3, b\.jsonl:9; c\.jsonl:7.*not_finite to skip",
        ):
            log.add(7, metrics(np.nan))


def test_skipped_steps_are_reported_and_ten_in_a_row_end_the_run(open_log, capsys):
    with open_log(every=1, not_finite="skip", examples=lambda step: [["a.jsonl:3"]]) as log:
        for step in range(9):
            log.add(step, metrics(np.inf))
        log.add(9, metrics())
        assert capsys.readouterr().out.count("a.jsonl:3") == 9
        for step in range(10, 19):
            log.add(step, metrics(np.nan))
        with pytest.raises(FloatingPointError, match="the last 10 steps were not finite"):
            log.add(19, metrics(np.nan))


def test_the_console_is_quiet_when_it_is_no_terminal(open_log, capsys):
    with open_log(every=1) as log:
        for step in range(100):
            log.add(step, metrics())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/100", "100/100"]
