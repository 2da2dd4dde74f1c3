"""Whether what a model goes on to write follows the image that it is shown in the middle of its
answer."""

from collections.abc import Callable

import numpy as np

from pvm_jax.measure.intervals import estimate
from pvm_jax.measure.midway import FRACTIONS, Midway, midway
from pvm_jax.measure.report.captions import caption
from pvm_jax.measure.report.figures import Panel, Series
from pvm_jax.measure.report.section import Section
from pvm_jax.measure.report.task import Models, Task


def measure_midway(models: Models, task: Task) -> Section:
    """`midway` of all models, by the share of the answer that was written before."""
    found = {
        name: midway(
            model,
            task.examples,
            stop_tokens=task.stop_tokens,
            max_new_tokens=task.max_new_tokens,
            rows=task.rows,
            chunk=task.chunk,
        )
        for name, model in models.items()
    }

    def line(name: str, values: np.ndarray) -> Series:
        points = zip(FRACTIONS, map(estimate, values), strict=True)
        kept = [(100 * x, e) for x, e in points if np.isfinite(e.mean)]
        return Series(name, [x for x, _ in kept], [e for _, e in kept])

    def panel(
        key: str, title: str, label: str, lines: dict[str, Callable[[Midway], np.ndarray]]
    ) -> Panel:
        series = [
            line(f"{name}, {what}" if what else name, values(one))
            for name, one in found.items()
            for what, values in lines.items()
        ]
        bounds = None if key == "midway_evidence" else (0, 1)
        return Panel(
            key, title, caption(key), "% of the answer written before", label,
            [one for one in series if one.x], bounds=bounds,
        )  # fmt: skip

    shares = {"as about the new": lambda m: m.follows, "as about the first": lambda m: m.stays}
    panels = [
        panel("midway", "The image exchanged midway", "share of tokens", shares),
        panel(
            "midway_evidence",
            "For which image it speaks",
            "nats a token for the new image",
            {"": lambda m: m.evidence},
        ),
        panel(
            "midway_removed",
            "The image taken away midway",
            "share of tokens as with it",
            {"": lambda m: m.removed},
        ),
    ]
    drawn = [panel for panel in panels if panel.series]
    return Section("midway", "The image exchanged midway", drawn, _facts(found))


def _facts(found: dict[str, Midway]) -> list[str]:
    """What comes of it late in the answer, as far as the answers about both images differ: a
    sentence for each model."""
    facts = []
    for name, one in found.items():
        told = [place for place, values in enumerate(one.follows) if np.isfinite(values).any()]
        if not told:
            facts.append(f"{name} writes the same about either image")
            continue
        at = told[-1]
        facts.append(
            f"{name}, the image exchanged after {FRACTIONS[at]:.0%} of its answer: of the tokens"
            f" that tell the images apart {estimate(one.follows[at])} are those about the new one"
            f" and {estimate(one.stays[at])} those about the first; what it writes speaks for the"
            f" new one by {estimate(one.evidence[at])} nats a token, by {estimate(one.evidence[0])}"
            f" from the start; taken away there, {estimate(one.removed[at])} of the tokens stay"
        )
    return facts
