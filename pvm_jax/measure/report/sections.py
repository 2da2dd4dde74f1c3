"""The six measurements as sections of the report: each measures, and turns its arrays into
panels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from pvm_jax.data.example import Example, Frame, visual_runs
from pvm_jax.data.processor import Processor
from pvm_jax.measure.ablations import IMAGE_SWAPPED, ablations, by_filler
from pvm_jax.measure.accuracy import Scorer, TeacherForced, prompt_of, teacher_forced, write
from pvm_jax.measure.cost import Cost, cost
from pvm_jax.measure.dilution import dilution
from pvm_jax.measure.intervals import (
    Estimate,
    PositionBucket,
    by_length,
    by_position,
    doubling_buckets,
    estimate,
)
from pvm_jax.measure.lens import lens
from pvm_jax.measure.looked import looked
from pvm_jax.measure.pictures import picture
from pvm_jax.measure.reading import find_answers
from pvm_jax.measure.report.captions import caption
from pvm_jax.measure.report.figures import AttentionMap, Panel, Series
from pvm_jax.model.qwen3_vl import Qwen3VL, without_pvm

WITH, WITHOUT = "with the branch", "without"
"""Names of a model and of the same weights with every gate at 0."""

Models = Mapping[str, Qwen3VL]
"""What is compared, by name; the first is the one that is looked into."""


@dataclass(frozen=True)
class Task:
    """What is measured on, and what counts in it.

    Attributes:
        examples: encoded conversations with their answers.
        processor: that encoded them.
        stop_tokens: that end an answer which a model writes.
        max_new_tokens: of such an answer.
        counted: what the tokens that count are called, in the report's words.
        counts: which tokens of an answer count for accuracy and for the lens: its ids [answer] ->
            [answer] bool; None: all of them.
        fillers: the conversations with filler text before their question, by its tokens.
        grade, exactness: how a written answer is scored (`accuracy.write`), and what that means in
            the report's words.
        looks: tokens whose attention is drawn, each by (number of the conversation, which token of
            what the model writes as its last answer, from 0); None: as far into that as the look
            stands in `looks`, so that they are spread. Where the model stops before, its last
            token.
        rows, chunk: conversations, and columns of them, that are computed together.
    """

    examples: Sequence[Example]
    stop_tokens: Sequence[int]
    max_new_tokens: int
    processor: Processor
    counted: str = "tokens"
    counts: Callable[[np.ndarray], np.ndarray] | None = None
    fillers: Mapping[int, Sequence[Example]] = field(default_factory=dict)
    grade: Scorer | None = None
    exactness: str = "answers that are the reference's, token by token, so far"
    looks: Sequence[tuple[int, int | None]] = ()
    rows: int = 4
    chunk: int = 256

    def counting(self, values: np.ndarray, examples: Sequence[Example] | None = None) -> np.ndarray:
        """`values` [conversations, ..., answer] by answer token, NaN where a token does not
        count."""
        if self.counts is None:
            return values
        examples = self.examples if examples is None else examples
        columns, real = find_answers(examples)
        kept = (
            np.stack([self.counts(e.input_ids[c]) for e, c in zip(examples, columns, strict=True)])
            & real
        )
        return np.where(kept.reshape(len(kept), *(1,) * (values.ndim - 2), -1), values, np.nan)


class Section(NamedTuple):
    """One measurement in the report: `facts`, what came out, a sentence each; `rows`, a table, its
    header first."""

    key: str
    title: str
    panels: Sequence[Panel | AttentionMap]
    facts: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: str = ""


def measure_dilution(models: Models, task: Task) -> Section:
    """`dilution` by position in the answer."""
    found = {
        name: dilution(model, task.examples, rows=task.rows, chunk=task.chunk)
        for name, model in models.items()
    }
    first_name, first = next(iter(found.items()))
    layers = sorted(map(int, models[first_name].pvm))
    buckets = doubling_buckets(first.uniform.shape[1], 2)
    line = partial(_by_position, buckets=buckets)
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
    if layers:
        voices = [
            line(f"layer {layer}", first.update[:, at] / first.ffn[:, at])
            for at, layer in enumerate(layers)
        ]
        panels.append(
            Panel(
                "voice",
                "How loud the branch is",
                caption("voice"),
                "token of the answer",
                "branch / feed-forward",
                voices,
                log="x",
                bounds=(0, _above(voices)),
            )
        )
        facts += [
            _change("size of the branch beside the feed-forward", voice, buckets)
            for voice in voices
        ]
    return Section("dilution", "Dilution", panels, facts)


def measure_accuracy(models: Models, task: Task) -> Section:
    """`teacher_forced` and `write`, by position and by output length."""
    forced = {
        name: teacher_forced(model, task.examples, rows=task.rows, chunk=task.chunk)
        for name, model in models.items()
    }
    correct = {name: task.counting(one.correct) for name, one in forced.items()}
    loss = {name: task.counting(one.loss) for name, one in forced.items()}
    written = {
        name: write(
            model,
            task.examples,
            stop_tokens=task.stop_tokens,
            max_new_tokens=task.max_new_tokens,
            grade=task.grade,
            rows=task.rows,
        )
        for name, model in models.items()
    }
    lengths = find_answers(task.examples).lengths
    positions = doubling_buckets(next(iter(correct.values())).shape[1])
    wrote = max(one.score.shape[1] for one in written.values())
    by_output = _used(doubling_buckets(max(int(lengths.max()), 1)), lengths)
    own_lengths = np.concatenate([one.lengths for one in written.values()])
    by_written = _used(doubling_buckets(max(int(own_lengths.max()), 1)), own_lengths)
    counted = task.counted
    panels = [
        Panel(
            "accuracy",
            f"Right {counted} by position",
            caption("accuracy", counted=counted),
            "token of the answer",
            f"share of {counted} right",
            [_by_position(name, values, positions) for name, values in correct.items()],
            log="x",
            bounds=(0, 1),
        ),
        Panel(
            "loss",
            "Loss by position",
            caption("loss", counted=counted),
            "token of the answer",
            "loss (nats)",
            [_by_position(name, values, positions) for name, values in loss.items()],
            log="x",
        ),
        Panel(
            "accuracy_by_length",
            f"Right {counted} by the answer's length",
            caption("accuracy_by_length"),
            f"share of {counted} right, by tokens of the answer",
            "",
            [_by_length(name, values, lengths, by_output) for name, values in correct.items()],
            names=[str(bucket) for bucket in by_output],
            bounds=(0, 1),
        ),
        Panel(
            "written",
            "Written by the model itself",
            caption("written", exactness=task.exactness),
            "token of the answer",
            "share exact",
            [
                _by_position(name, one.score, doubling_buckets(wrote))
                for name, one in written.items()
            ],
            log="x",
            bounds=(0, 1),
        ),
        Panel(
            "written_by_length",
            "The same, by the length of what was written",
            caption("written_by_length"),
            "share exact, by tokens written",
            "",
            [_by_length(name, one.score, one.lengths, by_written) for name, one in written.items()],
            names=[str(bucket) for bucket in by_written],
            bounds=(0, 1),
        ),
    ]
    facts = [
        f"{name}: {estimate(values)} of {counted} right (teacher-forced)"
        for name, values in correct.items()
    ]
    facts += [
        f"{name}: {estimate(one.score)} of what it wrote itself is exact"
        for name, one in written.items()
    ]
    return Section("accuracy", "Accuracy", panels, facts)


def measure_lens(models: Models, task: Task) -> Section:
    """`lens` by layer."""
    found = {
        name: lens(model, task.examples, rows=task.rows, chunk=min(task.chunk, 128))
        for name, model in models.items()
    }
    depth = next(iter(found.values())).rank.shape[1]

    def by_layer(values: Callable) -> list[Series]:
        kept = {name: task.counting(values(one)) for name, one in found.items()}
        return [
            Series(name, [*range(depth)], [estimate(v[:, layer]) for layer in range(depth)])
            for name, v in kept.items()
        ]

    def typical_rank(series: Series) -> Series:
        return series._replace(y=[Estimate(*np.exp(e)) for e in series.y])

    settled = {name: task.counting(one.settled) for name, one in found.items()}
    panels = [
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
        Panel(
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
        ),
    ]
    facts = [
        f"{name}: settled in layer {estimate(values)} of 0 to {depth - 1}, on average"
        for name, values in settled.items()
    ]
    return Section("lens", "When the prediction is made", panels, facts)


def measure_looks(models: Models, task: Task) -> Section:
    """`looked` for `task.looks`, of the first model, drawn over the images."""
    model = next(iter(models.values()))
    asked = [task.examples[number] for number, _ in task.looks]
    written = write(
        model,
        asked,
        stop_tokens=task.stop_tokens,
        max_new_tokens=task.max_new_tokens,
        rows=task.rows,
    ).tokens
    prompts = [prompt_of(example)[0] for example in asked]
    examples = [
        replace(p, input_ids=np.concatenate([p.input_ids, ids]))
        for p, ids in zip(prompts, written, strict=True)
    ]
    tokens = [
        int((place + 0.5) / len(written) * len(ids)) if token is None else min(token, len(ids) - 1)
        for place, (ids, (_, token)) in enumerate(zip(written, task.looks, strict=True))
    ]
    columns = np.array(
        [[len(prompt.input_ids) + token] for prompt, token in zip(prompts, tokens, strict=True)]
    )
    found = looked(model, examples, columns, rows=task.rows, chunk=task.chunk)
    layer = _sharpest(found.decoder[:, :, 0])
    attention = {f"decoder, layer {layer}": found.decoder[:, layer, 0]}
    if len(model.pvm):
        branches, heads = sorted(map(int, model.pvm)), found.branch.shape[2]
        at, head = divmod(
            _sharpest(found.branch[:, :, :, 0].reshape(len(examples), len(branches) * heads, -1)),
            heads,
        )
        attention = {f"branch, layer {branches[at]}": found.branch[:, at, head, 0]} | attention
    panels = []
    for place, (example, (number, _)) in enumerate(zip(examples, task.looks, strict=True)):
        seen = visual_runs(example, model.config)
        column = int(columns[place, 0])
        before = task.processor.decode(example.input_ids[max(column - 4, 0) : column]).strip()
        said = task.processor.decode(
            example.input_ids[column : column + 1], skip_special_tokens=False
        ).strip()
        panels.append(
            AttentionMap(
                f"looked_{place}",
                f"…{before} → {said}",
                caption("look", token=tokens[place], number=number),
                [
                    picture(
                        f.pixels,
                        f.rows,
                        f.columns,
                        task.processor.image_settings,
                        model.config.vision,
                    )
                    for f in seen
                ],
                {
                    name: _maps(values[place], seen, model.config.vision.spatial_merge_size)
                    for name, values in attention.items()
                },
            )
        )
    return Section(
        "looked", "Where it looked", panels, text=caption("looked", name=next(iter(models)))
    )


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
    one = next(iter(found.values()))

    def bars(
        key: str, title: str, text: str, label: str, values: Callable[[Cost], np.ndarray]
    ) -> Panel:
        estimates = [Estimate(*np.quantile(values(c), [0.0, 0.0, 0.5])) for c in found.values()]
        return Panel(
            key,
            title,
            text,
            label,
            "",
            [Series(title, [*range(len(found))], estimates)],
            names=list(found),
        )

    panels = [
        bars(
            "cost_prefill",
            "Time to the first token",
            caption(
                "cost_prefill", tokens=one.tokens, patches=one.patches, rounds=len(one.prefill)
            ),
            "milliseconds",
            lambda c: 1e3 * c.prefill,
        ),
        bars(
            "cost_decode",
            "Time of each further token",
            caption("cost_decode", new_tokens=one.new_tokens),
            "milliseconds",
            lambda c: 1e3 * c.decode,
        ),
    ]
    rows = [["", *found]]
    for label, value in (
        ("weights", lambda c: _size(c.weights)),
        ("keys and values of prompt and answer", lambda c: _size(c.cache)),
        ("the branch's memory of the image", lambda c: _size(c.memory)),
        ("tokens a second, once it writes", lambda c: f"{1 / c.decode.min():,.0f}"),
    ):
        rows.append([label, *(value(c) for c in found.values())])
    facts = []
    if len(found) > 1:
        (first, a), (second, b) = [*found.items()][:2]
        for what, x, y in (
            ("the first token", a.prefill, b.prefill),
            ("a further token", a.decode, b.decode),
        ):
            facts.append(
                f"{what} takes {first} {x.min() / y.min():.2f} times as long as {second} (fastest"
                " rounds)"
            )
    return Section("cost", "Cost", panels, facts, rows)


MEASUREMENTS: Mapping[str, Callable[[Models, Task], Section]] = {
    "dilution": measure_dilution,
    "accuracy": measure_accuracy,
    "lens": measure_lens,
    "looked": measure_looks,
    "ablations": measure_ablations,
    "cost": measure_cost,
}
"""By the name that `--only` takes, in the report's order."""


def _by_position(name: str, values: np.ndarray, buckets: Sequence[PositionBucket]) -> Series:
    """Of [conversations, answer]; buckets in which nothing counts are left out."""
    points = [
        (b.middle, e)
        for b, e in zip(buckets, by_position(values, buckets), strict=True)
        if np.isfinite(e.mean)
    ]
    return Series(name, [x for x, _ in points], [e for _, e in points])


def _by_length(
    name: str, values: np.ndarray, lengths: np.ndarray, buckets: Sequence[PositionBucket]
) -> Series:
    return Series(name, [*range(len(buckets))], by_length(values, lengths, buckets))


def _used(buckets: Sequence[PositionBucket], lengths: np.ndarray) -> list[PositionBucket]:
    return [b for b in buckets if ((lengths >= b.first) & (lengths <= b.last)).any()]


def _above(series: Sequence[Series]) -> float:
    """An upper end for an axis from 0 that all of them fit in."""
    return 1.15 * max(float(np.nanmax(np.array(one.y, float))) for one in series) or 1.0


def _change(what: str, series: Series, buckets: Sequence[PositionBucket]) -> str:
    first, last = series.y[0].mean, series.y[-1].mean
    return (
        f"{what}: {first:.3g} at tokens {buckets[0]} of the answer, {last:.3g} at {buckets[-1]}"
        f" ({series.name})"
    )


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


def _sharpest(attention: np.ndarray) -> int:
    """Of attention [conversations, choices, V], the choice whose attention on the image is the most
    concentrated, over all N."""
    shares = attention / np.maximum(attention.sum(-1, keepdims=True), 1e-9)
    entropy = -(shares * np.log(np.maximum(shares, 1e-9))).sum(-1)
    return int(entropy.mean(0).argmin())


def _maps(values: np.ndarray, seen: Sequence[Frame], merge: int) -> list[np.ndarray]:
    """Attention on visual tokens [V] -> a map [rows, columns] for each frame."""
    grids = [(frame.rows // merge, frame.columns // merge) for frame in seen]
    ends = np.cumsum([rows * columns for rows, columns in grids])
    return [
        part.reshape(grid)
        for part, grid in zip(np.split(values[: ends[-1]], ends[:-1]), grids, strict=True)
    ]


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 2**10:,.2f} KiB" if count else "0"
