"""Load a checkpoint and ask it about an image, three ways: at once, as a stream, several samples.

    python -m convert.hf_to_orbax demo/base out/demo/checkpoint \
        --pvm_layers 1 2 --pvm_hidden_size 128
    python -m examples.generate

The first command makes the checkpoint (the demo's, which `make demo` makes too); the other examples
take the same.
"""

from pathlib import Path

import jax
import numpy as np

import pvm_jax
from demo.task import Mixture, draw, make_example
from pvm_jax.options import run_as_command


def main(checkpoint: Path = Path("out/demo/checkpoint"), branch: Path | None = None) -> None:
    """Asks the demo's model what is in a grid of four digits that it was not trained on.

    Args:
        checkpoint: directory that convert.hf_to_orbax wrote.
        branch: a trained branch, as `make demo` leaves one in out/demo/run/branch.
    """
    model = pvm_jax.load(checkpoint, branch=branch)
    processor = pvm_jax.Processor.from_pretrained(checkpoint)

    # A conversation is a list of chat messages; an image is a file or a PIL image.
    scene = make_example(Mixture(sizes=(2,), lines=(8, 8), digits="heldout"), 0)
    question = scene.messages(draw(scene.scene))[:1]
    batch = pvm_jax.Batch.from_hf(processor([question]), model.config)

    # Greedy. The row ends at the checkpoint's own stop token.
    answer = pvm_jax.generate(model, batch, max_new_tokens=512, temperature=0.0)
    text = processor.decode(answer.tokens[0, : answer.lengths[0]])
    print(f"{answer.lengths[0]} tokens:\n{text}")

    # The demo's lines can be checked: `B2 ink lime` is true or not.
    lines = [line.split() for line in text.splitlines() if line.count(" ") == 2]
    right = [scene.scene.value(cell, name) == value for cell, name, value in lines]
    print(f"{sum(right)} of {len(lines)} lines are right")

    # The same tokens as they come; a decoder holds back what is not a whole character yet.
    arriving = processor.decoder()
    for (token,) in pvm_jax.stream(model, batch, max_new_tokens=512, temperature=0.0):
        print(arriving(int(token)), end="", flush=True)

    # Four samples of the one prompt share its prefill. `logprobs` are of the tokens drawn.
    samples = pvm_jax.generate(
        model, batch, max_new_tokens=12, num_samples=4, temperature=0.7, rng=jax.random.key(0)
    )
    for tokens, logprobs in zip(samples.tokens, np.asarray(samples.logprobs), strict=True):
        print(f"log-probability {logprobs.sum():6.2f}: {processor.decode(tokens)!r}")


if __name__ == "__main__":
    run_as_command(main)
