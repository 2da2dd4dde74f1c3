"""SFT step of all weights and decoding beside transformers + PyTorch, with the same weights and
inputs, nothing recomputed: on the CPU in float32; a published size on an NVIDIA GPU in
bfloat16, the trained weights in float32 (PyTorch: autocast). PyTorch runs as transformers has it,
not compiled.

pip install torch==2.13.0   # in an environment of its own: torch is no dependency of the package
python -m benchmarks.against_torch
python -m benchmarks.against_torch --size 2b --rows 1 --text 3072 --side 64
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is for both
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
from benchmarks.sizes import TEXT, config_of
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
    size: str = "small",
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
        size: "small" (109 M parameters, CPU), or one for a GPU: 2b, 4b, 8b.
        rows: rows of a batch.
        text: text tokens of a row.
        side: rows and columns of patches of its image.
        new_tokens: tokens to decode.
        repeats: timed runs.
        threads: PyTorch's; JAX takes every core.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = CONFIG if size == "small" else replace(config_of(size).with_pvm(()), remat="none")
    place = _place(size)
    with torch.device(place):
        reference = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config.to_hf())).float()
    stored = {name: tensor.cpu().numpy() for name, tensor in reference.state_dict().items()}
    graphdef, abstract = nnx.split(abstract_model(config))
    leaves = list(_leaves(config, stored, by_path(abstract)))
    params = jax.tree.unflatten(jax.tree.structure(nnx.as_pure(abstract)), leaves)
    batch, tensors = _inputs(config, rows, text, side)
    tensors = {name: tensor.to(place) for name, tensor in tensors.items()}
    count = sum(x.size for x in jax.tree.leaves(params))
    table = Table(
        title=(
            f"{count / 1e6:.0f} M parameters, {config.dtype}, {rows} rows of"
            f" {tensors['input_ids'].shape[1]} tokens, {new_tokens} new tokens,"
            f" {jax.devices()[0].device_kind}"
        )
    )
    for column in ("", "transformers + torch", "pvm-jax", "torch / jax"):
        table.add_column(column)
    # One pair after the other: what the first keeps for its gradients is gone before the next.
    makes = {
        "SFT step, all weights": (
            lambda: _torch_step(reference, tensors, config),
            lambda: _jax_step(graphdef, params, batch),
        ),
        "prefill + decode": (
            lambda: _torch_decode(reference, tensors, config, new_tokens),
            lambda: _jax_decode(graphdef, params, config, batch, new_tokens),
        ),
    }
    for name, (theirs, ours) in makes.items():
        seconds = [best(theirs(), repeats)]
        torch.cuda.empty_cache()
        seconds.append(best(ours(), repeats))
        table.add_row(name, *(f"{s:.3f} s" for s in seconds), f"{seconds[0] / seconds[1]:.2f}")
    Console(width=120).print(table)


def _place(size: str) -> str:
    if size == "small":
        return "cpu"
    if not torch.cuda.is_available():
        sys.exit(f"error: size {size!r} needs an NVIDIA GPU, and PyTorch sees none")
    return "cuda"


def _inputs(
    config: ModelConfig, rows: int, text: int, side: int
) -> tuple[Batch, dict[str, torch.Tensor]]:
    """The same rows for both, each an image of side x side patches before `text` random tokens."""
    rng = np.random.default_rng(0)
    image = [
        config.vision_start_token_id,
        *[config.image_token_id] * (side * side // 4),
        config.vision_end_token_id,
    ]
    ids = np.stack([np.concatenate([image, rng.integers(0, 31000, text)]) for _ in range(rows)])
    arrays = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "pixel_values": (
            rng.normal(size=(rows * side * side, config.vision.patch_dim)).astype(np.float32)
        ),
        "image_grid_thw": np.array([[1, side, side]] * rows),
    }
    batch = Batch.from_hf(arrays | {"labels": np.where(ids < 31000, ids, -100)}, config)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["mm_token_type_ids"] = (tensors["input_ids"] == config.image_token_id).long()
    return batch, tensors


def _leaves(
    config: ModelConfig, stored: dict[str, np.ndarray], shapes: dict
) -> Iterator[jax.Array]:
    """The parameter tree's leaves, in its order, out of Hugging Face's tensors."""
    parts: dict[str, list] = {}
    for name, slot in layout(config).items():
        parts.setdefault(slot.path, []).append((slot.index or 0, stored[name]))
    for path, leaf in shapes.items():
        tensors = [tensor for _, tensor in sorted(parts[path], key=lambda part: part[0])]
        yield jax.numpy.asarray(np.stack(tensors).reshape(leaf.shape))


def _torch_step(model, tensors, config: ModelConfig) -> Callable[[], object]:
    labels = torch.where(tensors["input_ids"] < 31000, tensors["input_ids"], -100)
    place, narrow = tensors["input_ids"].device.type, config.dtype == "bfloat16"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run():
        model.train()
        optimizer.zero_grad()
        with torch.autocast(place, torch.bfloat16, enabled=narrow):
            loss = model(**tensors, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()  # waits

    return run


def _torch_decode(model, tensors, config: ModelConfig, new_tokens: int) -> Callable[[], object]:
    model.zero_grad()
    model = model.to(getattr(torch, config.dtype))

    def run():
        model.eval()
        with torch.no_grad():
            return model.generate(
                **tensors, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            ).tolist()

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


def _jax_decode(graphdef, params, config: ModelConfig, batch, new_tokens: int):
    model = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(config.dtype), params))
    return lambda: jax.block_until_ready(
        generate(model, batch, max_new_tokens=new_tokens, temperature=0.0, stop_tokens=())
    )


if __name__ == "__main__":
    run_as_command(main)
