"""GRPO on images, from Python: `run(GRPOConfig(...))` trains and says what came of it."""

from train.grpo.config import GRPOConfig
from train.grpo.loop import run

__all__ = ["GRPOConfig", "run"]
