"""Supervised fine-tuning with objectives f(p) of the target token's probability, on TRL (arXiv 2510.00526)."""

from .objectives.objective import Objective
from .objectives.threshold import Threshold
from .training.config import BLConfig
from .training.trainer import BLTrainer

__all__ = ["BLConfig", "BLTrainer", "Objective", "Threshold"]
