"""A measurement of your own: how much of what the model writes it has from the image.

    python -m examples.measurement

A measurement is a function from the model and a batch to an array with a value for each token of
the answers; `read` runs it over any number of conversations, in batches of one shape. Here: the
entropy of the distribution from which a token is predicted, in nats, with the image and without. A
line of the demo's answers is three tokens, `B3`, ` ground`, ` navy`: only the third needs the
image.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

import pvm_jax
from demo.task import Mixture, draw, make_example
from pvm_jax.measure.intervals import estimate
from pvm_jax.measure.reading import at_predicting, find_answers, read
from pvm_jax.options import run_as_command


def entropies(
    model: pvm_jax.Qwen3VL, batch: pvm_jax.Batch, columns: jax.Array, chunk: int
) -> jax.Array:
    """[B, A] nats, at the column before each of `columns` [B, A], where that token is predicted.

    Compiled once, so a function of a module. It reads whole rows; for rows of many thousand tokens
    see `Qwen3VL.inspect`, which goes in pieces of `chunk` columns (pvm_jax/measure/lens.py).
    """
    del chunk
    logprobs = jax.nn.log_softmax(model(batch))  # [B, S, vocab]
    return at_predicting(-(jnp.exp(logprobs) * logprobs).sum(-1)[None], columns)


def main(
    checkpoint: Path = Path("out/demo/checkpoint"), branch: Path | None = None, scenes: int = 32
) -> None:
    """Prints the mean entropy by place in a line, and its 95 % interval over scenes.

    Args:
        checkpoint: directory that convert.hf_to_orbax wrote (see examples/generate.py).
        branch: a trained branch, as `make demo` leaves one in out/demo/run/branch.
        scenes: conversations, of digits that were held out from training.
    """
    model = pvm_jax.load(checkpoint, branch=branch)
    processor = pvm_jax.Processor.from_pretrained(checkpoint)
    mixture = Mixture(sizes=(2,), lines=(12, 12), digits="heldout", seed=7)
    grids = [make_example(mixture, index) for index in range(scenes)]
    examples = [processor.encode(grid.messages(draw(grid.scene))) for grid in grids]
    answers = find_answers(examples)
    for name, hide in (("the decoder sees the image", False), ("it does not", True)):
        found = read(model, examples, entropies, columns=answers.columns, rows=8, hide=hide)
        lines = found[:, : 12 * 3].reshape(scenes, 12, 3).mean(1)  # what follows ends the turn
        print(name)
        for place, values in zip(("cell", "attribute", "value"), lines.T, strict=True):
            print(f"  {place:9} {estimate(values)} nats")


if __name__ == "__main__":
    run_as_command(main)
