"""`BLTrainer` and `BLConfig`."""

from .config import BLConfig
from .trainer import BLTrainer

__all__ = ["BLConfig", "BLTrainer"]
