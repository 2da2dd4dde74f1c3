"""How much attention is on the image, and on what is marked in it, sinks left out."""

from functools import partial

import numpy as np

from pvm_jax.measure.evidence import TIMES, evidence
from pvm_jax.measure.intervals import doubling_buckets, estimate
from pvm_jax.measure.report.captions import caption
from pvm_jax.measure.report.figures import Panel
from pvm_jax.measure.report.section import Section, curve_by_position
from pvm_jax.measure.report.task import Models, Task


def measure_evidence(models: Models, task: Task) -> Section:
    """`evidence` of all models, the mean over layers; what is marked, where the data have boxes."""
    found = {
        name: evidence(model, task.examples, rows=task.rows, chunk=task.chunk)
        for name, model in models.items()
    }
    first = next(iter(found.values()))
    line = partial(curve_by_position, buckets=doubling_buckets(first.mass.shape[-1]))
    panels = [
        Panel(
            "evidence_image",
            "Attention on the image, sinks left out",
            caption("evidence_image", times=TIMES),
            "token of the answer",
            "attention on the image",
            [line(name, one.mass.mean(1)) for name, one in found.items()],
            log="x",
        )
    ]
    facts = [
        f"{name}: {estimate(one.mass)} of the attention that is not on sinks is on the image;"
        f" {estimate(one.sinks)} sinks a layer"
        for name, one in found.items()
    ]
    if np.isfinite(first.chance).any():
        equal = np.where(np.isnan(first.mass[:, 0]), np.nan, first.chance[:, None])
        panels.append(
            Panel(
                "evidence_marked",
                "Attention on what is marked",
                caption("evidence_marked"),
                "token of the answer",
                "share on what is marked",
                [
                    *(line(name, one.marked.mean(1)) for name, one in found.items()),
                    line("everywhere alike", equal)._replace(reference=True),
                ],
                log="x",
            )
        )
        facts += [
            f"{name}: {estimate(one.marked)} of that is on what is marked, which is"
            f" {estimate(one.chance)} of the image"
            for name, one in found.items()
        ]
    return Section("evidence", "Evidence", panels, facts)
