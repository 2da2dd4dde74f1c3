"""What attention's kernels take on a TPU that is not here, by libtpu's own schedule of them: an
estimate, nothing runs.

The compiler gives a kernel no estimate of its own, but it writes down the bundles of instructions
that it made; a chip starts one a cycle, if it need not wait. Of each kernel they are counted for a
block of queries and keys, for a step of its loop whatever it computes, and for what it does once a
line of blocks. A block takes its bundles or what its products take at the chip's peak, whichever is
more. Needs libtpu (pip install 'jax[tpu]').

    python -m benchmarks.tpu_attention
    python -m benchmarks.tpu_attention --topology v5e:2x2 --blocks '[512, 1024]'
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from benchmarks.attention_blocks import mixed_rows
from pvm_jax.model import splash
from pvm_jax.model.attention_kernels import attention
from pvm_jax.model.blocks import LANES, meeting_blocks, pad_to_multiple
from pvm_jax.options import run_as_command
from pvm_jax.sharding import make_mesh
from train.fit.cycles import CHIPS, PRODUCTS
from train.fit.hlo import unreadable
from train.step.compile_ahead import tpu_devices
from train.step.flops import peak_flops

Rows = dict[str, dict[str, Sequence[np.ndarray]]]
"""The segment ids [1, S] of some rows, by the rows' and attention's name."""
TRAINED = {"fwd": 2, "dq": 1, "dkv": 1}
"""How often a layer of the decoder runs each kernel in a training step, recomputed as a whole."""
HEADS = {"decoder": (32, 8), "tower": (16, 16)}
"""Of queries and of keys, 8B's; all are 128 wide, the tower's by zeros."""
COLUMNS = ("attention", "kernel", "block", "cycles a block", "products at peak", "a step", "a line")
MOVES = 8
"""Bundles that load or store vectors in what is skipped between two copies, at most."""


class KernelCost(NamedTuple):
    """Cycles of one kernel.

    Attributes:
        block: of a block of queries and keys that is computed.
        step: of the loop's step of each block, computed or not, at most.
        line: of each block of queries (of keys, in dkv) beside its steps.
        products: of a block's products at the chip's peak.
    """

    block: int
    step: int
    line: int
    products: float = 0

    def of(self, meet: np.ndarray, *, of_keys: bool) -> float:
        """Of a head; `meet`: [B, S / block, T / block], which blocks are computed."""
        lines = meet.shape[0] * meet.shape[2 if of_keys else 1]
        blocks = int(meet.sum()) * max(self.block, self.products)
        return blocks + meet.size * self.step + lines * self.line


def main(
    topology: str = "v6e:2x2",
    blocks: Sequence[int] = (256, 512, 1024, 2048),
    tokens: int = 8192,
    patches: int = 16384,
    count: int = 200,
) -> None:
    """Prints what attention's kernels take of a TPU by libtpu's schedule of them, nothing runs: a
    table of the kernels (forward, gradient of q, of k and v), and one of 8B's attention of rows.

    Args:
        topology: a TPU slice; of one of its chips.
        blocks: sizes of blocks, to be compared: powers of two from 128 on.
        tokens: of a row, a multiple of the sizes.
        patches: of a row, a multiple of the sizes.
        count: conversations that are packed into such rows.

    Raises:
        ValueError: for other sizes.
    """
    for block in blocks:
        if block < LANES or block & (block - 1) or tokens % block or patches % block:
            raise ValueError(
                f"blocks: {block} is no power of two from {LANES} on that divides --tokens {tokens}"
                f" and --patches {patches}"
            )
    lengths = {"decoder": tokens, "tower": patches}
    rows: Rows = {"one example": {kind: [np.ones((1, n), int)] for kind, n in lengths.items()}}
    for name, batches in mixed_rows(count, tokens, patches).items():
        ids = [(batch.segment_ids, batch.patch_segment_ids) for batch in batches]
        rows[name] = dict(zip(lengths, zip(*ids, strict=True), strict=True))
    kernels, layers = Table(*COLUMNS), Table("rows", "attention", *(f"{n}: ms" for n in blocks))
    for column in (*kernels.columns[2:], *layers.columns[2:]):
        column.justify = "right"
    with TemporaryDirectory() as written:
        # Read once, when libtpu is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={written}"
            " --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
        )
        chip = tpu_devices(topology)[0]
        for kind, length in lengths.items():
            costs = {n: compile_kernels(chip, kind, n, length, Path(written)) for n in blocks}
            for block, of_kernels in costs.items():
                for name, one in of_kernels.items():
                    numbers = block, one.block, one.products, one.step, one.line
                    kernels.add_row(kind, name, *(f"{number:,.0f}" for number in numbers))
            for name, ids in rows.items():
                taken = (layer(costs[n], ids[kind], kind, n, chip.device_kind) for n in blocks)
                layers.add_row(name, kind, *taken)
    console = Console(width=120)
    console.print(kernels, layers)
    console.print(
        f"{chip.device_kind}, by libtpu's schedule: nothing ran. ms: of a row and a layer of 8B,"
        " the decoder's forward, recomputed and backward, the tower's forward; -: such blocks do"
        " not fit its fast memory",
        soft_wrap=True,
    )


def compile_kernels(
    chip: Any, kind: str, block: int, length: int, written: Path
) -> dict[str, KernelCost]:
    """Of each kernel, in blocks of that size, none if they do not fit; `written`: where libtpu
    leaves its schedules."""
    for stale in written.iterdir():
        stale.unlink()
    splash.BLOCK = splash.LEAST = block
    mesh = make_mesh(1, 1, 1, devices=[chip])
    everywhere = NamedSharding(mesh, PartitionSpec())

    def array(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, length, *sizes), dtype, sharding=everywhere)

    def trained(q, k, v, ids, gradient):
        masks = {"q_segment_ids": ids, "kv_segment_ids": ids, "causal": kind == "decoder"}
        out, pull = jax.vjp(partial(attention, **masks), q, k, v)
        return out, pull(gradient)

    q, k = (array(jnp.bfloat16, heads, LANES) for heads in HEADS[kind])
    with jax.set_mesh(mesh):
        lowered = jax.jit(trained).lower(q, k, k, array(jnp.int32), q)
    try:
        lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "memory space vmem" not in str(error):
            raise
        return {}
    costs = {}
    for file in written.iterdir():
        name = re.search(r"-splash_mha_([a-z]+)_[^-]*-\d+-final_bundles\.txt$", file.name)
        if name:
            flops = 2 * PRODUCTS[f"splash_mha_{name[1]}"] * block * block * LANES
            products = flops / (peak_flops(chip.device_kind) or 0) * CHIPS[chip.device_kind].clock
            costs[name[1]] = cost(file.read_text())._replace(products=products)
    if costs.keys() != TRAINED.keys():
        raise unreadable(f"libtpu wrote the kernels {', '.join(costs) or '(none)'}")
    return dict(sorted(costs.items(), reverse=True))


def cost(schedule: str) -> KernelCost:
    """Of a kernel's bundles as libtpu writes them: numbered, one a line, in regions over which a
    branch may jump.

    Raises:
        ValueError: if they are not understood.
    """
    number, head, starts = 0, None, {}
    jumps, moves, products = [], [], []
    for line in schedule.splitlines():
        if bundle := re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w)?\s*:", line):
            number = int(bundle[1], 16)
            head = number if bundle[2] == "LB" and head is None else head
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", line):
            starts.setdefault(region, number)
        jumps += [(number, to) for to in re.findall(r"sbr\.rel \(.*?\$region(\d+)", line)]
        moves += [number] if re.search(r"\bv(ld|st)\b", line) else []
        products += [number] if "vmatmul" in line else []
    if head is None or not jumps or not products:
        raise unreadable("a kernel's schedule has no loop, or no matrix product")
    skipped = [(at, starts[to]) for at, to in jumps if starts.get(to, 0) > at > head]
    busy = [one for one in skipped if sum(one[0] < at < one[1] for at in moves) > MOVES]
    counted = {"block": 0, "line": 0}
    for first, last in busy:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in busy):
            continue  # around another
        part = "block" if any(first < at < last for at in products) else "line"
        counted[part] += last - first
    return KernelCost(step=max(jumps)[0] - head - sum(counted.values()), **counted)


def layer(
    costs: Mapping[str, KernelCost],
    rows: Iterable[np.ndarray],
    kind: str,
    block: int,
    device_kind: str,
) -> str:
    """Milliseconds that a layer's attention of one row takes on average; `rows`: their segment
    ids, [1, S]."""
    if not costs:
        return "-"
    runs = TRAINED if kind == "decoder" else {"fwd": 1}
    bundles = []
    for row in rows:
        ids = pad_to_multiple(jnp.asarray(row), 1, block)
        last = jnp.arange(ids.shape[1])[None] if kind == "decoder" else None
        meet = np.asarray(meeting_blocks(ids, ids, last, block))
        bundles.append(
            sum(n * costs[name].of(meet, of_keys=name == "dkv") for name, n in runs.items())
        )
    return f"{1e3 * HEADS[kind][0] * np.mean(bundles) / CHIPS[device_kind].clock:.2f}"


if __name__ == "__main__":
    run_as_command(main)
