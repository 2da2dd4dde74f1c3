"""The compiled part of supervised fine-tuning: the step."""

from dataclasses import dataclass
from functools import cached_property

import jax

from train.sft.config import SFTConfig
from train.step.compiler import compiler_options
from train.step.program import Program
from train.step.state import Step, make_loss, make_step


@dataclass(frozen=True)
class SFTProgram(Program):
    """The program of supervised fine-tuning."""

    config: SFTConfig

    @cached_property
    def step(self) -> Step:
        """Jitted, donates its state; metrics count its FLOPs where `costs` are known."""
        config = self.config
        loss = make_loss(self.graphdef, chunk=config.loss_chunk)
        step = make_step(
            loss, self.optimizer, self.schedule, accumulation=config.accumulation, costs=self.costs
        )
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(self.state_shardings, None),
            compiler_options=compiler_options(self.batch_sharding.mesh),
        )
