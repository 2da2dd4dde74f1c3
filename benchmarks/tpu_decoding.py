"""A decoding step of generation on TPUs that are not here, by their compiler's own count: an
estimate, nothing runs.

The loop that `generate` runs is compiled whole, its branch included. "floor" is the time in which a
chip reads once what the step reads: weights, caches, memories. What travels between chips is told
in bytes, its time is not counted. Needs libtpu, the compiler (pip install 'jax[tpu]').

    python -m benchmarks.tpu_decoding
    python -m benchmarks.tpu_decoding --sizes 8b --slices '{v5p:2x2x1: 4}' --batches 8
    python -m benchmarks.tpu_decoding --sizes 8b --slices '{v5p:2x2x2: 8}' \\
        --rollout configs/grpo_qwen3_vl_8b.yaml
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from benchmarks.sizes import config_of
from pvm_jax import ModelConfig, abstract_model
from pvm_jax.generation import FIRST_SLOTS, PREFILL_CHUNK, Sampling, decode_loop, prefill
from pvm_jax.model.cache import PromptCache, SampleCache
from pvm_jax.options import parse, run_as_command
from pvm_jax.sharding import batch_sharding, make_mesh, param_shardings
from train.config import Bucket
from train.fit.decoding import PARTS, TokenTime
from train.grpo.config import GRPOConfig
from train.grpo.rollout import rollout_mesh
from train.published import with_config_files
from train.step.compile_ahead import Compiled, compile_ahead, tpu_devices
from train.step.program import abstract_batch, placed

SLICES = {"v6e:2x2": 1, "v5e:2x4": 8}
COLUMNS = ("size", "chips", "rows", *PARTS.values(), "rest", "all, ms", "floor, ms", "ratio")
COLUMNS += ("read, GiB", "once, GiB")


class Rows(NamedTuple):
    """What decodes at a time: samples of prompts of so many columns and visual tokens, and the
    slots of what the samples write."""

    prompts: int
    samples: int
    columns: int
    visual: int
    slots: int


def main(
    sizes: Sequence[str] = ("4b", "8b"),
    slices: Mapping[str, int] = SLICES,
    batches: Sequence[int] = (1, 32),
    visual_tokens: int = 1024,
    text_tokens: int = 256,
    slots: int = FIRST_SLOTS,
    rollout: str | None = None,
) -> None:
    """Prints a line for each size, slice and number of rows, and below it what each copies.

    Args:
        sizes: 2b, 4b, 8b, 32b; or "small" (float32).
        slices: TPU slices, and how many of their chips share the model.
        batches: rows, each a prompt with one sample.
        visual_tokens: of every prompt.
        text_tokens: of every prompt.
        slots: of every row for what it writes, all of which a step reads.
        rollout: a config of train.grpo; its rollout in place of `batches` and what follows, on its
            mesh, with the longest prompts and every completion at its longest.
    """
    table, notes = Table(*COLUMNS), []
    for column in table.columns[2:]:
        column.justify = "right"
    columns = visual_tokens + text_tokens
    for topology, chips in slices.items():
        devices = tpu_devices(topology)
        if not 1 <= chips <= len(devices):
            raise ValueError(f"slices: {topology} has 1 to {len(devices)} chips, not {chips}")
        if rollout is None:
            mesh = make_mesh(1, 1, chips, devices=devices[:chips])
            cases = [Rows(batch, 1, columns, visual_tokens, slots) for batch in batches]
        else:
            mesh, rows = published(rollout, devices[:chips])
            cases = [rows]
        for size, rows in product(sizes, cases):
            name = size, f"{chips} x {topology.split(':')[0]}", f"{rows.prompts} x {rows.samples}"
            compiled = compile_step(config_of(size), mesh, rows)
            if compiled.text is None:
                notes.append(f"{', '.join(name)}: does not fit: {compiled.refusal}")
                continue
            token = TokenTime.of(compiled.text, devices[0].device_kind)
            table.add_row(*name, *cells(token))
            notes += [f"{', '.join(name)}: {note}" for note in below(token, compiled.temporaries)]
    console = Console(width=160, soft_wrap=True)
    console.print(table)
    console.print(*notes, sep="\n")
    console.print("milliseconds are the compiler's estimate: nothing ran")


def published(file: str, devices: Sequence[Any]) -> tuple[Mesh, Rows]:
    """The mesh of a GRPO config's rollout, and a part of its rows."""
    argv = with_config_files(["--config", file])
    config, _ = parse(GRPOConfig, argv, prog="benchmarks.tpu_decoding", description="", examples="")
    bucket = max(config.data.buckets, key=lambda bucket: bucket.tokens)
    prompts, visual = config.prompts_per_step // config.rollout_parts, bucket.patches // 4
    slots = config.max_completion_tokens
    mesh = make_mesh(**asdict(config.mesh), devices=devices)
    rows = Rows(prompts, config.group_size, bucket.tokens, visual, slots)
    return rollout_mesh(config.rollout_mesh, mesh), rows


def compile_step(config: ModelConfig, mesh: Mesh, rows: Rows) -> Compiled:
    """The loop that `generate` runs, between two growths of its cache."""
    graphdef, params = nnx.split(abstract_model(config))
    weights = placed(nnx.as_pure(params), param_shardings(params, mesh))
    by_row, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    patches = rows.visual * config.vision.merge_factor
    batch = abstract_batch(
        config, Bucket(rows.columns, patches), rows.prompts, by_row, videos=False
    )
    sampling = Sampling(1.0, None, None, config.stop_tokens)
    settings = {"sampling": sampling, "max_new_tokens": rows.slots, "slots": rows.slots}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (rows.prompts, rows.samples)))
    cache, state = jax.eval_shape(
        partial(prefill, graphdef, past=None, chunk=PREFILL_CHUNK, **settings), weights, batch, keys
    )

    def lie(tree: Any) -> Any:
        """As `prefill` leaves them."""
        return jax.tree.map(lambda x: by_row if x.ndim else everywhere, tree)

    def empty() -> tuple[PromptCache, SampleCache]:
        return (
            PromptCache.empty(config, rows.prompts, rows.columns),
            SampleCache.empty(config, rows.prompts, rows.samples, rows.slots),
        )

    with jax.set_mesh(mesh):
        prompts, samples = jax.jit(empty).lower().compile().output_shardings
    prompts = prompts._replace(segment_ids=by_row)
    cache = placed(cache, lie(cache)._replace(prompts=prompts))
    state = placed(state, lie(state)._replace(samples=samples))
    until = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return compile_ahead(
        decode_loop, graphdef, weights, cache, state, until, mesh=mesh, sampling=sampling
    )


def cells(token: TokenTime) -> Iterator[str]:
    """Of a line, behind its name."""
    cycles = Counter[str]()
    for (part, _), row in token.time.rows.items():
        cycles[part] += row.cycles
    for part in (*PARTS.values(), "rest"):
        yield f"{1e3 * cycles[part] / token.time.chip.clock:.2f}"
    yield from (f"{1e3 * seconds:.2f}" for seconds in (token.seconds, token.floor))
    yield f"{token.seconds / token.floor:.2f}"
    yield from (f"{size / 2**30:.2f}" for size in (token.read, token.once))


def below(token: TokenTime, temporaries: int) -> Iterator[str]:
    """What is said below the table of one of its lines: copies of weights, caches and memories."""
    for copies, when in ((token.copies, "a step"), (token.copies_before, "before the first step")):
        listed = (f"{name} {mib(size)}" for name, size in copies.most_common())
        yield f"copies {when}: {', '.join(listed) or 'none'}"
    links = (f"{one.count} x {kind}, {mib(one.bytes)}" for kind, one in token.time.traffic.items())
    yield f"links: {'; '.join(links) or 'nothing'}; temporaries: {mib(temporaries)}"
    silent = (f"{count} x {name}" for name, count in token.time.silent.most_common())
    yield f"not counted: {', '.join(silent) or 'nothing'}"


def mib(size: float) -> str:
    """Bytes in MiB, to print."""
    return f"{size / 2**20:,.2f} MiB"


if __name__ == "__main__":
    run_as_command(main)
