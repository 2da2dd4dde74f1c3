"""The trainings that demo.compare compares, on equal terms: the same examples, as many tokens read,
the same replay of long text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from demo.evaluate import encode
from demo.lora import LORA
from demo.run import BASE, BRANCH, Step
from demo.task import Mixture, make_example
from pvm_jax.checkpoint.store import load
from pvm_jax.data.processor import Processor
from pvm_jax.model.qwen3_vl import Qwen3VL
from train.config import Trainable
from train.run.lifecycle import RESULTS

BATCH_SIZE = 8
"""demo/look.yaml's and demo/branch.yaml's."""
LOOK, NEAR, FAR, LONG = "look", "near", "far", "long"
EXAMPLES = {
    LOOK: ("demo/look_data.yaml", {}, 200),
    NEAR: ("demo/branch_data.yaml", {}, 300),
    FAR: ("demo/branch_data.yaml", {"filler": [60, 900]}, 300),
    LONG: ("demo/long_data.yaml", {}, 400),
}
"""What is read, as demo.task takes it, and the seed of its scenes, to which the training's is
added: LOOK by a branch that learns to look, NEAR or FAR by all, and LONG: the replay of long text
that keeps a decoder from forgetting how to read it."""


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        stages: what trains in each, as train.sft calls it. Before the last one, which is
            demo/branch.yaml, a branch may learn to look (demo/look.yaml).
        arguments: of the last stage's train.sft, beside demo/branch.yaml and the rate.
        branch: of convert.hf_to_orbax, which makes it; nothing: no branch.
    """

    stages: Sequence[Trainable]
    arguments: Sequence[str] = ()
    branch: Sequence[str] = ()

    @property
    def looks_first(self) -> bool:
        return len(self.stages) > 1

    def folder(self, name: str) -> str:
        """Of what differs by the branch alone: `name`, and the branch's width if it is not the
        demo's."""
        return "_".join([name, *([] if self.branch == BRANCH else self.branch[-1:])])


# LoRA's rank gives all but "full" the branch's number of parameters.
METHODS = {
    "LoRA": Method(("lora",), LORA),
    "full": Method(("decoder",)),
    "PVM": Method(("pvm",), branch=BRANCH),
    "PVM looks first": Method(("pvm", "pvm"), branch=BRANCH),
    "PVM then LoRA": Method(
        ("pvm", "lora"), ("--lora.rank=35", "--lora.alpha=70"), (*BRANCH[:-1], "64")
    ),
}


@dataclass(frozen=True)
class Terms:
    """How much is trained.

    Attributes:
        looking: steps of BATCH_SIZE in which the branch that looks first learns to look.
        beside: its steps afterwards, on NEAR. What it reads in both, every training reads.
        replayed: batches of LONG among them.
    """

    looking: int = 800
    beside: int = 150
    replayed: int = 20


@dataclass(frozen=True)
class Training:
    """One of the trainings.

    Attributes:
        method: of METHODS.
        seed: of its examples, their order and the fresh weights.
        rate: peak learning rate of the (last) stage on `words`.
        words: NEAR or FAR.
        replay: whether LONG is read too; without it, more of `words`.
        share: of the full number of steps; learning to look is never shortened.
    """

    method: str
    seed: int
    rate: float
    words: str = NEAR
    replay: bool = True
    share: float = 1.0

    @property
    def name(self) -> str:
        """Of its folder and its files."""
        parts = [self.method, self.words, f"{self.rate:g}", *self._no_replay]
        return "_".join([*parts, *([] if self.share == 1 else [f"{self.share:g}"])]).replace(
            " ", "_"
        )

    @property
    def look(self) -> str:
        """Of the folder of its first stage, in which the branch learns to look."""
        return "_".join([METHODS[self.method].folder(LOOK), *self._no_replay])

    @property
    def runs(self) -> list[str]:
        """Of the folders of its stages, in order."""
        return [self.look, self.name] if METHODS[self.method].looks_first else [self.name]

    @property
    def _no_replay(self) -> list[str]:
        return [] if self.replay else ["no_replay"]

    def logs(self, folder: Path) -> list[Path]:
        """TensorBoard folders of its stages, in order."""
        return [folder / run / "log" for run in self.runs]


def load_result(training: Training, folder: Path, plain: Path) -> Qwen3VL:
    """The model that a training in `folder` made of the checkpoint `plain`."""
    method = METHODS[training.method]
    stages = zip(method.stages, training.runs, strict=True)
    made = {trainable: folder / run / RESULTS[trainable] for trainable, run in stages}
    if "decoder" in made:
        return load(made["decoder"])
    checkpoint = folder / method.folder("fresh") if method.branch else plain
    return load(checkpoint, branch=made.get("pvm"), lora=made.get("lora"))


def commands(training: Training, terms: Terms, folder: Path, plain: Path) -> list[Step]:
    """Fresh weights, examples and stages of a training, in the folder of its seed."""
    method, seed, made = METHODS[training.method], training.seed, []
    checkpoint = plain
    if method.branch:
        checkpoint = folder / method.folder("fresh")
        convert = ["convert.hf_to_orbax", BASE, checkpoint, *method.branch, "--seed", seed]
        made.append((checkpoint, convert))
    stages = batches(training, terms, plain)
    totals = Counter[str]()
    for stage in stages:
        totals.update(stage)
    files = {name: folder / f"{name}_data_{n}" / "data.jsonl" for name, n in totals.items()}
    for name, file in files.items():
        made.append((file, _make_examples(name, file.parent, seed, totals[name])))
    own = [f"--checkpoint={checkpoint}", f"--seed={seed}"]
    rate = f"--optimizer.learning_rate={training.rate:g}"
    runs = [("demo/branch.yaml", training.name, [rate, *method.arguments])]
    if method.looks_first:
        branch = folder / training.look / RESULTS["pvm"]
        runs[0][-1].append(f"--branch={branch}")
        runs.insert(0, ("demo/look.yaml", training.look, []))
    for (config, run, more), trainable, stage in zip(runs, method.stages, stages, strict=True):
        # Of what two stages share, each reads its part.
        sources = [f"{{path: {files[n]}, weight: {stage[n] / totals[n]:g}}}" for n in stage]
        command = ["train.sft", f"--config={config}", f"--run_dir={folder / run}", *own]
        command += [f"--trainable={trainable}", *more]
        command += [f"--data.sources=[{', '.join(sources)}]", f"--max_steps={stage.total()}"]
        made.append((folder / run / RESULTS[trainable], command))
    return made


def batches(training: Training, terms: Terms, plain: Path) -> list[Counter[str]]:
    """For each stage of a training how many batches of which examples it reads; in all as many
    tokens as the branch that looks first reads on NEAR."""
    tokens = {name: mean_tokens(name, plain) for name in EXAMPLES}
    words, share = training.words, training.share
    long = terms.replayed if training.replay else 0
    beside = terms.beside * tokens[NEAR]
    if not training.replay:
        beside += terms.replayed * tokens[LONG]
    if METHODS[training.method].looks_first:
        first = long // 2
        stages = [
            {LOOK: terms.looking, LONG: first},
            {words: share * beside / tokens[words], LONG: share * (long - first)},
        ]
    else:
        beside += terms.looking * tokens[LOOK]
        stages = [{words: share * beside / tokens[words], LONG: share * long}]
    return [Counter({name: max(1, round(n)) for name, n in stage.items() if n}) for stage in stages]


def _make_examples(name: str, out: Path, seed: int, count: int) -> list[Any]:
    """The command that writes `count` batches of EXAMPLES, and some more: the last batch of each
    bucket may not fill."""
    file, changed, scenes = EXAMPLES[name]
    mixture = {"seed": scenes + seed, **changed}
    values = [f"--mixture.{key}={value}".replace(" ", "") for key, value in mixture.items()]
    return ["demo.task", out, "--config", file, *values, f"--count={BATCH_SIZE * (count + 4)}"]


@cache
def mean_tokens(examples: str, plain: Path) -> float:
    """Of a row of EXAMPLES."""
    file, changed, _ = EXAMPLES[examples]
    said: dict[str, Any] = yaml.safe_load(Path(file).read_text())["mixture"] | changed
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
    mixture = Mixture(**fields)
    encoded = encode(
        [make_example(mixture, index) for index in range(200)], Processor.from_pretrained(plain)
    )
    return float(np.mean([len(example.input_ids) for example in encoded]))
