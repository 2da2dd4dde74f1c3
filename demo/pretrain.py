"""Makes demo/base: trains the tiny Qwen3-VL from nothing, in three stages, and exports it as a
Hugging Face directory.

`make base` runs this; it takes about an hour on two cores. The shipped checkpoint was made so.
"""

from pathlib import Path

from demo.run import run_steps
from pvm_jax.options import run_as_command

STAGES = 3


def main(out: Path = Path("out/demo"), base: Path = Path("demo/base")) -> None:
    """Writes `base`, which must be absent or empty.

    Args:
        out: folder for data and runs.
        base: Hugging Face directory to write.
    """
    steps = [(out / "untrained" / "orbax", ["demo.checkpoint", out / "untrained"])]
    for stage in range(1, STAGES + 1):
        data, run = out / f"pretrain_{stage}", out / f"pretrain_{stage}_run"
        before = (
            out / "untrained" / "orbax"
            if stage == 1
            else out / f"pretrain_{stage - 1}_run" / "model"
        )
        train = [
            "train.sft",
            f"--config=demo/pretrain_{stage}.yaml",
            f"--checkpoint={before}",
            f"--run_dir={run}",
        ]
        steps += [
            (
                data / "data.jsonl",
                ["demo.task", data, "--config", f"demo/pretrain_{stage}_data.yaml"],
            ),
            (run / "model", [*train, f"--data.sources={data / 'data.jsonl'}"]),
        ]
    run_steps(
        [
            *steps,
            (
                base / "config.json",
                ["convert.orbax_to_hf", out / f"pretrain_{STAGES}_run" / "model", base],
            ),
        ]
    )


if __name__ == "__main__":
    run_as_command(main)
