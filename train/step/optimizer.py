"""AdamW with clipping and a warmed-up schedule, out of optax."""

from typing import Any

import jax
import optax

from pvm_jax.model.lora import ADAPTER
from pvm_jax.model.parameters import path_name
from train.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: a linear climb from 0, then a cosine to 0 at `steps`, or a
    constant."""
    warmup = round(config.warmup * steps)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup else config.learning_rate, config.learning_rate, warmup, steps
        )
    return optax.warmup_constant_schedule(
        0.0 if warmup else config.learning_rate, config.learning_rate, warmup
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clips to the global norm, then AdamW's direction, to be scaled by the rate; matrices alone
    decay.

    The rate is the step's (`train.step.state.apply_gradients`): counted in this state, it would
    fall behind at a skipped step.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def decays(params: Any) -> Any:
    """True for the leaves that weight decay touches: every weight but those of norms, every
    adapter; no bias, no gate."""

    def decay(path: tuple, _: Any) -> bool:
        *_, module, leaf = path_name(path).split("/")
        return module == ADAPTER or (leaf == "weight" and "norm" not in module)

    return jax.tree.map_with_path(decay, params)
