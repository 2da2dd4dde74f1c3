"""How early the final answer of what a model writes is decided."""

import numpy as np

from pvm_jax.measure.accuracy import prompt_of
from pvm_jax.measure.decision import SHARES, decision
from pvm_jax.measure.intervals import estimate
from pvm_jax.measure.report.captions import caption
from pvm_jax.measure.report.figures import Panel, Series
from pvm_jax.measure.report.section import Section
from pvm_jax.measure.report.task import Models, Task, own_answers


def measure_decision(models: Models, task: Task) -> Section:
    """`decision` of each model in those of its own answers that have a final answer."""
    lines, facts = [], []
    for name, model in models.items():
        own = own_answers(name, model, task)
        places = [task.final(prompt_of(example)[1]) for example in own]
        kept = [(e, place) for e, place in zip(own, places, strict=True) if place is not None]
        count = f"{len(kept)} of the {len(own)} answers of {name} have {task.final_is}"
        if not kept:
            facts.append(count)
            continue
        examples, finals = zip(*kept, strict=True)
        found = decision(model, examples, finals, rows=task.rows, chunk=task.chunk)
        shares = [100 * share for share in SHARES]
        lines.append(Series(name, shares, [estimate(values) for values in found.same]))
        if np.isfinite(found.decided).any():
            count += f", decided after {estimate(found.decided)} of the text before it"
        facts.append(count)
    panel = Panel(
        "decision",
        "How early the final answer is decided",
        caption("decision"),
        "% of the text before the final answer",
        "share with the same final answer",
        lines,
        bounds=(0, 1),
    )
    return Section("decision", "Early decision", [panel] if lines else [], facts)
