"""The schedule, and what weight decay touches."""

import jax.numpy as jnp
import numpy as np
import pytest

from train.config import OptimizerConfig
from train.step.optimizer import decays, make_optimizer, make_schedule


def test_cosine_climbs_then_falls_to_zero():
    schedule = make_schedule(OptimizerConfig(learning_rate=1e-4, warmup=0.1), 100)
    rates = [float(schedule(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(rates, [0, 5e-5, 1e-4, 5e-5, 0], atol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_without_warmup_the_first_rate_is_the_peak(schedule):
    config = OptimizerConfig(learning_rate=1e-3, schedule=schedule, warmup=0)
    assert float(make_schedule(config, 20)(0)) == pytest.approx(1e-3)


def test_constant_stays():
    schedule = make_schedule(
        OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0.5), 10
    )
    np.testing.assert_allclose(
        [float(schedule(step)) for step in (0, 5, 9)], [0, 1e-3, 1e-3], atol=1e-12
    )


def test_matrices_alone_decay():
    params = {
        "pvm": {
            "8": {
                "gate_alpha": 1.0,
                "gate_token": 1.0,
                "input_norm": {"weight": 1.0},
                "cross_attn": {"q_norm": {"weight": 1.0}},
            }
        },
        "visual": {"proj": {"weight": 1.0, "bias": 1.0}, "norm1": {"weight": 1.0, "bias": 1.0}},
        "language_model": {
            "layers": {
                "post_attention_layernorm": {"weight": 1.0},
                "mlp": {"up_proj": {"weight": 1.0}},
            }
        },
        "lora": {"q_proj": {"lora": {"a": 1.0, "b": 1.0}}},
    }
    assert decays(params) == {
        "pvm": {
            "8": {
                "gate_alpha": False,
                "gate_token": False,
                "input_norm": {"weight": False},
                "cross_attn": {"q_norm": {"weight": False}},
            }
        },
        "visual": {
            "proj": {"weight": True, "bias": False},
            "norm1": {"weight": False, "bias": False},
        },
        "language_model": {
            "layers": {
                "post_attention_layernorm": {"weight": False},
                "mlp": {"up_proj": {"weight": True}},
            }
        },
        "lora": {"q_proj": {"lora": {"a": True, "b": True}}},
    }
    params = {"proj": {"weight": jnp.ones(3), "bias": jnp.ones(3)}}
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5))
    updates, _ = optimizer.update(
        {"proj": {"weight": jnp.zeros(3), "bias": jnp.zeros(3)}}, optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["proj"]["weight"], 0.5)
    np.testing.assert_allclose(updates["proj"]["bias"], 0)
