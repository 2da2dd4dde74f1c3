"""Makes demo/base: trains the tiny Qwen3-VL from nothing, in four stages, and exports it as a
Hugging Face directory.

`make base` runs this; it takes about an hour on two cores. The shipped checkpoint was made so.
"""

from pathlib import Path

from demo.run import Step, run_steps
from pvm_jax.options import run_as_command

STAGES = 4


def main(out: Path = Path("out/demo"), base: Path = Path("demo/base")) -> None:
    """Writes `base`, which must be absent or empty.

    Args:
        out: folder for data and runs.
        base: Hugging Face directory to write.
    """
    steps: list[Step] = [(out / "untrained" / "orbax", ["demo.checkpoint", out / "untrained"])]
    for stage in range(1, STAGES + 1):
        run = out / f"pretrain_{stage}_run"
        before = steps[-1][0]
        sources = []
        for config in sorted(Path("demo").glob(f"pretrain_{stage}*_data.yaml")):
            data = out / config.stem.removesuffix("_data")
            steps.append((data / "data.jsonl", ["demo.task", data, "--config", config]))
            sources.append(str(data / "data.jsonl"))
        train = ["train.sft", f"--config=demo/pretrain_{stage}.yaml", f"--checkpoint={before}"]
        train += [f"--run_dir={run}", f"--data.sources=[{','.join(sources)}]"]
        steps.append((run / "model", train))
    run_steps([*steps, (base / "config.json", ["convert.orbax_to_hf", steps[-1][0], base])])


if __name__ == "__main__":
    run_as_command(main)
