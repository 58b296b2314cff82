"""Any objective as the loss of any trainer: from logits, from hidden states, or from log-probabilities. Needs torch alone."""

from .functional import ObjectiveOfLogits, as_loss, fused_objective, per_token
from .metrics import LossMetrics

__all__ = ["LossMetrics", "ObjectiveOfLogits", "as_loss", "fused_objective", "per_token"]
