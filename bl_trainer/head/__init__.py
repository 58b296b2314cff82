"""The LM head: scores, costs and gradients of target tokens without their logits."""

from .blocks import TokenScores
from .lm_head import Head
from .ops import TokenCosts, TokenDivergences, compare, log_probs, objective_head, score
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
