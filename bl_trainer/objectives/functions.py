"""What objective functions are made of: values with their slopes in closed form, and parameters that are numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .specs import is_number, to_number


class _Pointwise(torch.autograd.Function):
    """`value` with the slope in log p given in closed form: autograd's own for expm1 is expm1 + 1, which loses small p."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None


def _widen(logp: Tensor) -> Tensor:
    return logp if logp.device.type == "mps" else logp.double()  # MPS has no float64


def _power(logp: Tensor, alpha: Tensor) -> Tensor:
    """Return (1 - p^alpha) / alpha with an alpha of at least 0 for each token, which has no gradient; -log p where it is 0."""
    wide = _widen(logp)
    exponent = torch.where(alpha <= 1e-16, 0.0, alpha * wide)  # 0 at p = 0 too, where alpha is
    value = torch.where(alpha <= 1e-16, -wide, -torch.expm1(exponent) / alpha.clamp(min=1e-16))
    return _Pointwise.apply(logp, value.to(logp.dtype), -exponent.exp().to(logp.dtype))


def _require_number(objective: str, name: str, value: Any) -> None:
    if not is_number(value):
        schedule = (
            " Write a schedule as `{from: 0, to: 1, over: [0.3, 1.0]}`." if isinstance(value, (Mapping, list, tuple)) else ""
        )
        quotes = " Leave out the quotes." if is_number(to_number(value)) else ""
        raise ValueError(f"`{name}` of objective {objective!r} must be a finite number, got {value!r}.{schedule}{quotes}")
