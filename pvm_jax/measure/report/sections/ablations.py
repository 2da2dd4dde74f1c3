"""What is lost where something is taken away, or put between image and question."""

from collections.abc import Mapping, Sequence

from pvm_jax.data.example import Example
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
    words, gains = [], []
    for key, examples in (("filler", task.fillers), ("ahead", task.ahead)):
        if examples:
            by_words, of_words = _by_words(key, models, task, examples)
            words.append(by_words)
            gains += of_words
    return Section("ablations", "Ablations", [*words, *panels], [*gains, *facts])


_WORDS = {
    "filler": ("Words between image and question", "tokens of filler"),
    "ahead": ("Words ahead of the image", "tokens of filler ahead of the image"),
}


def _by_words(
    key: str, models: Models, task: Task, examples: Mapping[int, Sequence[Example]]
) -> tuple[Panel, list[str]]:
    """`by_filler` of all models as a figure, and what the first gains on the others."""
    title, label = _WORDS[key]
    found = by_filler(models, examples, guess=key == "filler", rows=task.rows, chunk=task.chunk)

    def line(of: str, by: Mapping[int, TeacherForced]) -> Series:
        values = [estimate(task.counting(by[n].correct, examples[n])) for n in examples]
        return Series(of, list(examples), values, reference=of == IMAGE_SWAPPED)

    panel = Panel(
        key,
        title,
        caption(key),
        label,
        f"share of {task.counted} right",
        [line(of, by) for of, by in found.items()],
        bounds=(0, 1),
    )
    return panel, _gains(found, task, examples, label)


def _gains(
    found: Mapping[str, Mapping[int, TeacherForced]],
    task: Task,
    examples: Mapping[int, Sequence[Example]],
    label: str,
) -> list[str]:
    """What the first model gains on each of the others, paired by conversation, at every
    distance."""
    of_models = [(name, by) for name, by in found.items() if name != IMAGE_SWAPPED]
    if (guess := found.get(IMAGE_SWAPPED)) and not any(
        estimate(task.counting(by[n].correct - guess[n].correct, examples[n])).low > 0
        for _, by in of_models
        for n in examples
    ):
        return [
            f"at the floor: at no number of {label} is any model right more often than guessing is"
            f" ({IMAGE_SWAPPED}), so nothing can be told apart here"
        ]
    (first, a), *others = of_models
    facts = []
    for other, b in others:
        gains = {
            n: estimate(task.counting(a[n].correct - b[n].correct, examples[n])) for n in examples
        }
        if not any(gain.low > 0 or gain.high < 0 for gain in gains.values()):
            facts.append(
                f"a null result: at no number of {label} does the accuracy differ beyond its 95%"
                f" interval ({first}, {other})"
            )
        facts += [f"{n} {label}: {first} minus {other}, paired: {g}" for n, g in gains.items()]
    return facts
