"""When the branch learns to look: its first stage (demo/look.yaml), one thing at a time changed.

`make regime` runs this; a step whose result is there already is skipped. All variations read the
same examples, but for the one that changes them, and as many of them in all, but for those that
change the number of steps.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from demo.compare import claim
from demo.compare_report import table
from demo.curves import BETWEEN, MISLED, Curves, Measured, measure, once
from demo.run import BASE, BRANCH, Step, run_steps, train
from pvm_jax.checkpoint.store import load
from pvm_jax.options import run_as_command

EXAMPLES = "demo/look_data.yaml"
WORDS = "200"
MEASURED = Curves(between=(int(WORDS),), ahead=(), controls=(int(WORDS),), written=(), scenes=24)


@dataclass(frozen=True)
class Variation:
    """What is not as in the demo's first stage.

    Attributes:
        training: arguments of train.sft.
        branch: those of convert.hf_to_orbax that shape it.
        examples: those of demo.task.
        seed: of the fresh branch and the order of the examples.
        times: as many steps.
    """

    training: Sequence[str] = ()
    branch: Sequence[str] = BRANCH
    examples: Sequence[str] = ()
    seed: int = 0
    times: float = 1


def layers(*numbers: int) -> Variation:
    """The branch at these decoder layers."""
    return Variation(branch=("--pvm_layers", *map(str, numbers), *BRANCH[-2:]))


VARIATIONS = {
    "as in the demo": Variation(),
    "seed 1": Variation(seed=1),
    "seed 2": Variation(seed=2),
    "the decoder sees": Variation(("--data.hide_images=0",)),
    "the decoder sees in half of the rows": Variation(("--data.hide_images=0.5",)),
    "grids of 4 x 4 alone": Variation(examples=("--mixture.sizes=[4]",)),
    "rate 3e-4": Variation(("--optimizer.learning_rate=3e-4",)),
    "rate 3e-3": Variation(("--optimizer.learning_rate=3e-3",)),
    "half the steps": Variation(times=0.5),
    "twice the steps": Variation(times=2),
    "twice the steps, of 4 examples": Variation(("--batch_size=4",), times=2),
    "half the steps, of 16 examples": Variation(("--batch_size=16",), times=0.5),
    "64 wide": Variation(branch=(*BRANCH[:-1], "64")),
    "256 wide": Variation(branch=(*BRANCH[:-1], "256")),
    "layer 0": layers(0),
    "layer 1": layers(1),
    "layer 2": layers(2),
    "layer 3": layers(3),
    "layers 0 and 1": layers(0, 1),
    "layers 2 and 3": layers(2, 3),
    "all four layers": layers(0, 1, 2, 3),
}


def main(out: Path = Path("out/regime"), steps: int = 800, only: list[str] | None = None) -> None:
    """Trains and measures every variation; writes a table, results.md.

    Args:
        out: folder for everything that is written.
        steps: of the demo's first stage.
        only: names of variations; all by default.
    """
    names = only or list(VARIATIONS)
    if unknown := [name for name in names if name not in VARIATIONS]:
        raise ValueError(
            f"--only: no variation is called {', '.join(map(repr, unknown))}; there are:"
            f" {', '.join(VARIATIONS)}"
        )
    claim(out, {"steps": steps, "settings": asdict(MEASURED)})
    measured = {}
    for name in names:
        measured[name] = once(out / f"{_file_name(name)}.json", partial(run, name, out, steps))
    text = markdown(measured)
    (out / "results.md").write_text(text)
    print(text)


def run(name: str, out: Path, steps: int) -> Measured:
    """Trains the branch and measures it."""
    (fresh, _), _, (branch, _) = training_steps = commands(name, out, steps)
    run_steps(training_steps)
    return measure(
        load(fresh, branch=branch),
        fresh,
        MEASURED,
        trained=("pvm",),
        about={"method": name, "table": "regime", "seed": VARIATIONS[name].seed, "rate": None},
        logs=[branch.parent / "log"],
    )


def commands(name: str, out: Path, steps: int) -> list[Step]:
    """The fresh branch, the examples, the training."""
    one = VARIATIONS[name]
    fresh = out / "_".join(("fresh", *one.branch, str(one.seed))).replace("--", "")
    data, look = out / "_".join(("data", *one.examples)).replace("--", ""), out / _file_name(name)
    arguments = (f"--seed={one.seed}", f"--max_steps={int(steps * one.times)}", *one.training)
    return [
        (fresh, ["convert.hf_to_orbax", BASE, fresh, *one.branch, "--seed", one.seed]),
        (
            data / "data.jsonl",
            [
                "demo.task",
                data,
                "--config",
                "demo/look_data.yaml",
                f"--count={17 * steps}",
                *one.examples,
            ],
        ),
        (look / "branch", train("demo/look.yaml", fresh, data, look, *arguments)),
    ]


def _file_name(name: str) -> str:
    """What a variation's files are called."""
    return name.replace(" ", "_")


def markdown(measured: dict[str, Measured]) -> str:
    """The table: attention of the head with the largest share, where the value is to be said."""
    rows = []
    for name, one in measured.items():
        looks = ", ".join(
            f"{layer}: {max(heads):.2f}" for layer, heads in one.attention[WORDS].items()
        )
        gates = ", ".join(f"{values[-1]:+.2f}" for values in one.gates.values())
        rows.append(
            [
                name,
                *(f"{np.mean(one.curves[curve][WORDS]):.3f}" for curve in (BETWEEN, MISLED)),
                looks,
                gates,
            ]
        )
    header = [
        "first stage",
        f"accuracy at {WORDS} words",
        "branch on another image",
        "best head's attention by layer",
        "gates",
    ]
    return table(header, rows) + "\n"


if __name__ == "__main__":
    run_as_command(main)
