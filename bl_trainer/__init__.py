"""Supervised fine-tuning with objectives f(p) of the target token's probability, on TRL (arXiv 2510.00526)."""

from .objectives import Objective, Threshold
from .trainer import BLConfig, BLTrainer

__all__ = ["BLConfig", "BLTrainer", "Objective", "Threshold"]
