"""The cost of each token and its weight on the NLL gradient."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .composition import hidden
from .threshold import Threshold, trains

if TYPE_CHECKING:
    from .objective import Objective

# A statistic beside those that objectives name, >= 0: what multiplies a token's cost, and so its gradient
LOSS_WEIGHT = "objective_weight"

# The means over target tokens that every run reports
METRICS = ("nll", "target_prob", "kept_fraction", "gradient_weight", "entropy", "mean_token_accuracy")


def masked_cost(
    objective: "Objective", kept: Tensor, logp: Tensor, scale: Tensor | None = None, **statistics: Any
) -> tuple[Tensor, Tensor]:
    """Return (f, weight on the NLL gradient) per token, both exactly zero, also in the gradient, where not `kept`.

    `kept`: bool tensor; `logp` and the tensors in `statistics`: its shape; both results: its shape, `logp`'s dtype. The
    weight has no gradient. f may be infinite or NaN on tokens that are not kept, since it never sees them. `scale`, of the
    same shape, >= 0, multiplies both: `LOSS_WEIGHT`.
    """
    # Its graph is gone through twice, which activation offloading can't. Under `inference_mode` there would be none, and no
    # tensor made there can be in one: all are copied
    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        if scale is not None:
            kept = kept & (scale != 0)
        elif kept.is_inference():
            kept = kept.clone()
        seen = hidden(~kept, {"logp": logp, **statistics})
        leaf = seen.pop("logp")
        if not leaf.requires_grad:
            leaf.requires_grad_()
        cost = objective(leaf, **seen)
        if scale is not None:
            cost = cost * scale.to(cost.dtype).clone()
        slope = None
        if cost.requires_grad:  # a function of the entropy alone has no gradient in evaluation
            (slope,) = torch.autograd.grad(cost.sum(), leaf, retain_graph=True, allow_unused=True)
    weight = torch.zeros_like(logp) if slope is None else -slope
    if not torch.is_grad_enabled():
        cost = cost.detach()
    zero = cost.new_zeros(())
    return torch.where(kept, cost, zero), torch.where(kept, weight, zero)


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


class Price(NamedTuple):
    """What N tokens cost, all (N,) and without graph; what `kept` leaves out costs nothing and weighs nothing.

    `cost`: f. `weight`: -df/dlogp, the weight on the NLL gradient. `kept`: bool. `entropy_slope`: df/dentropy, None if zero.
    """

    cost: Tensor
    weight: Tensor
    kept: Tensor
    entropy_slope: Tensor | None


def price(objective: "Objective", threshold: Threshold, statistics: Mapping[str, Any]) -> Price:
    """Price tokens by their `statistics`: `logp`, (N,), at least those the objective names, and maybe `LOSS_WEIGHT`."""
    logp, slope = statistics["logp"].detach(), None
    given = {name: statistics[name] for name in objective.statistics}
    kept = trains(threshold, logp, given.get("is_special"))
    with torch.inference_mode(False), torch.enable_grad():
        if "entropy" in given:
            given["entropy"] = given["entropy"].detach().clone().requires_grad_()
        cost, weight = masked_cost(objective, kept, logp, statistics.get(LOSS_WEIGHT), **given)
        if "entropy" in given and cost.requires_grad:
            (slope,) = torch.autograd.grad(cost.sum(), given["entropy"], allow_unused=True)
    return Price(cost.detach(), weight, kept, slope)


def mean_cost(cost: Tensor, kept: Tensor, threshold: Threshold, targets: Tensor | int, micro_batches: int) -> Tensor:
    """Return the loss to minimise, a scalar: the sum of `cost`, divided as `threshold.normalize` says.

    `tokens` divides by `targets`: all target tokens whose costs are added, in every micro-batch and process. `kept` divides by
    `kept`, (), the tokens of this micro-batch that train, and by `micro_batches`, how many losses are added. A count of 0
    divides by 1.
    """
    if threshold.normalize == "kept":
        return cost.sum() / kept.clamp(min=1) / micro_batches
    return cost.sum() / torch.as_tensor(targets, device=cost.device).clamp(min=1)
