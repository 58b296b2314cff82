"""Recipes: TRL's keys and ours, read strictly."""

from .keys import DATACLASSES
from .recipe import Recipe

__all__ = ["DATACLASSES", "Recipe"]
