"""The demo's branch beside LoRA of the same size, which reads as many tokens; both are measured.

`make demo-lora` runs this, on what `make demo` made, or makes it first.
"""

from pathlib import Path

from demo.run import BASE, Step, branch_steps, run_steps, train
from pvm_jax.options import run_as_command

LORA = ("--lora.rank=50", "--lora.alpha=100")
"""On all seven projections of the decoder: as many parameters as the branch."""
EXAMPLES = 3904
"""Of demo/branch_data.yaml: as many tokens as the branch reads in both of its stages."""


def main(out: Path = Path("out/demo")) -> None:
    """Trains LoRA on the demo's base, without a branch, and measures branch, base and LoRA.

    Args:
        out: the demo's folder; the adapter is its lora/lora, the report its compared/report.html.
    """
    checkpoint, branch, lora = out / "checkpoint", out / "run" / "branch", out / "lora" / "lora"
    report = out / "compared"
    evaluate = ["demo.evaluate", report, checkpoint, "--branch", branch, "--lora", lora]
    measure = (report / "report.html", evaluate)
    run_steps([*branch_steps(out), *lora_steps(out), measure])
    print(f"The report: {report / 'report.html'} (open it in a browser)")


def lora_steps(out: Path) -> list[Step]:
    """From the shipped checkpoint to the adapter `out`/lora/lora."""
    plain, data, run = out / "plain", out / "lora_data", out / "lora"
    task = ["demo.task", data, "--config", "demo/branch_data.yaml", "--count", EXAMPLES]
    rate = "--optimizer.learning_rate=3e-3"  # the best of four (make compare)
    sft = train("demo/branch.yaml", plain, data, run, "--trainable=lora", *LORA, rate)
    return [
        (plain, ["convert.hf_to_orbax", BASE, plain, "--plain"]),
        (data / "data.jsonl", task),
        (run / "lora", sft),
    ]


if __name__ == "__main__":
    run_as_command(main)
