"""Designs that the study of `anneal` compares it with; each is `power` with an alpha of its own, which has no gradient.

t = `progress`, from 0 to 1 over training; s = sum_v p_v^2 of the token's next-token distribution; H = its entropy in nats.
"""

from torch import Tensor


def weighted(logp: Tensor, weight: Tensor) -> Tensor:
    """Return a cost that puts `weight` on the gradient of -log p."""
    return -weight.detach() * logp


def linear(logp: Tensor, progress: float, to: float = 2.0) -> Tensor:
    """alpha = t `to`."""
    return weighted(logp, (progress * to * logp).exp())


def late(logp: Tensor, progress: float, to: float = 3.0) -> Tensor:
    """alpha = `to` max(0, 2 t - 1): NLL for the first half, then rising linearly."""
    return weighted(logp, (to * max(0.0, 2 * progress - 1) * logp).exp())


def switch(logp: Tensor, progress: float) -> Tensor:
    """NLL for the first half, then neg_p."""
    return weighted(logp, (float(progress >= 0.5) * logp).exp())


def deft(logp: Tensor, log_sum_sq_probs: Tensor) -> Tensor:
    """alpha = s (https://arxiv.org/abs/2602.11424)."""
    return weighted(logp, (log_sum_sq_probs.exp() * logp).exp())


def conflict(logp: Tensor, entropy: Tensor, progress: float) -> Tensor:
    """alpha = (0.5 + 2.5 t) e^-H: as training goes on, improbable targets weigh less where the model is sure of another."""
    return weighted(logp, ((0.5 + 2.5 * progress) * (-entropy).exp() * logp).exp())


def gate(logp: Tensor, log_sum_sq_probs: Tensor, progress: float) -> Tensor:
    """Weight min(1, p / s)^(0.5 + 1.5 t): a target is improbable by comparison with what the model gives others."""
    return weighted(logp, ((0.5 + 1.5 * progress) * (logp - log_sum_sq_probs).clamp(max=0)).exp())
