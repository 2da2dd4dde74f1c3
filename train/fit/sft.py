"""What a step of supervised fine-tuning takes of each device."""

from jax.sharding import Mesh
from rich.console import Console

from pvm_jax.config import ModelConfig
from train.config import Bucket
from train.fit.footprint import Footprint, largest
from train.sft.config import SFTConfig
from train.sft.program import SFTProgram
from train.step.compile_ahead import compile_ahead, device_bytes
from train.step.flops import Work
from train.step.program import rows_per_shard, step_costs


def check(
    config: SFTConfig, model_config: ModelConfig, mesh: Mesh, *, usable: int, console: Console
) -> bool:
    """Prints what the step takes, in rows of every bucket that no other covers. Whether all of it
    fits.

    Raises:
        ValueError: as `measure`.
    """
    fits = True
    for bucket in largest(config.data.buckets):
        rows = rows_per_shard(config.batch_size, config.accumulation, mesh)
        console.print(
            f"rows of {bucket.tokens:,} tokens and {bucket.patches:,} patches, {config.batch_size}"
            f" a step, {rows} a chip at a time: compiling, which takes minutes ..."
        )
        footprint = measure(config, model_config, bucket, mesh, usable=usable)
        console.print(footprint.table(), *footprint.verdict(), *footprint.time(), sep="\n")
        fits &= footprint.fits
    return fits


def measure(
    config: SFTConfig, model_config: ModelConfig, bucket: Bucket, mesh: Mesh, *, usable: int
) -> Footprint:
    """Compiles the step that `train.sft` would run on `mesh`, in rows of `bucket`; `usable`: bytes
    of each device.

    Raises:
        ValueError: if the batch does not divide over the mesh, or nothing would train.
    """
    rows = rows_per_shard(config.batch_size, config.accumulation, mesh)
    program = SFTProgram.of(config, model_config, 1, mesh)
    batch = program.abstract_batch(bucket, config.batch_size)
    compiled = compile_ahead(program.step, program.state, program.frozen, batch, mesh=mesh)
    work = Work.full(
        config.batch_size, bucket.tokens, bucket.patches, model_config.vision.merge_factor
    )
    inputs = {
        "frozen": program.frozen,
        "params": program.state.params,
        "moments": (program.state.opt_state, program.state.step),
        "batch": batch,
    }
    sizes = {name: device_bytes(tree) for name, tree in inputs.items()}
    return Footprint(
        config=config,
        bucket=bucket,
        mesh=mesh,
        rows=rows,
        **sizes,
        temporaries=compiled.total - sum(sizes.values()),
        usable=usable,
        refusal=compiled.refusal,
        seconds=compiled.seconds,
        flops=work.flops(step_costs(config, program.model_config)),
        program=compiled.text,
    )
