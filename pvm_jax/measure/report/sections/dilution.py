"""How the attention on the image thins out over an answer, and how loud the branch is meanwhile."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from pvm_jax.measure.dilution import Dilution, dilution
from pvm_jax.measure.intervals import PositionBucket, doubling_buckets
from pvm_jax.measure.report.captions import caption
from pvm_jax.measure.report.figures import Panel, Series
from pvm_jax.measure.report.section import Section, curve_by_position
from pvm_jax.measure.report.task import Models, Task


def measure_dilution(models: Models, task: Task) -> Section:
    """`dilution` by position in the answer."""
    found = {
        name: dilution(model, task.examples, rows=task.rows, chunk=task.chunk)
        for name, model in models.items()
    }
    first_name, first = next(iter(found.items()))
    buckets = doubling_buckets(first.uniform.shape[1], 2)
    line = partial(curve_by_position, buckets=buckets)
    uniform = line("1/length: equal attention to all tokens", first.uniform)._replace(
        reference=True
    )
    panels = [
        Panel(
            "dilution",
            "Attention left for the image",
            caption("dilution"),
            "token of the answer",
            "attention on the image",
            [*(line(name, one.mass.mean(1)) for name, one in found.items()), uniform],
            log="xy",
        ),
        Panel(
            "dilution_layers",
            f"The same, layer by layer ({first_name})",
            caption("dilution_layers"),
            "token of the answer",
            "attention on the image",
            [
                *(
                    line(f"layer {layer}", first.mass[:, layer])
                    for layer in range(first.mass.shape[1])
                ),
                uniform,
            ],
            log="xy",
            ordered=True,
        ),
    ]
    facts = [_change("attention on the image", panels[0].series[0], buckets)]
    layers = sorted(map(int, models[first_name].pvm))
    if layers:
        voice = _voice(first, layers, buckets)
        panels.append(voice)
        facts += [
            _change("size of the branch beside the feed-forward", of_layer, buckets)
            for of_layer in voice.series
        ]
    return Section("dilution", "Dilution", panels, facts)


def _voice(found: Dilution, layers: Sequence[int], buckets: Sequence[PositionBucket]) -> Panel:
    """The size of the branch's update beside the FFN's, a line for each layer with a branch."""
    voices = [
        curve_by_position(f"layer {layer}", found.update[:, at] / found.ffn[:, at], buckets)
        for at, layer in enumerate(layers)
    ]
    return Panel(
        "voice",
        "How loud the branch is",
        caption("voice"),
        "token of the answer",
        "branch / feed-forward",
        voices,
        log="x",
        bounds=(0, _above(voices)),
    )


def _above(series: Sequence[Series]) -> float:
    """An upper end for an axis from 0 that all of them fit in."""
    return 1.15 * max(float(np.nanmax(np.array(one.y, float))) for one in series) or 1.0


def _change(what: str, series: Series, buckets: Sequence[PositionBucket]) -> str:
    first, last = series.y[0].mean, series.y[-1].mean
    return (
        f"{what}: {first:.3g} at tokens {buckets[0]} of the answer, {last:.3g} at {buckets[-1]}"
        f" ({series.name})"
    )
