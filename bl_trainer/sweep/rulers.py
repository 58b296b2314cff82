"""The metrics that runs are compared by."""

import math
from typing import Any

from ..errors import RecipeError

RULERS = {  # name -> (which way is better, what it is)
    "accuracy": ("higher", "share of held-out target tokens that are the model's most probable one"),
    "nll": ("lower", "mean -log p of held-out target tokens, which `nll` itself minimises"),
    "perplexity": ("lower", "exp of nll"),
    "target_prob": ("higher", "mean p of held-out target tokens, which `neg_p` itself maximises"),
    "calibration_error": ("lower", "expected calibration error of the most probable token"),
    "drift": ("lower", "KL(base, tuned), nats per target token of the probe set, or of the held-out set without one"),
}

LOGGED = ("nll", "perplexity", "target_prob")  # rulers that a run's own evaluations give while it trains


def is_higher_better(ruler: str, result: dict[str, Any]) -> bool:
    """Return which way a ruler is better; a task's, as its results say."""
    return RULERS[ruler][0] == "higher" if ruler in RULERS else ruler not in result.get("lower_is_better", [])


def ruler_of(result: dict[str, Any], name: str) -> float:
    """Return an arm's value of a ruler."""
    if name == "perplexity":
        return math.exp(result["rulers"]["nll"]) if result["rulers"]["nll"] < 700 else math.inf
    if name not in result["rulers"]:
        raise RecipeError(f"`rank_by: {name}` is not among what was measured: {', '.join(result['rulers'])}.")
    return result["rulers"][name]
