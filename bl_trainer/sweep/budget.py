"""Short runs: a recipe cut to a part of its length, and its learning-rate schedule with it."""

import math
from typing import Any

from .._util.text import from_json
from ..errors import RecipeError
from ..training.config import BLConfig

KINDS = ("share", "steps", "tokens")

Recipe = dict[str, Any]  # the keys of one


def check_budget(budget: Any) -> None:
    """Raise RecipeError unless a budget is one of `{share: 0.25}`, `{steps: 200}` and `{tokens: 1000000}`."""
    if not isinstance(budget, dict) or len(budget) != 1 or not budget.keys() <= {*KINDS}:
        raise RecipeError(f"`budget: {budget}` must have one of {', '.join(KINDS)}. Write e.g. `budget: {{share: 0.25}}`.")
    ((kind, amount),) = budget.items()
    is_number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
    if kind == "share" and not (is_number and 0 < amount <= 1):
        raise RecipeError(f"`budget: {budget}`: the share must be above 0 and at most 1. Write e.g. `budget: {{share: 0.25}}`.")
    if kind != "share" and not (is_number and amount == int(amount) and amount > 0):
        raise RecipeError(f"`budget: {budget}`: the number of {kind} must be whole and above 0. Write a whole number.")


def shortened(recipe: Recipe, share: float) -> Recipe:
    """Return the keys that cut a recipe's run to a share of its length.

    `max_steps` is cut, or `num_train_epochs` without it. What the schedule counts in steps is scaled alike, so that the short
    run warms up, decays and ends as the whole one does.
    """
    if share >= 1:
        return {}
    if _steps(recipe):
        return {"max_steps": math.ceil(share * _steps(recipe)), **_schedule(recipe, share)}
    epochs = float(recipe.get("num_train_epochs") or BLConfig.num_train_epochs)
    return {"num_train_epochs": share * epochs, **_schedule(recipe, share)}


def shortened_to(recipe: Recipe, steps: int) -> Recipe:
    """Return the keys that cut a recipe's run to a number of steps.

    Raises RecipeError if its schedule counts steps and its length in steps isn't known.
    """
    if _steps(recipe):
        return {**shortened(recipe, steps / _steps(recipe)), "max_steps": min(steps, _steps(recipe))}
    counted = _schedule(recipe, 1.0)
    if counted:
        raise RecipeError(
            f"Cannot cut runs to {steps} steps: {' and '.join(f'`{key}`' for key in counted)} counts steps of a run whose "
            "length isn't known. Write `max_steps` in the recipe, or `budget: {share: 0.25}` in the sweep file."
        )
    return {"max_steps": steps}


def _steps(recipe: Recipe) -> int:
    return max(0, int(recipe.get("max_steps") or 0))


def _schedule(recipe: Recipe, share: float) -> Recipe:
    """Return what a recipe's schedule counts in steps, scaled; what it gives as a share of the run stays."""
    found: Recipe = {}
    warmup, own = recipe.get("warmup_steps") or 0, recipe.get("lr_scheduler_kwargs") or {}
    others = from_json("lr_scheduler_kwargs", own, '{"num_decay_steps": 100}')
    if float(warmup) >= 1:
        found["warmup_steps"] = math.ceil(share * float(warmup))
    scaled = {key: math.ceil(share * value) for key, value in others.items() if key.endswith("_steps") and value is not None}
    if scaled:
        found["lr_scheduler_kwargs"] = {**others, **scaled}
    return found
