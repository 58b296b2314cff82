"""The LM head: scores, costs and gradients of target tokens without their logits."""

from .lm_head import Head
from .ops import TokenCosts, TokenDivergences, compare, log_probs, objective_head, score
from .patch import add_scoring
from .sums import TokenScores

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
