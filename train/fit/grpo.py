"""What a step of GRPO takes of each device: updates in the longest rows, a rollout with every
completion at its longest."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from pvm_jax.config import ModelConfig
from pvm_jax.generation import (
    FIRST_SLOTS,
    PREFILL_CHUNK,
    Sampling,
    decode_loop,
    prefill,
)  # what `generate` runs, not run here
from pvm_jax.model.qwen3_vl import abstract_model
from train.config import Bucket
from train.fit.footprint import Footprint, gib, largest, table_of
from train.grpo.config import GRPOConfig
from train.grpo.program import GRPOProgram
from train.grpo.rollout import Sampler, check_prompts
from train.step.compile_ahead import compile_ahead, device_bytes
from train.step.flops import Work
from train.step.program import placed, rows_per_shard, step_costs


@dataclass(frozen=True)
class RolloutFootprint:
    """What a rollout takes of each device, in bytes: the most that lives at once.

    Attributes:
        prompts: that a device answers at a time.
        state: trained parameters in float32 and the optimizer's moments, which wait.
        weights: what generates, in the compute dtype, and the frozen parameters where they lie
            while they train.
        prompt_cache: keys and values of the prompts, and the branches' memories.
        sample_cache: keys and values of completions of the longest length, with the slots still
            empty.
        temporaries: what lives within the reading of the prompts, a decoding step, the last growth
            of the cache (half of it, beside the whole) or, before there is a cache, the move of the
            weights onto the rollout's mesh, whichever is most.
    """

    config: GRPOConfig
    bucket: Bucket
    prompts: int
    state: int
    weights: int
    prompt_cache: int
    sample_cache: int
    temporaries: int
    usable: int
    refusal: str | None
    seconds: float

    @property
    def total(self) -> int:
        return self.state + self.weights + self.prompt_cache + self.sample_cache + self.temporaries

    @property
    def fits(self) -> bool:
        return self.refusal is None and self.total <= self.usable

    def table(self) -> Table:
        """Bytes of a device by part."""
        parts = {
            "trained parameters in float32 and optimizer state, waiting": self.state,
            f"weights that generate, {self.config.dtype}, and frozen ones that wait": self.weights,
            "cache of the prompts, memories of their images": self.prompt_cache,
            f"cache of the completions, {self.config.max_completion_tokens:,} tokens each": (
                self.sample_cache
            ),
            "temporaries: the most of any moment": self.temporaries,
        }
        return table_of(parts, self.total)

    def verdict(self) -> list[str]:
        """Lines below the table: whether it fits and, if not, what to change."""
        lines, left = [f"compiled in {self.seconds:.0f} s"], self.usable - self.total
        if self.fits:
            return [*lines, f"fits: {gib(left)} of {gib(self.usable)} are left"]
        over = (
            f"{gib(-left)} more than the usable {gib(self.usable)}"
            if left < 0
            else f"the compiler refuses: {self.refusal}"
        )
        advice = []
        if self.prompts > 1:
            parts = self.config.rollout_parts * 2
            advice.append(
                f"rollout_parts: {parts} (about {gib((self.prompt_cache + self.sample_cache) // 2)}"
                " less)"
            )
        if self.config.rollout_mesh is not None:
            advice.append(
                "rollout_mesh with tensor 2, or without rollout_mesh: the weights in more parts,"
                " slower"
            )
        advice.append(
            f"max_completion_tokens: {self.config.max_completion_tokens // 2} (about"
            f" {gib(self.sample_cache // 2)} less)"
        )
        return [
            *lines,
            f"does not fit: {over}. What would help:",
            *(f"  - {change}" for change in advice),
        ]


def check(
    config: GRPOConfig, model_config: ModelConfig, mesh: Mesh, *, usable: int, console: Console
) -> bool:
    """Prints what updates and rollouts take, in rows of every bucket that no other covers. Whether
    all of it fits.

    Raises:
        ValueError: if prompts or rows do not divide over their meshes, or nothing would train.
    """
    fits = True
    program = GRPOProgram.of(config, model_config, config.num_iterations, mesh)
    for bucket in largest(config.data.buckets):
        rows = rows_per_shard(
            config.rows, config.accumulation, mesh, name="prompts_per_step x group_size"
        )
        longest = Bucket(bucket.tokens + config.max_completion_tokens, bucket.patches)
        console.print(
            f"updates: rows of {longest.tokens:,} tokens and {bucket.patches:,} patches,"
            f" {config.rows} a step, {rows} a chip at a time: compiling, which takes minutes ..."
        )
        update = measure_update(program, longest, mesh, rows=rows, usable=usable)
        console.print(update.table(), *update.verdict(), *update.time(), sep="\n")
        console.print(
            f"rollout: {config.prompts_per_step} prompts of {bucket.tokens:,} tokens and"
            f" {bucket.patches:,} patches x {config.group_size} completions of"
            f" {config.max_completion_tokens:,} tokens: compiling ..."
        )
        rollout = measure_rollout(program, bucket, mesh, usable=usable)
        console.print(rollout.table(), *rollout.verdict(), sep="\n")
        fits &= update.fits and rollout.fits
    return fits


def measure_update(
    program: GRPOProgram, bucket: Bucket, mesh: Mesh, *, rows: int, usable: int
) -> Footprint:
    """Compiles the gradients of a part of the batch in rows of `bucket`, beside the optimizer's
    state, which waits; `rows`: that a device computes at the same time."""
    config = program.config
    at_once = config.rows // config.accumulation
    batch, totals, fixed = (
        program.abstract_rows(bucket, at_once),
        program.abstract_totals,
        program.fixed,
    )
    compiled = compile_ahead(
        program.accumulate, totals, program.state.params, fixed, batch, mesh=mesh
    )
    inputs = {"frozen": fixed, "params": program.state.params, "batch": batch}
    sizes = {name: device_bytes(tree) for name, tree in inputs.items()}
    work = Work.full(
        config.rows, bucket.tokens, bucket.patches, program.model_config.vision.merge_factor
    )
    return Footprint(
        config=config,
        bucket=bucket,
        mesh=mesh,
        rows=rows,
        **sizes,
        moments=device_bytes((program.state.opt_state, program.state.step)),
        temporaries=compiled.total - sum(sizes.values()),
        usable=usable,
        refusal=compiled.refusal,
        seconds=compiled.seconds,
        flops=config.num_iterations * work.flops(step_costs(config, program.model_config)),
        program=compiled.text,
        runs=config.num_iterations * config.accumulation,
    )


def measure_rollout(
    program: GRPOProgram, bucket: Bucket, mesh: Mesh, *, usable: int
) -> RolloutFootprint:
    """Compiles the reading of the prompts and the decoding loop with its largest cache.

    Raises:
        ValueError: if the prompts do not divide over the rollout's mesh.
    """
    config = program.config
    sampler = Sampler(config, program, mesh)
    place, everywhere = sampler.mesh, NamedSharding(sampler.mesh, PartitionSpec())
    weights, batch = sampler.abstract_weights, sampler.abstract_batch(bucket)
    keys = jax.eval_shape(
        lambda: jax.random.split(jax.random.key(0), (len(batch.tokens), config.group_size))
    )
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=everywhere)
    longest = config.max_completion_tokens
    sampling = Sampling(config.temperature, None, config.top_p if config.top_p < 1 else None, (0,))
    graphdef = nnx.graphdef(abstract_model(program.model_config))
    static = {"sampling": sampling, "max_new_tokens": longest, "chunk": PREFILL_CHUNK}
    arguments = (graphdef, weights, batch, keys, None)
    first = min(FIRST_SLOTS, longest)
    read = compile_ahead(prefill, *arguments, mesh=place, slots=first, **static)
    compiled, caches = [read], (0, 0)
    if read.refusal is None:
        shapes = jax.eval_shape(
            partial(prefill, graphdef, past=None, slots=longest, **static), weights, batch, keys
        )
        cache, state = placed(shapes, read.results)
        until = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        compiled.append(
            compile_ahead(
                decode_loop, graphdef, weights, cache, state, until, mesh=place, sampling=sampling
            )
        )
        caches = device_bytes(cache), device_bytes(state.samples)
    # While the cache grows for the last time, the half that was full lies beside the whole.
    here = device_bytes(weights)
    within = [*(one.total - here for one in compiled), sum(caches) + caches[1] // 2]
    if moved := config.rollout_mesh is not None:
        trained = program.state.params, program.frozen
        compiled.append(compile_ahead(sampler.move, *trained, mesh=mesh))
        within.append(compiled[-1].total - here - device_bytes(trained))
    return RolloutFootprint(
        config=config,
        bucket=bucket,
        prompts=check_prompts(config, place),
        state=device_bytes((program.state, program.fixed.reference)),
        weights=here + (device_bytes(program.frozen) if moved else 0),
        prompt_cache=caches[0],
        sample_cache=caches[1],
        temporaries=max(within) - sum(caches),
        usable=usable,
        refusal=next((one.refusal for one in compiled if one.refusal), None),
        seconds=sum(one.seconds for one in compiled),
    )
