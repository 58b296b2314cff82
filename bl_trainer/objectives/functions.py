"""What objective functions are made of: values with their slopes in closed form, and parameters that are numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._util.text import is_number, to_number
from ..errors import RecipeError
from .composition import Schedule


class Pointwise(torch.autograd.Function):
    """`value` with the slope in log p given in closed form: autograd's own for expm1 is expm1 + 1, which loses small p."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None


def widen(logp: Tensor) -> Tensor:
    return logp if logp.device.type == "mps" else logp.double()  # MPS has no float64


def power_per_token(logp: Tensor, alpha: Tensor) -> Tensor:
    """Return (1 - p^alpha) / alpha with an alpha of at least 0 for each token, which has no gradient; -log p where it is 0."""
    wide = widen(logp)
    exponent = torch.where(alpha <= 1e-16, 0.0, alpha * wide)  # 0 at p = 0 too, where alpha is
    value = torch.where(alpha <= 1e-16, -wide, -torch.expm1(exponent) / alpha.clamp(min=1e-16))
    return Pointwise.apply(logp, value.to(logp.dtype), -exponent.exp().to(logp.dtype))


def require_number(objective: str, name: str, value: Any) -> None:
    if not is_number(value):
        schedule = (
            " Write a schedule as `{from: 0, to: 1, over: [0.3, 1.0]}`." if isinstance(value, (Mapping, list, tuple)) else ""
        )
        quotes = " Leave out the quotes." if is_number(to_number(value)) else ""
        raise RecipeError(f"`{name}` of objective {objective!r} must be a finite number, got {value!r}.{schedule}{quotes}")


def nll(logp: Tensor) -> Tensor:
    """f(p) = -log p, weight on the NLL gradient 1.

    Standard SFT, and the default: for a model that knows little of the task (model-weak), or while you don't know.

    Source: https://arxiv.org/abs/2510.00526, Eq. 1.

    `logp`: float tensor of any shape. Returns the same shape and dtype.
    """
    return -logp


def neg_p(logp: Tensor) -> Tensor:
    """f(p) = 1 - p, weight on the NLL gradient p.

    The paper's -p, and the gradient of `dft`: for a model that knows the task well (model-strong), where improbable targets are
    mostly noise.

    Source: https://arxiv.org/abs/2510.00526, section 3.

    `logp`: float tensor of any shape. Returns the same shape and dtype.
    """
    return Pointwise.apply(logp, -torch.expm1(logp), -torch.exp(logp))


def power(logp: Tensor, alpha: float) -> Tensor:
    """f(p) = (1 - p^alpha) / alpha, weight on the NLL gradient p^alpha.

    Between the two and beyond: alpha -> 0 is `nll`, 1 is `neg_p`, 10 the paper's -p^10, and a negative alpha is more
    prior-averse than `nll`. There p^alpha has no bound, so beyond p^alpha = e^80, near the end of float32, f continues linearly
    in log p.

    Source: https://arxiv.org/abs/2510.00526, Eq. 3.

    `logp`: float tensor of any shape. Returns the same shape and dtype. Raises RecipeError unless alpha is a finite number.
    """
    require_number("power", "alpha", alpha)
    if abs(alpha) < 1e-16:  # (1 - p^alpha) / alpha differs from -log p by less than a float64 can hold
        return -logp
    wide = widen(logp)
    exponent = alpha * wide  # in float64: at log p = -100 a rounding of the exponent is a relative error of exp
    tame = exponent.clamp(max=80)
    weight = tame.exp()
    value = -(tame.expm1() + weight * (exponent - 80).clamp(min=0)) / alpha
    return Pointwise.apply(logp, value.to(logp.dtype), -weight.to(logp.dtype))


def log_one_minus_p(logp: Tensor, epsilon: float = 1e-3) -> Tensor:
    """f(p) = log(1 - p + epsilon), weight on the NLL gradient p / (1 - p + epsilon).

    To repeat the paper's figure: nearly all weight is on what is already probable.

    Source: https://arxiv.org/abs/2510.00526, Fig. 5; epsilon from its code.

    `logp`: float tensor of any shape. Returns the same shape and dtype. Raises RecipeError unless epsilon > 0, without
    which f has no slope at p = 1.
    """
    require_number("log_one_minus_p", "epsilon", epsilon)
    if epsilon <= 0:
        raise RecipeError(f"`epsilon` of objective 'log_one_minus_p' must be positive, got {epsilon}; the paper has 1e-3.")
    wide = widen(logp)
    p, one_minus_p = wide.exp(), -wide.expm1()
    value = torch.where(p < 0.5, torch.log1p(epsilon - p), torch.log(one_minus_p + epsilon))
    return Pointwise.apply(logp, value.to(logp.dtype), -(p / (one_minus_p + epsilon)).to(logp.dtype))


def annealed_alpha(progress: float, start: float, end: float) -> float:
    """Return the alpha of `anneal` at H = 0. Raises RecipeError unless start >= 0 and end >= 0."""
    for name, value in (("start", start), ("end", end)):
        require_number("anneal", name, value)
        if value < 0:
            raise RecipeError(f"`{name}` of objective 'anneal' must not be negative, got {value}; 0 is `nll`.")
    return Schedule(start, end, over=(0.5, 1.0)).at(progress)


def anneal(logp: Tensor, entropy: Tensor, progress: float, start: float = 0.5, end: float = 5.0) -> Tensor:
    """f(p) = (1 - p^a) / a, weight on the NLL gradient p^a, with a = sg(e^-H) (start + (end - start) max(0, 2 progress - 1)).

    `power` with an alpha for each token. H is the entropy of its next-token distribution in nats. The less decided the model,
    the smaller alpha, and the nearer to `nll`, which learns what is missing. Where the model is sure, of the target or of
    something else, alpha is `start` in the first half of training and rises to `end` in the second. That discards targets that
    it has had the chance to learn and still finds improbable. docs/results/anneal.md is the study.

    `logp`: float tensor of any shape. `entropy`: the same shape. `progress`: of training, from 0 to 1. Returns the shape
    and dtype of `logp`. Raises RecipeError unless start >= 0 and end >= 0.
    """
    sureness = (-widen(entropy.detach()).clamp(min=0)).exp()
    return power_per_token(logp, annealed_alpha(progress, start, end) * sureness)
