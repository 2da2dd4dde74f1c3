"""How much of an answer is right: given the true answer so far, and written by the model itself."""

from collections.abc import Mapping, Sequence

import numpy as np

from pvm_jax.measure.accuracy import TeacherForced, WrittenAnswers, teacher_forced
from pvm_jax.measure.intervals import PositionBucket, by_length, doubling_buckets, estimate
from pvm_jax.measure.reading import find_answers
from pvm_jax.measure.report.captions import caption
from pvm_jax.measure.report.figures import Panel, Series
from pvm_jax.measure.report.section import Section, curve_by_position
from pvm_jax.measure.report.task import Models, Task, written


def measure_accuracy(models: Models, task: Task) -> Section:
    """`teacher_forced` and what the models write themselves, by position and by output length."""
    forced = {
        name: teacher_forced(model, task.examples, rows=task.rows, chunk=task.chunk)
        for name, model in models.items()
    }
    own = {name: written(name, model, task) for name, model in models.items()}
    facts = [
        f"{name}: {estimate(task.counting(one.correct))} of {task.counted} right (teacher-forced)"
        for name, one in forced.items()
    ]
    facts += [
        f"{name}: {estimate(one.score)} of what it wrote itself is exact"
        for name, one in own.items()
    ]
    panels = [*_forced_panels(forced, task), *_written_panels(own, task)]
    return Section("accuracy", "Accuracy", panels, facts)


def _forced_panels(forced: Mapping[str, TeacherForced], task: Task) -> list[Panel]:
    """What is right, and the loss, with the true answer so far given."""
    correct = {name: task.counting(one.correct) for name, one in forced.items()}
    loss = {name: task.counting(one.loss) for name, one in forced.items()}
    positions = doubling_buckets(next(iter(correct.values())).shape[1])
    lengths = find_answers(task.examples).lengths
    of_lengths = _used(doubling_buckets(max(int(lengths.max()), 1)), lengths)
    counted = task.counted
    return [
        Panel(
            "accuracy",
            f"Right {counted} by position",
            caption("accuracy", counted=counted),
            "token of the answer",
            f"share of {counted} right",
            [curve_by_position(name, values, positions) for name, values in correct.items()],
            log="x",
            bounds=(0, 1),
        ),
        Panel(
            "loss",
            "Loss by position",
            caption("loss", counted=counted),
            "token of the answer",
            "loss (nats)",
            [curve_by_position(name, values, positions) for name, values in loss.items()],
            log="x",
        ),
        Panel(
            "accuracy_by_length",
            f"Right {counted} by the answer's length",
            caption("accuracy_by_length"),
            f"share of {counted} right, by tokens of the answer",
            "",
            [_by_length(name, values, lengths, of_lengths) for name, values in correct.items()],
            names=[str(bucket) for bucket in of_lengths],
            bounds=(0, 1),
        ),
    ]


def _written_panels(own: Mapping[str, WrittenAnswers], task: Task) -> list[Panel]:
    """What is exact where the model writes the answer itself."""
    positions = doubling_buckets(max(one.score.shape[1] for one in own.values()))
    lengths = np.concatenate([one.lengths for one in own.values()])
    of_lengths = _used(doubling_buckets(max(int(lengths.max()), 1)), lengths)
    return [
        Panel(
            "written",
            "Written by the model itself",
            caption("written", exactness=task.exactness),
            "token of the answer",
            "share exact",
            [curve_by_position(name, one.score, positions) for name, one in own.items()],
            log="x",
            bounds=(0, 1),
        ),
        Panel(
            "written_by_length",
            "The same, by the length of what was written",
            caption("written_by_length"),
            "share exact, by tokens written",
            "",
            [_by_length(name, one.score, one.lengths, of_lengths) for name, one in own.items()],
            names=[str(bucket) for bucket in of_lengths],
            bounds=(0, 1),
        ),
    ]


def _by_length(
    name: str, values: np.ndarray, lengths: np.ndarray, buckets: Sequence[PositionBucket]
) -> Series:
    return Series(name, [*range(len(buckets))], by_length(values, lengths, buckets))


def _used(buckets: Sequence[PositionBucket], lengths: np.ndarray) -> list[PositionBucket]:
    return [b for b in buckets if ((lengths >= b.first) & (lengths <= b.last)).any()]
