"""The branch against LoRA and full fine-tuning: data of the same kind, as many tokens, several
seeds, one command.

`make compare` runs this; a step whose result is there already is skipped. Every seed has its own
examples, their order, and its own fresh branch or adapter. The branch is trained as published, and
as in the demo, where it spends half of its tokens on learning to look (demo/look.yaml). All are
measured on the same held-out scenes, far beyond the trained distances.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import yaml

from demo.compare_report import UNTRAINED, Measured, write_report
from demo.evaluate import EvaluationSettings, encode, sees
from demo.recall import attention_on_cell
from demo.run import BASE, BRANCH, Step, run_steps, train
from pvm_jax.checkpoint.store import load
from pvm_jax.data.processor import Processor
from pvm_jax.measure.ablations import mislead
from pvm_jax.measure.pictures import exchanged
from pvm_jax.model.qwen3_vl import Qwen3VL
from pvm_jax.options import run_as_command
from train.config import Trainable
from train.run.events import read_values
from train.run.lifecycle import RESULTS
from train.step.state import split_model

EXAMPLES = "demo/branch_data.yaml"
LOOK_EXAMPLES = "demo/look_data.yaml"
BATCH_SIZE = 16  # demo/look.yaml's and demo/branch.yaml's
SEED_OF_DATA = (
    100  # examples of seed s are those of 100 + s: apart from what the base model was trained on
)

FAR = EvaluationSettings(distances=(0, 100, 200, 400, 800, 1600), scenes=24)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        trainable: what trains, as train.sft calls it.
        arguments: of train.sft, beside demo/branch.yaml.
        looks_first: whether the branch has learned to look, in half of the tokens.
    """

    trainable: Trainable
    arguments: Sequence[str] = ()
    looks_first: bool = False


# LoRA's rank gives it the branch's number of parameters. Each method's rate is the best of those
# tried (docs/compare.md).
METHODS = {
    "LoRA": Method(
        "lora", ("--lora.rank=50", "--lora.alpha=100", "--optimizer.learning_rate=3e-3")
    ),
    "full": Method("decoder", ("--optimizer.learning_rate=1e-3",)),
    "PVM": Method("pvm", ("--optimizer.learning_rate=2e-3",)),
    "PVM looks first": Method("pvm", looks_first=True),
}


def main(
    out: Path = Path("out/compare"),
    seeds: int = 3,
    steps: int = 300,
    settings: EvaluationSettings = FAR,
) -> None:
    """Trains every method on every seed, measures all of them and the base, writes results.json,
    results.md, results.png.

    Args:
        out: folder for everything that is written.
        seeds: how many seeds.
        steps: of all methods but the branch that looks first. It takes half of them, after 4/3 as
            many in which it learns to look, on rows of a third of the tokens: no more tokens in
            all.
        settings: what is measured (what the models write themselves is not).
    """
    if settings.scenes % settings.batch_size == 1:
        raise ValueError(
            "settings.scenes: a last batch of one scene has no other image to show; take one more"
        )
    claim(
        out,
        {
            "steps": steps,
            "methods": {n: asdict(m) for n, m in METHODS.items()},
            "settings": asdict(settings),
        },
    )
    plain = out / "plain"
    run_steps([(plain, ["convert.hf_to_orbax", BASE, plain, "--plain"])])
    for seed in range(seeds):
        run_steps(training_steps(out, seed, steps))
    processor = Processor.from_pretrained(plain)
    measured = [once(out / "base.json", partial(measure_base, plain, processor, settings))]
    for seed in range(seeds):
        for name in METHODS:
            folder = out / f"seed_{seed}"
            make = partial(measure_trained, folder, name, seed, plain, processor, settings)
            measured.append(once(folder / f"{file_name(name)}.json", make))
    distances = yaml.safe_load(Path(EXAMPLES).read_text())["mixture"]["filler"]
    looking, beside = stages(steps)
    how = (
        f"{steps} steps (the branch that looks first: {looking} short ones in which it learns to"
        f" look, then {beside})"
    )
    write_report(measured, settings, distances, how, out)


def claim(out: Path, terms: Mapping[str, Any]) -> None:
    """Notes in `out` on what terms the comparison is; raises ValueError if others were noted there,
    whose results it holds."""
    note, mine = out / "terms.json", json.dumps(terms, indent=2) + "\n"
    if note.exists() and note.read_text() != mine:
        raise ValueError(
            f"{out} holds a comparison on other terms (see {note}): give another --out, or"
            " remove it"
        )
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(mine)


def stages(steps: int) -> tuple[int, int]:
    """The branch's steps on LOOK_EXAMPLES and on EXAMPLES that together read as many tokens as
    `steps` on EXAMPLES, or less."""
    return steps * 4 // 3, steps // 2


def training_steps(out: Path, seed: int, steps: int) -> list[Step]:
    """The commands of one seed: its examples, its fresh branch, and the trainings."""
    folder, plain = out / f"seed_{seed}", out / "plain"
    data, look_data, fresh, look = (
        folder / name for name in ("data", "look_data", "fresh", "look")
    )
    looking, beside = stages(steps)
    commands: list[Step] = [
        (fresh, ["convert.hf_to_orbax", BASE, fresh, *BRANCH, "--seed", seed]),
        (look_data / "data.jsonl", make_data(LOOK_EXAMPLES, look_data, seed, looking)),
        (
            look / "branch",
            train(
                "demo/look.yaml", fresh, look_data, look, f"--seed={seed}", f"--max_steps={looking}"
            ),
        ),
        (data / "data.jsonl", make_data(EXAMPLES, data, seed, steps)),
    ]
    for name, method in METHODS.items():
        run = folder / file_name(name)
        own = [f"--trainable={method.trainable}", f"--seed={seed}", *method.arguments]
        if method.looks_first:
            own += [f"--max_steps={beside}", f"--branch={look / 'branch'}"]
        else:
            own += [f"--max_steps={steps}"]
        checkpoint = fresh if method.trainable == "pvm" else plain
        commands.append(
            (
                run / RESULTS[method.trainable],
                train("demo/branch.yaml", checkpoint, data, run, *own),
            )
        )
    return commands


def make_data(examples: str, out: Path, seed: int, steps: int) -> list[object]:
    """The command that writes what `steps` steps read. Some more: each bucket's last batch may not
    fill."""
    count = BATCH_SIZE * (steps + 4)
    return [
        "demo.task",
        out,
        "--config",
        examples,
        f"--mixture.seed={SEED_OF_DATA + seed}",
        f"--count={count}",
    ]


def file_name(name: str) -> str:
    """What a method's or a variation's files are called."""
    return name.replace(" ", "_")


def once(file: Path, measure: Callable[[], Measured]) -> Measured:
    """What `measure` gives, kept in `file` for the next time."""
    if not file.exists():
        content = json.dumps(asdict(measure()))
        file.write_text(content)
        print(f"measured: {file}", flush=True)
    return Measured(**json.loads(file.read_text()))


def measure_base(plain: Path, processor: Processor, settings: EvaluationSettings) -> Measured:
    """The base as it is, and what it guesses about other images."""
    model, own, other = load(plain), {}, {}
    for distance in settings.distances:
        encoded = encode(settings.examples(distance, settings.scenes), processor)
        own[str(distance)] = float(sees(model, encoded, settings).mean())
        other[str(distance)] = float(
            sees(model, exchanged(encoded, model.config.vision), settings).mean()
        )
    return Measured(UNTRAINED, None, 0, own, shuffled=other)


def measure_trained(
    folder: Path,
    name: str,
    seed: int,
    plain: Path,
    processor: Processor,
    settings: EvaluationSettings,
) -> Measured:
    """One training's result."""
    trainable, run = METHODS[name].trainable, folder / file_name(name)
    model = load_result(trainable, run, folder / "fresh", plain)
    logs = [folder / "look" / "log"] if METHODS[name].looks_first else []
    return measure(
        name,
        seed,
        model,
        trainable=trainable,
        processor=processor,
        settings=settings,
        logs=[*logs, run / "log"],
    )


def measure(
    name: str,
    seed: int,
    model: Qwen3VL,
    *,
    trainable: Trainable,
    processor: Processor,
    settings: EvaluationSettings,
    logs: Sequence[Path],
) -> Measured:
    """A trained model; of the branch also its gates in `logs`, where it looks, and whether it
    matters at which image."""
    accuracy, misled, attention, gates = {}, {}, {}, {}
    for distance in settings.distances:
        examples = settings.examples(distance, settings.scenes)
        encoded = encode(examples, processor)
        accuracy[str(distance)] = float(sees(model, encoded, settings).mean())
        if trainable == "pvm":
            misled[str(distance)] = float(sees(mislead(model), encoded, settings).mean())
            attention[str(distance)] = attention_on_cell(model, processor, examples, settings)
    if trainable == "pvm":
        gates = read_gates(*logs)
    trained = sum(leaf.size for leaf in jax.tree.leaves(split_model(model, trainable)[1]))
    return Measured(name, seed, trained, accuracy, misled=misled, attention=attention, gates=gates)


def load_result(trainable: Trainable, run: Path, fresh: Path, plain: Path) -> Qwen3VL:
    """The model that a training made."""
    if trainable == "pvm":
        return load(fresh, branch=run / "branch")
    return load(plain, lora=run / "lora") if trainable == "lora" else load(run / "model")


def read_gates(*logs: Path) -> dict[str, list[float]]:
    """The gates at every step of trainings that followed one another, by layer, out of their
    TensorBoard files."""
    gates: dict[str, list[float]] = {}
    for log in logs:
        for tag, points in sorted(read_values(log).items()):
            if tag.startswith("gate/"):
                gates.setdefault(tag.removeprefix("gate/"), []).extend(
                    value for _, value in sorted(dict(points).items())
                )
    return gates


if __name__ == "__main__":
    run_as_command(main)
