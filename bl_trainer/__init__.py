"""Supervised fine-tuning with objectives f(p) of the target token's probability, on TRL (arXiv 2510.00526).

Names are imported on first use: `import bl_trainer` loads neither torch nor TRL. Objectives, thresholds and losses load torch
alone, and work beside any version of anything else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diagnosis.api import diagnose
    from .errors import BLError, CheckpointError, DependencyError, LossError, MeasurementError, RecipeError
    from .evaluation.api import evaluate
    from .losses import LossMetrics, as_loss, fused_objective, per_token
    from .objectives import Objective, Threshold
    from .recipe import Recipe
    from .training import BLConfig, BLTrainer

__version__ = "0.1.0"

__all__ = [
    "BLConfig",
    "BLError",
    "BLTrainer",
    "CheckpointError",
    "DependencyError",
    "LossError",
    "LossMetrics",
    "MeasurementError",
    "Objective",
    "Recipe",
    "RecipeError",
    "Threshold",
    "__version__",
    "as_loss",
    "diagnose",
    "evaluate",
    "fused_objective",
    "per_token",
]

_ROOMS = {
    "BLConfig": "training",
    "BLTrainer": "training",
    "LossMetrics": "losses",
    "Objective": "objectives",
    "Recipe": "recipe",
    "Threshold": "objectives",
    "as_loss": "losses",
    "diagnose": "diagnosis.api",
    "evaluate": "evaluation.api",
    "fused_objective": "losses",
    "per_token": "losses",
}

_ALONE = ("errors", "losses", "objectives")  # that need torch at most


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = _ROOMS.get(name, "errors")
    if room in _ALONE:
        found = getattr(import_module(f".{room}", __name__), name)
    else:
        from ._util.requirements import needs_stack

        with needs_stack(name):
            found = getattr(import_module(f".{room}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
