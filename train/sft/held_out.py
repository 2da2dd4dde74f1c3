"""What a run measures on conversations that it does not train on: loss, the branch's share, sample
answers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.data.messages import Messages
from pvm_jax.data.processor import Processor
from pvm_jax.generation import generate
from pvm_jax.model.layers import l2_norm
from pvm_jax.model.qwen3_vl import Qwen3VL
from pvm_jax.sharding import local_rows, place_rows
from train.data.loading import PlannedExamples, load_training_data
from train.run.log import RunLog
from train.run.samples import Sample, images_of, text_of
from train.sft.config import HeldOutConfig, SFTConfig
from train.step.loss import chunked_cross_entropy
from train.step.program import Program
from train.step.state import Metrics, TrainState


class HeldOut:
    """Held-out conversations, measured in the same shapes and on the same mesh as those that
    train."""

    def __init__(
        self,
        config: SFTConfig,
        held_out: HeldOutConfig,
        processor: Processor,
        model_config: ModelConfig,
        program: Program,
    ):
        """Raises ValueError as `load_training_data` does."""
        self.config = held_out
        self._processor, self._model_config, self._program = processor, model_config, program
        self._rows = config.batch_size // config.accumulation
        self._threads, self._prefetch = config.data.threads, config.data.prefetch
        data = replace(config.data, sources=held_out.sources, hide_images=0.0)
        self._data = load_training_data(
            data,
            processor,
            model_config,
            batch_size=self._rows,
            rows=local_rows(program.batch_sharding, self._rows),
            fill_last=True,
        )
        self._measure = jax.jit(make_measurement(program.graphdef, chunk=config.loss_chunk))
        self._samples = first_conversations(self._data, held_out.samples)

    def write(self, log: RunLog, step: int, state: TrainState, frozen: Any) -> None:
        """Measures what `step` steps made of the parameters: TensorBoard, and a line on the
        console."""
        with log.phase("held_out", step):
            values = self.measure(state, frozen)
            log.scalars(step, values)
            log.print(f"step {step}: held-out loss {values['held_out/loss']:.4f}")
            for number, sample in enumerate(self.samples(self._program.model(state, frozen))):
                log.sample(step, f"sample/{number}", sample.markdown, sample.image)

    def measure(self, state: TrainState, frozen: Any) -> dict[str, float]:
        """Means over the answers' tokens: held_out/loss, and update_share/l of each branch
        (`make_measurement`)."""
        sums: dict[str, float] = {}
        for rows in self._data.iterator(0, self._threads, self._prefetch):
            batch = place_rows(rows, self._program.batch_sharding, self._rows)
            for name, value in jax.device_get(self._measure(state.params, frozen, batch)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        tokens = sums.pop("tokens")
        return {name: value / tokens for name, value in sums.items()}

    def samples(self, model: Qwen3VL) -> list[Sample]:
        """Greedy answers in the place of the first assistant turn of the first conversations."""
        if not self._samples:
            return []
        turns = [_first_answer(messages) for messages in self._samples]
        prompts = [messages[:turn] for messages, turn in zip(self._samples, turns, strict=True)]
        sharding = self._program.batch_sharding
        devices = len(sharding.device_set) // sharding.mesh.shape["tensor"]
        rows = -(-len(prompts) // devices) * devices
        examples = [self._processor.encode(p, add_generation_prompt=True) for p in prompts]
        mine = [examples[row % len(prompts)] for row in local_rows(sharding, rows)]
        batch = place_rows(
            Batch.from_examples(mine, self._model_config, among=examples), sharding, rows
        )
        generation = generate(
            model,
            batch,
            max_new_tokens=self.config.max_new_tokens,
            temperature=0.0,
        )
        tokens, lengths = multihost_utils.process_allgather(
            (generation.tokens, generation.lengths), tiled=True
        )
        answers = [
            self._processor.decode(tokens[row, : lengths[row]]) for row in range(len(prompts))
        ]
        return [
            Sample(text_of(prompt), images_of(prompt), answer, text_of([messages[turn]]))
            for prompt, answer, messages, turn in zip(
                prompts, answers, self._samples, turns, strict=True
            )
        ]


def first_conversations(data: PlannedExamples, count: int) -> list[Messages]:
    """The first `count` of the first source, of those that are measured: what is too long for all
    buckets is not among them."""
    source, measured = data.sources[0], np.unique(data.plan.examples)
    return [source[int(index)] for index in measured[measured < len(source)][:count]]


def make_measurement(graphdef: nnx.GraphDef, *, chunk: int) -> Callable[[Any, Any, Batch], Metrics]:
    """(trained, frozen, batch) -> sums over the answers' tokens: tokens, held_out/loss and, for
    each branch l, update_share/l: the norm of its update over that of the stream that leaves its
    layer."""

    def measure(trained: Any, frozen: Any, batch: Batch) -> Metrics:
        model: Qwen3VL = nnx.merge(graphdef, trained, frozen)
        trace = model.trace(batch)
        loss, tokens = chunked_cross_entropy(
            trace.hidden, model.head_weight(), batch.tokens, batch.loss_weights, chunk=chunk
        )
        shares = {
            f"update_share/{layer}": (
                batch.loss_weights
                * l2_norm(update)
                / jnp.maximum(l2_norm(trace.streams[layer]), 1e-6)
            ).sum()
            for layer, update in trace.updates.items()
        }
        return {"tokens": tokens, "held_out/loss": loss} | shares

    return measure


def _first_answer(messages: Messages) -> int:
    """The place of the first assistant turn; `load_training_data` has seen that there is one."""
    return next(place for place, message in enumerate(messages) if message["role"] == "assistant")
