"""What the compiler is told beside a step's program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pvm_jax.sharding import make_mesh
from tests.train.test_fit import needs_libtpu
from train.fit.cycles import StepTime
from train.step import compiler
from train.step.compile_ahead import tpu_devices
from train.step.compiler import FAST_MEMORY, compiler_options


@pytest.fixture
def limited(monkeypatch):
    """A mesh whose chips have a limit, of which their compiler knows nothing."""
    compiler_options.cache_clear()
    mesh = make_mesh()
    monkeypatch.setattr(compiler, "LIMITS", {mesh.devices.flat[0].device_kind: 1})
    yield mesh
    compiler_options.cache_clear()


def test_other_chips_are_told_nothing():
    assert compiler_options(make_mesh()) is None


def test_a_compiler_that_does_not_know_the_option_compiles_without_it(limited):
    with pytest.warns(UserWarning, match=f"this libtpu has no option {FAST_MEMORY}: steps may"):
        assert compiler_options(limited) is None


def test_the_users_own_limit_goes_before(limited, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{FAST_MEMORY}=65536")
    assert compiler_options(limited) is None


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_ffn_takes_a_sixth_less_by_the_compilers_count(topology):
    mesh = make_mesh(devices=tpu_devices(topology))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def ffn(x, gate, up, down):
        inner = jax.nn.silu(x @ gate.T) * (x @ up.T)
        return x + jax.lax.optimization_barrier(inner) @ down.T

    shapes = ((8192, 4096), (12288, 4096), (12288, 4096), (4096, 12288))
    arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=everywhere) for x in shapes]

    def cycles(options):
        program = jax.jit(ffn, out_shardings=everywhere, compiler_options=options)
        text = program.lower(*arrays).compile().as_text()
        return StepTime.of(text, mesh.devices.flat[0].device_kind).total.cycles

    assert cycles(compiler_options(mesh)) < 5 / 6 * cycles(None)
