"""When the prediction is made, layer by layer."""

from collections.abc import Callable, Mapping

import numpy as np

from pvm_jax.measure.intervals import Estimate, estimate
from pvm_jax.measure.lens import Lens, lens
from pvm_jax.measure.report.captions import caption
from pvm_jax.measure.report.figures import Panel, Series
from pvm_jax.measure.report.section import Section
from pvm_jax.measure.report.task import Models, Task


def measure_lens(models: Models, task: Task) -> Section:
    """`lens` by layer."""
    found = {
        name: lens(model, task.examples, rows=task.rows, chunk=min(task.chunk, 128))
        for name, model in models.items()
    }
    depth = next(iter(found.values())).rank.shape[1]
    settled = {name: task.counting(one.settled) for name, one in found.items()}
    facts = [
        f"{name}: settled in layer {estimate(values)} of 0 to {depth - 1}, on average"
        for name, values in settled.items()
    ]
    panels = [*_layer_panels(found, depth, task), _settled_panel(settled, depth, task)]
    return Section("lens", "When the prediction is made", panels, facts)


def _layer_panels(found: Mapping[str, Lens], depth: int, task: Task) -> list[Panel]:
    """What each of `depth` layers makes of the token that the model says in the end."""

    def by_layer(values: Callable[[Lens], np.ndarray]) -> list[Series]:
        kept = {name: task.counting(values(one)) for name, one in found.items()}
        return [
            Series(name, [*range(depth)], [estimate(v[:, layer]) for layer in range(depth)])
            for name, v in kept.items()
        ]

    def typical_rank(series: Series) -> Series:
        return series._replace(y=[Estimate(*np.exp(e)) for e in series.y])

    return [
        Panel(
            "lens_probability",
            "When the prediction is made",
            caption("lens_probability", counted=task.counted),
            "layer",
            "probability of the final token",
            by_layer(lambda one: one.probability),
            bounds=(0, 1),
        ),
        Panel(
            "lens_rank",
            "Rank of the final token",
            caption("lens_rank"),
            "layer",
            "rank of the final token",
            [typical_rank(series) for series in by_layer(lambda one: np.log1p(one.rank))],
            log="y",
        ),
        Panel(
            "lens_kl",
            "Distance from the final prediction",
            caption("lens_kl"),
            "layer",
            "KL from the final distribution (nats)",
            by_layer(lambda one: one.kl),
        ),
    ]


def _settled_panel(settled: Mapping[str, np.ndarray], depth: int, task: Task) -> Panel:
    """The share of predictions [conversations, answer] that are settled in each layer."""
    return Panel(
        "lens_settled",
        "Settled from which layer on",
        caption("lens_settled"),
        "layer",
        f"share of {task.counted} settled",
        [
            Series(
                name,
                [*range(depth)],
                [estimate(np.where(np.isnan(s), np.nan, s <= layer)) for layer in range(depth)],
            )
            for name, s in settled.items()
        ],
        bounds=(0, 1),
    )
