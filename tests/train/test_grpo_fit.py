"""What a step of GRPO takes of each device, ahead of time, compiled for this machine's simulated
devices."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from pvm_jax.sharding import make_mesh
from tests import tiny
from train.config import Bucket, ExamplesConfig, MeshConfig
from train.fit.grpo import measure_rollout, measure_update
from train.grpo.config import GRPOConfig
from train.grpo.program import GRPOProgram
from train.grpo.rollout import Sampler

GIB = 2**30


@pytest.fixture(scope="module")
def program() -> GRPOProgram:
    """Of four devices, each with whole weights while it generates: four prompts x 2 completions of
    32 tokens, in two parts."""
    options = {
        "prompts_per_step": 4,
        "group_size": 2,
        "accumulation": 2,
        "max_completion_tokens": 32,
    }
    settings = {"remat": "none", "beta": 0.1, "rollout_mesh": MeshConfig(data=-1, fsdp=1)}
    data = ExamplesConfig("not_read", [Bucket(32, 16)])
    return GRPOProgram.of(
        GRPOConfig("not_read", "not_written", data, **options, **settings),
        tiny.golden_config(),
        1,
        make_mesh(1, 4, devices=jax.devices()[:4]),
    )


def held(tree) -> int:
    """Bytes that the first device holds of arrays like these."""
    arrays = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), tree)
    return sum(
        shard.data.nbytes for x in jax.tree.leaves(arrays) for shard in x.addressable_shards[:1]
    )


def test_updates_take_gradients_beside_their_sums_and_the_waiting_moments(program):
    mesh = program.batch_sharding.mesh
    footprint = measure_update(program, Bucket(64, 16), mesh, rows=1, usable=GIB)
    assert footprint.fits
    assert footprint.frozen == held((program.frozen, program.fixed.reference))
    assert footprint.params == held(program.state.params)
    assert footprint.moments == held((program.state.opt_state, program.state.step))
    assert footprint.batch == held(program.abstract_rows(Bucket(64, 16), 4))
    assert (
        footprint.temporaries > footprint.params
    )  # the sums, which are an argument, and the gradients


def test_rollouts_take_whole_weights_and_the_cache_of_the_longest_completions(program):
    mesh, text = program.batch_sharding.mesh, program.model_config.text
    footprint = measure_rollout(program, Bucket(32, 16), mesh, usable=GIB)
    assert footprint.fits
    assert footprint.weights == held(
        (Sampler(program.config, program, mesh).abstract_weights, program.frozen)
    )
    assert footprint.state == held((program.state, program.fixed.reference))
    token = (
        2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2
    )  # keys and values, bfloat16
    assert footprint.sample_cache == 2 * 32 * token  # one prompt a device, two completions
    assert footprint.temporaries >= footprint.sample_cache // 2
    assert "does not fit" in "\n".join(replace(footprint, usable=footprint.total - 1).verdict())
