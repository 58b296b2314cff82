"""Supervised fine-tuning with objectives f(p) of the target token's probability, on TRL (arXiv 2510.00526).

Names are imported on first use: `import bl_trainer` loads neither torch nor TRL, `Objective` loads torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diagnosis.api import diagnose
    from .errors import BLError, CheckpointError, LossError, MeasurementError, RecipeError
    from .objectives import Objective, Threshold
    from .recipe import Recipe
    from .training import BLConfig, BLTrainer

__version__ = "0.1.0"

__all__ = [
    "BLConfig",
    "BLError",
    "BLTrainer",
    "CheckpointError",
    "LossError",
    "MeasurementError",
    "Objective",
    "Recipe",
    "RecipeError",
    "Threshold",
    "__version__",
    "diagnose",
]

_ROOMS = {
    "BLConfig": "training",
    "BLTrainer": "training",
    "Objective": "objectives",
    "Recipe": "recipe",
    "Threshold": "objectives",
    "diagnose": "diagnosis.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_ROOMS.get(name, 'errors')}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
