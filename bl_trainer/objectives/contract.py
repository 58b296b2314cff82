"""What an objective function must keep, tried before a model loads."""

from typing import Any

import torch

# What the trainer can hand to an objective besides `logp`; see `Objective`.
STATISTICS = ("entropy", "log_sum_sq_probs", "is_top1", "ref_logp", "label", "progress")


def probe_tokens(logp: list[float], shape: tuple[int, int], progress: float) -> dict[str, Any]:
    """Return statistics of tokens with these log-probabilities, one that a next-token distribution could have."""
    values = torch.tensor(logp, dtype=torch.float32).view(shape)
    uncertainty = 0.1 + (-values).clamp(max=3)
    return {
        "logp": values,
        "entropy": uncertainty,
        "log_sum_sq_probs": -uncertainty,
        "is_top1": values > -0.69,
        "ref_logp": values / 2 - 0.1,
        "label": torch.zeros(shape, dtype=torch.long),
        "progress": progress,
    }
