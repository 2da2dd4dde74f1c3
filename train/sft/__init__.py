"""Supervised fine-tuning, from Python: `run(SFTConfig(...))` trains and says what came of it."""

from train.sft.config import SFTConfig
from train.sft.loop import run

__all__ = ["SFTConfig", "run"]
