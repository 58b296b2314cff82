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


def _require_number(objective: str, name: str, value: Any) -> None:
    if not is_number(value):
        schedule = (
            " Write a schedule as `{from: 0, to: 1, over: [0.3, 1.0]}`." if isinstance(value, (Mapping, list, tuple)) else ""
        )
        quotes = " Leave out the quotes." if is_number(to_number(value)) else ""
        raise ValueError(f"`{name}` of objective {objective!r} must be a finite number, got {value!r}.{schedule}{quotes}")
