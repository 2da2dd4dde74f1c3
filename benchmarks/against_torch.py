"""SFT step and decoding beside transformers + PyTorch, on the CPU, in float32, with the same
weights and the same inputs.

pip install torch==2.13.0   # in an environment of its own: torch is no dependency of the package
python -m benchmarks.against_torch
"""

import sys
from collections.abc import Callable

try:
    import torch  # pyright: ignore[reportMissingImports]
except ImportError:
    sys.exit("error: benchmarks.against_torch needs PyTorch: pip install torch==2.13.0")

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks.device import best
from benchmarks.sizes import TEXT
from convert.layout import layout
from pvm_jax import Batch, ModelConfig, VisionConfig, abstract_model, generate
from pvm_jax.model.parameters import by_path
from pvm_jax.options import run_as_command
from train.config import OptimizerConfig
from train.step.optimizer import make_optimizer, make_schedule
from train.step.state import TrainState, make_loss, make_step, split_model

CONFIG = ModelConfig(
    text=TEXT,
    vision=VisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        depth=8,
        num_heads=6,
        out_hidden_size=640,
        deepstack_visual_indexes=(1, 3, 5),
    ),
    tie_word_embeddings=True,
    image_token_id=31990,
    video_token_id=31991,
    vision_start_token_id=31992,
    vision_end_token_id=31993,
    remat="none",
)


def main(
    rows: int = 4,
    text: int = 160,
    side: int = 16,
    new_tokens: int = 128,
    repeats: int = 3,
    threads: int = 2,
) -> None:
    """Prints seconds of both and their ratio; the best of `repeats` counts, and both do full
    fine-tuning.

    Args:
        rows: rows of a batch.
        text: text tokens of a row.
        side: rows and columns of patches of its image.
        new_tokens: tokens to decode.
        repeats: timed runs.
        threads: PyTorch's; JAX takes every core.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    reference = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**CONFIG.to_hf())).float()
    stored = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    graphdef, abstract = nnx.split(abstract_model(CONFIG))
    params = jax.tree.unflatten(
        jax.tree.structure(nnx.as_pure(abstract)), list(_leaves(stored, by_path(abstract)))
    )
    batch, tensors = _inputs(rows, text, side)
    timed = {
        "SFT step, all weights": (
            _torch_step(reference, tensors),
            _jax_step(graphdef, params, batch),
        ),
        "prefill + decode": (
            _torch_decode(reference, tensors, new_tokens),
            _jax_decode(graphdef, params, batch, new_tokens),
        ),
    }
    count = sum(x.size for x in jax.tree.leaves(params))
    table = Table(
        title=(
            f"{count / 1e6:.0f} M parameters, float32, {rows} rows of"
            f" {tensors['input_ids'].shape[1]} tokens, {new_tokens} new tokens"
        )
    )
    for column in ("", "transformers + torch", "pvm-jax", "torch / jax"):
        table.add_column(column)
    for name, (theirs, ours) in timed.items():
        seconds = [best(run, repeats) for run in (theirs, ours)]
        table.add_row(name, *(f"{s:.2f} s" for s in seconds), f"{seconds[0] / seconds[1]:.2f}")
    Console(width=120).print(table)


def _inputs(rows: int, text: int, side: int) -> tuple[Batch, dict[str, torch.Tensor]]:
    """The same rows for both, each an image of side x side patches before `text` random tokens."""
    rng = np.random.default_rng(0)
    image = [31992, *[31990] * (side * side // 4), 31993]
    ids = np.stack([np.concatenate([image, rng.integers(0, 31000, text)]) for _ in range(rows)])
    arrays = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "pixel_values": (
            rng.normal(size=(rows * side * side, CONFIG.vision.patch_dim)).astype(np.float32)
        ),
        "image_grid_thw": np.array([[1, side, side]] * rows),
    }
    batch = Batch.from_hf(arrays | {"labels": np.where(ids < 31990, ids, -100)}, CONFIG)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["mm_token_type_ids"] = (tensors["input_ids"] == CONFIG.image_token_id).long()
    return batch, tensors


def _leaves(stored: dict[str, np.ndarray], shapes: dict):
    """The parameter tree's leaves, in its order, out of Hugging Face's tensors."""
    parts: dict[str, list] = {}
    for name, slot in layout(CONFIG).items():
        parts.setdefault(slot.path, []).append((slot.index or 0, stored[name]))
    for path, leaf in shapes.items():
        tensors = [tensor for _, tensor in sorted(parts[path], key=lambda part: part[0])]
        yield jax.numpy.asarray(np.stack(tensors).reshape(leaf.shape))


def _torch_step(model, tensors) -> Callable[[], object]:
    labels = torch.where(tensors["input_ids"] < 31990, tensors["input_ids"], -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run():
        model.train()
        optimizer.zero_grad()
        model(**tensors, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def _torch_decode(model, tensors, new_tokens: int) -> Callable[[], object]:
    def run():
        model.eval()
        with torch.no_grad():
            return model.generate(
                **tensors, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )

    return run


def _jax_step(graphdef, params, batch) -> Callable[[], object]:
    schedule = make_schedule(OptimizerConfig(), 1000)
    optimizer = make_optimizer(OptimizerConfig())
    graphdef, trained, frozen = split_model(nnx.merge(graphdef, params), "all")
    trained, frozen = jax.tree.map(jax.numpy.copy, nnx.as_pure(trained)), nnx.as_pure(frozen)
    step = jax.jit(make_step(make_loss(graphdef, chunk=512), optimizer, schedule), donate_argnums=0)
    state = [TrainState(trained, jax.jit(optimizer.init)(trained), jax.numpy.int32(0))]

    def run():
        state[0], metrics = step(state[0], frozen, batch)
        return jax.block_until_ready(metrics)

    return run


def _jax_decode(graphdef, params, batch, new_tokens: int) -> Callable[[], object]:
    model = nnx.merge(graphdef, params)
    return lambda: jax.block_until_ready(
        generate(model, batch, max_new_tokens=new_tokens, temperature=0.0, stop_tokens=())
    )


if __name__ == "__main__":
    run_as_command(main)
