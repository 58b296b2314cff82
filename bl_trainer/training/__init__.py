"""`BLTrainer` and `BLConfig`."""

from .._util.requirements import needs_stack

with needs_stack("bl_trainer.training"):
    from .config import BLConfig
    from .trainer import BLTrainer

__all__ = ["BLConfig", "BLTrainer"]
