"""What is lost where something is taken away, or put between image and question."""

from collections.abc import Mapping

from pvm_jax.measure.ablations import IMAGE_SWAPPED, ablations, by_filler
from pvm_jax.measure.accuracy import TeacherForced
from pvm_jax.measure.intervals import estimate
from pvm_jax.measure.report.captions import caption
from pvm_jax.measure.report.figures import Panel, Series
from pvm_jax.measure.report.section import Section
from pvm_jax.measure.report.task import Models, Task


def measure_ablations(models: Models, task: Task) -> Section:
    """`ablations` of the first model, and `by_filler` of all where the task has fillers."""
    name, model = next(iter(models.items()))
    correct = {
        ablation: task.counting(found.correct)
        for ablation, found in ablations(
            model, task.examples, rows=task.rows, chunk=task.chunk
        ).items()
    }
    panels = [
        Panel(
            "ablations",
            f"What is taken away ({name})",
            caption("ablations"),
            f"share of {task.counted} right",
            "",
            [
                Series(
                    name, [*range(len(correct))], [estimate(values) for values in correct.values()]
                )
            ],
            names=list(correct),
            bounds=(0, 1),
        )
    ]
    facts = [
        f"{ablation}: {estimate(values)} of {task.counted} right"
        for ablation, values in correct.items()
    ]
    if task.fillers:
        found = by_filler(models, task.fillers, rows=task.rows, chunk=task.chunk)
        facts = [*_gains(found, task), *facts]

        def line(of: str, by: Mapping[int, TeacherForced]) -> Series:
            values = [estimate(task.counting(by[n].correct, task.fillers[n])) for n in task.fillers]
            return Series(of, list(task.fillers), values, reference=of == IMAGE_SWAPPED)

        panels.insert(
            0,
            Panel(
                "filler",
                "Words between image and question",
                caption("filler"),
                "tokens of filler",
                f"share of {task.counted} right",
                [line(of, by) for of, by in found.items()],
                bounds=(0, 1),
            ),
        )
    return Section("ablations", "Ablations", panels, facts)


def _gains(found: Mapping[str, Mapping[int, TeacherForced]], task: Task) -> list[str]:
    """What the first model gains on the second, paired by conversation, at every distance."""
    (first, a), (second, b), *others = found.items()
    if not others:  # there is one model, and what it guesses
        return []
    gains = {
        n: estimate(task.counting(a[n].correct - b[n].correct, task.fillers[n]))
        for n in task.fillers
    }
    clear = any(gain.low > 0 or gain.high < 0 for gain in gains.values())
    return [
        *(
            []
            if clear
            else [
                "a null result: at no distance does the accuracy differ beyond its 95% interval"
                f" ({first}, {second})"
            ]
        ),
        *(
            f"{n} tokens of filler: {first} minus {second}, paired: {gain}"
            for n, gain in gains.items()
        ),
    ]
