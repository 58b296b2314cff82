"""The LM head: scores, costs and gradients of target tokens without their logits.

All but `add_scoring`, which patches a model's forward with TRL's help, needs torch alone.
"""

from typing import TYPE_CHECKING, Any

from .lm_head import Head
from .ops import TokenCosts, TokenDivergences, compare, log_probs, objective_head, score
from .sums import TokenScores

if TYPE_CHECKING:
    from .patch import add_scoring

__all__ = [
    "Head",
    "TokenCosts",
    "TokenDivergences",
    "TokenScores",
    "add_scoring",
    "compare",
    "log_probs",
    "objective_head",
    "score",
]


def __getattr__(name: str) -> Any:
    """Import `add_scoring` on first use (PEP 562)."""
    if name != "add_scoring":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .patch import add_scoring

    return add_scoring
