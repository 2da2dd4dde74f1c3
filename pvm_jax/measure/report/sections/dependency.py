"""How much of what a model writes hangs on the image, token by token."""

from functools import partial

import numpy as np

from pvm_jax.measure.dependency import NO_IMAGE, dependency
from pvm_jax.measure.intervals import doubling_buckets, estimate
from pvm_jax.measure.report.captions import caption
from pvm_jax.measure.report.figures import Panel
from pvm_jax.measure.report.section import Section, curve_by_position
from pvm_jax.measure.report.task import Models, Task, own_answers


def measure_dependency(models: Models, task: Task) -> Section:
    """`dependency` of each model in its own answers: of the first in all its ways, of the others
    with the image hidden altogether."""
    found: dict[str, np.ndarray] = {}
    for name, model in models.items():
        examples = own_answers(name, model, task)
        by_hidden = dependency(model, examples, rows=task.rows, chunk=task.chunk)
        for hidden in by_hidden if not found else [NO_IMAGE]:
            found[f"{name}, {hidden}"] = task.counting(by_hidden[hidden], examples)
    longest = max(values.shape[1] for values in found.values())
    line = partial(curve_by_position, buckets=doubling_buckets(longest))
    panel = Panel(
        "dependency",
        "What hangs on the image",
        caption("dependency", counted=task.counted),
        "token of the answer",
        "KL (nats)",
        [line(name, values) for name, values in found.items()],
        log="x",
    )
    facts = [
        f"{name}: the next of the {task.counted} changes by {estimate(values)} nats (KL)"
        for name, values in found.items()
    ]
    return Section("dependency", "Dependency on the image", [panel], facts)
