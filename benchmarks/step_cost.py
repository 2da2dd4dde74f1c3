"""What a training step costs by what trains: FLOPs counted from the traced program, bytes of
gradients and optimizer state.

The published shapes are traced abstractly: no parameter is allocated.

    python -m benchmarks.step_cost
    python -m benchmarks.step_cost --sizes '[2b, 32b]' --tokens 2048 --patches 4096
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from pvm_jax import Batch, LoRAConfig, ModelConfig, abstract_model
from pvm_jax.options import run_as_command
from train.config import OptimizerConfig, Trainable
from train.step.flops import count_flops
from train.step.optimizer import make_optimizer
from train.step.state import cast, loss_and_gradient, make_loss, split_model


class StepCost(NamedTuple):
    """Parameters that train, FLOPs of the forward pass and of forward + backward, bytes of
    gradients and of Adam's state."""

    parameters: int
    forward: int
    step: int
    gradients: int
    moments: int


def main(sizes: Sequence[str] = ("4b", "8b"), tokens: int = 8192, patches: int = 8192) -> None:
    """Prints a table with a line for each size and each kind of training.

    Args:
        sizes: presets of the model.
        tokens: of a row, visual ones included; the head counts as if all of them carried loss.
        patches: of a row.
    """
    table = Table(
        title=(
            f"One row of {tokens:,} tokens and {patches:,} patches; nothing recomputed but the"
            " logits"
        )
    )
    for column in (
        "size",
        "trains",
        "parameters",
        "forward",
        "step",
        "step / forward",
        "of 'all'",
        "gradients",
        "Adam",
    ):
        table.add_column(column, justify="left" if column in ("size", "trains") else "right")
    for size in sizes:
        config = ModelConfig.preset(
            size, dtype="bfloat16", param_dtype="bfloat16", remat="none", attention="xla"
        )
        costs = {
            trainable: step_cost(config, trainable, tokens, patches)
            for trainable in get_args(Trainable)
        }
        for trainable, cost in costs.items():
            table.add_row(
                size,
                trainable,
                f"{cost.parameters / 1e6:,.1f} M",
                f"{cost.forward / 1e12:,.1f} TFLOP",
                f"{cost.step / 1e12:,.1f} TFLOP",
                f"{cost.step / cost.forward:.2f}",
                f"{cost.step / costs['all'].step:.0%}",
                f"{cost.gradients / 2**30:,.2f} GiB",
                f"{cost.moments / 2**30:,.2f} GiB",
            )
    Console(width=130).print(table)


def step_cost(config: ModelConfig, trainable: Trainable, tokens: int, patches: int) -> StepCost:
    """Cost of one row of this size, trained parameters in float32; LoRA with its default rank and
    targets."""
    config = replace(config, lora=LoRAConfig() if trainable == "lora" else None)
    graphdef, trained, frozen = split_model(abstract_model(config), trainable)
    params = jax.eval_shape(lambda params: cast(params, "float32"), nnx.as_pure(trained))
    inputs = (
        params,
        nnx.as_pure(frozen),
        Batch.empty(config, rows=1, length=tokens, patches=patches),
    )
    loss = make_loss(graphdef, chunk=512)

    def gradient(*inputs):
        return loss_and_gradient(loss, *inputs, accumulation=1)[1]

    optimizer = make_optimizer(OptimizerConfig())
    return StepCost(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        forward=count_flops(loss, *inputs),
        step=count_flops(gradient, *inputs),
        gradients=_bytes(jax.eval_shape(gradient, *inputs)),
        moments=_bytes(jax.eval_shape(optimizer.init, params)),
    )


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    run_as_command(main)
