"""`--dry_run`: everything that a run builds, two steps on its real data, and not a file written."""

from dataclasses import asdict
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from pvm_jax.model.parameters import by_path
from pvm_jax.sharding import make_mesh
from train.config import RunConfig
from train.run.lifecycle import Recipe, announce, purpose
from train.run.trackers import check_installed
from train.step.compile_ahead import device_bytes

STEPS = 2
_LARGEST = 8
_PLAIN_WIDTH = 140


def dry_run(config: RunConfig, recipe: Recipe) -> None:
    """Prints mesh, data, shapes and shardings, and what `STEPS` steps of the recipe took and gave.

    Raises:
        What `train.run.lifecycle.run` would raise while it builds the same.
    """
    announce(f"{purpose(config, recipe)}. A dry run: {STEPS} steps, and nothing is written")
    check_installed(config.log)
    console = Console(quiet=jax.process_index() != 0, highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    mesh = make_mesh(**asdict(config.mesh))
    with jax.set_mesh(mesh):
        work = recipe.prepare(config, mesh)
        program = work.program
        console.print(
            f"mesh: {dict(mesh.shape)} of {jax.device_count()} x {jax.devices()[0].device_kind}",
            markup=False,
        )
        console.print(work.data.report, markup=False)
        for title, tree in (
            ("trained", program.state.params),
            ("optimizer", program.state.opt_state),
            ("frozen", program.frozen),
        ):
            console.print(shardings_table(title, tree))
        recipe.dry_steps(work, console)


def memory_of(compiled: jax.stages.Compiled) -> str:
    """What a program takes of a device, in words."""
    sizes = compiled.memory_analysis()
    assert sizes is not None
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    text = (
        f"a device holds {held / 2**30:.2f} GiB, and {sizes.temp_size_in_bytes / 2**30:.2f} GiB"
        " more within a step"
    )
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return text if limit is None else f"{text}, of {limit / 2**30:.2f} GiB"


def shardings_table(title: str, tree: Any) -> Table:
    """The largest arrays of `tree`: shape, dtype, the mesh axes that split each of their axes, MiB
    a device; and their sum."""
    leaves = sorted(by_path(tree).items(), key=lambda item: -device_bytes(item[1]))
    table = Table(title=title)
    for column in ("array", "shape", "dtype", "split over", "MiB a device"):
        table.add_column(
            column, justify="right" if column.startswith("MiB") else "left", overflow="fold"
        )
    for path, leaf in leaves[:_LARGEST]:
        table.add_row(
            path,
            str(leaf.shape),
            str(leaf.dtype),
            _axes(leaf),
            f"{device_bytes(leaf) / 2**20:,.2f}",
        )
    total = sum(device_bytes(leaf) for _, leaf in leaves)
    table.add_row(f"all {len(leaves)}", "", "", "", f"{total / 2**20:,.2f}")
    return table


def _axes(leaf: Any) -> str:
    """The mesh axes of each axis: `- data+fsdp` for an array whose second axis alone is split."""
    spec = [
        axes if isinstance(axes, tuple) else (axes,) if axes else () for axes in leaf.sharding.spec
    ]
    spec += [()] * (leaf.ndim - len(spec))
    return " ".join("+".join(axes) or "-" for axes in spec)
