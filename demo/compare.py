"""The branch against LoRA and full fine-tuning on equal terms, one command.

`make compare` runs this; what is measured already (demo/results) is not trained again. All methods
read the same examples, as many tokens, the same replay of long text; their rates are found by the
same search on a seed that is not reported; every seed has its own examples, their order, and its
own fresh weights. All are measured on the same held-out scenes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from demo.compare_report import write_report
from demo.curves import UNTRAINED, Curves, Measured, measure, once
from demo.run import BASE, run_steps
from demo.trainings import FAR, METHODS, NEAR, Terms, Training, commands, load_result
from pvm_jax.checkpoint.store import load
from pvm_jax.options import run_as_command

TABLES = {
    "near": (NEAR, True),
    "near, without replay": (NEAR, False),
    "far": (FAR, True),
}
"""By name: the words between image and question that are trained, and whether long text is
replayed."""
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SEARCHED = 50
"""The seed on which rates are chosen; no result of it is reported."""
VALIDATION = Curves(
    between=(0, 200, 400, 800), ahead=(800,), controls=(), written=(), scenes=16, seed=20_000
)
"""What rates are chosen by: the mean of all of this, on scenes that are not reported."""
SHARE = 0.25
"""Of the steps, in the search, which replays no long text."""


def main(
    out: Path = Path("out/compare"),
    results: Path = Path("demo/results"),
    seeds: int = 3,
    terms: Terms = Terms(),  # noqa: B008
    curves: Curves = Curves(),  # noqa: B008
    only: list[str] | None = None,
) -> None:
    """Chooses every method's rate, trains every method on every seed, measures all of them and the
    base; writes results.json, results.md and a picture of each table (renewed with every seed).

    Hours on two cores; what is there is skipped, so the same command goes on.

    Args:
        out: folder for examples and runs.
        results: folder for what was measured, a file a training, and for the report; the shipped
            one has what docs/compare.md shows.
        seeds: how many seeds.
        terms: how much is trained.
        curves: what is measured.
        only: tables to make: near, "near, without replay", far; all by default.
    """
    if unknown := [name for name in only or () if name not in TABLES]:
        raise ValueError(f"--only: there is no table {unknown[0]!r}, but {', '.join(TABLES)}")
    claim(results, terms_of(terms, curves))
    # Seeds and rates share their programs, which are compiled once for all of these processes.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((out / "programs").absolute()))
    plain = out / "plain"
    run_steps([(plain, ["convert.hf_to_orbax", BASE, plain, "--plain"])])
    measured = [once(results / "base.json", lambda: measure_base(plain, curves))]
    work = partial(result, out=out, results=results, terms=terms)
    rates = {name: best_rate(name, work) for name in METHODS}
    for table in only or TABLES:
        words, replay = TABLES[table]
        for seed in range(seeds):
            for name, rate in rates.items():
                training = Training(name, seed, rate, words, replay)
                measured.append(work(training, curves=curves, table=table))
            write_report(measured, asdict(terms), results)


def terms_of(terms: Terms, curves: Curves) -> dict[str, Any]:
    """What all results of a folder have in common, the base among it."""
    return {
        "base": hashlib.sha256(Path(BASE, "model.safetensors").read_bytes()).hexdigest(),
        "terms": asdict(terms),
        "curves": asdict(curves),
        "methods": {name: asdict(method) for name, method in METHODS.items()},
    }


def claim(results: Path, terms: Mapping[str, Any]) -> None:
    """Notes in `results` on what terms the comparison is, new methods too; raises ValueError if
    others were noted there, whose results it holds."""
    note, mine = results / "terms.json", json.dumps(terms, indent=2) + "\n"
    noted, now = (json.loads(text) for text in (note.read_text() if note.exists() else mine, mine))
    if noted | {"methods": now["methods"] | noted["methods"]} != now:
        raise ValueError(
            f"{results} holds a comparison on other terms (see {note}): give another --results"
            " and --out, or remove both folders"
        )
    results.mkdir(parents=True, exist_ok=True)
    note.write_text(mine)


def best_rate(method: str, work: Callable[..., Measured]) -> float:
    """The rate of RATES that does best on VALIDATION after SHARE of the steps."""
    means = {}
    for rate in RATES:
        training = Training(method, SEARCHED, rate, replay=False, share=SHARE)
        found = work(training, curves=VALIDATION, table="search")
        means[rate] = np.mean([v for by_words in found.curves.values() for v in by_words.values()])
    best = max(means, key=lambda rate: means[rate])
    scores = ", ".join(f"{rate:g}: {mean:.3f}" for rate, mean in means.items())
    print(f"{method}: rate {best:g} (mean accuracy in the search: {scores})", flush=True)
    return best


def result(
    training: Training, *, curves: Curves, table: str, out: Path, results: Path, terms: Terms
) -> Measured:
    """What a training comes to, trained and measured unless that is done."""
    folder, plain = out / f"seed_{training.seed}", out / "plain"

    def train_and_measure() -> Measured:
        run_steps(commands(training, terms, folder, plain))
        about = {"method": training.method, "table": table}
        return measure(
            load_result(training, folder, plain),
            plain,
            curves,
            trained=METHODS[training.method].stages,
            about=about | {"seed": training.seed, "rate": training.rate},
            logs=training.logs(folder),
        )

    return once(results / f"{training.name}_seed_{training.seed}.json", train_and_measure)


def measure_base(plain: Path, curves: Curves) -> Measured:
    """The base as it is, and what it guesses about other images."""
    about = {"method": UNTRAINED, "table": "", "seed": None, "rate": None}
    return measure(load(plain), plain, curves, trained=(), about=about)


if __name__ == "__main__":
    run_as_command(main)
