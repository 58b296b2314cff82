"""Recipes: TRL's keys and ours, read strictly.

What reads a file alone loads neither torch nor TRL, so that its mistakes are told at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .parser import DATACLASSES
    from .recipe import Recipe

__all__ = ["DATACLASSES", "Recipe"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module({"DATACLASSES": ".parser"}.get(name, ".recipe"), __name__), name)
