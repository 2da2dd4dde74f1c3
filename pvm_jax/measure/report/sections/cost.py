"""What the branch costs: time to read and to write, weights, and memory of the answer."""

from collections.abc import Callable, Mapping

import numpy as np

from pvm_jax.measure.accuracy import prompt_of
from pvm_jax.measure.cost import Cost, cost
from pvm_jax.measure.intervals import Estimate
from pvm_jax.measure.report.captions import caption
from pvm_jax.measure.report.figures import Panel, Series
from pvm_jax.measure.report.section import Section
from pvm_jax.measure.report.task import WITHOUT, Models, Task
from pvm_jax.model.qwen3_vl import without_pvm


def measure_cost(models: Models, task: Task) -> Section:
    """`cost` on the longest of the task's prompts."""
    prompts = [prompt_of(example)[0] for example in task.examples]
    built = {
        name: without_pvm(model) if name == WITHOUT else model for name, model in models.items()
    }  # not merely silent
    found = cost(
        built,
        max(prompts, key=lambda prompt: len(prompt.input_ids)),
        new_tokens=max(task.max_new_tokens, 2),
    )
    return Section("cost", "Cost", _panels(found), _facts(found), _table(found))


def _panels(found: Mapping[str, Cost]) -> list[Panel]:
    """Times, the fastest round and a thin line to the median."""
    one = next(iter(found.values()))

    def bars(key: str, title: str, text: str, values: Callable[[Cost], np.ndarray]) -> Panel:
        estimates = [Estimate(*np.quantile(values(c), [0.0, 0.0, 0.5])) for c in found.values()]
        series = [Series(title, [*range(len(found))], estimates)]
        return Panel(key, title, text, "milliseconds", "", series, names=list(found))

    prompt = {"tokens": one.tokens, "patches": one.patches, "rounds": len(one.prefill)}
    return [
        bars(
            "cost_prefill",
            "Time to the first token",
            caption("cost_prefill", **prompt),
            lambda c: 1e3 * c.prefill,
        ),
        bars(
            "cost_decode",
            "Time of each further token",
            caption("cost_decode", new_tokens=one.new_tokens),
            lambda c: 1e3 * c.decode,
        ),
    ]


def _table(found: Mapping[str, Cost]) -> list[list[str]]:
    """Bytes and speed, a column for each model."""
    rows = [["", *found]]
    for label, value in (
        ("weights", lambda c: _size(c.weights)),
        ("keys and values of prompt and answer", lambda c: _size(c.cache)),
        ("the branch's memory of the image", lambda c: _size(c.memory)),
        ("tokens a second, once it writes", _speed),
    ):
        rows.append([label, *(value(c) for c in found.values())])
    return rows


def _speed(cost: Cost) -> str:
    seconds = cost.decode.min()
    return f"{1 / seconds:,.0f}" if seconds > 0 else "too few tokens to tell"


def _facts(found: Mapping[str, Cost]) -> list[str]:
    """The first model's times beside the second's; none where there is one model."""
    if len(found) < 2:
        return []
    (first, a), (second, b) = [*found.items()][:2]
    read, without = (c.weights + c.cache + c.memory for c in (a, b))
    return [
        f"{what} takes {first} {x.min() / y.min():.2f} times as long as {second} (fastest rounds)"
        for what, x, y in (
            ("the first token", a.prefill, b.prefill),
            ("a further token", a.decode, b.decode),
        )
        if min(x.min(), y.min()) > 0
    ] + [
        f"these times hold for this size ({_size(a.weights)} of weights) on this device: where a"
        " model is small, a step is mostly overhead. Counted, a further token reads"
        f" {_size(read)} (weights, keys and values, memory) {first}, {read / without:.3f} times"
        f" what it reads {second}"
    ]


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 2**10:,.2f} KiB" if count else "0"
