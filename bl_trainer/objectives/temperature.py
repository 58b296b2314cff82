"""What an objective converges to where more than one token can follow: its effective temperature.

Let tokens v follow a context with probability T_v. Training moves the model's logits z of that context by

    dz = sum_v T_v (w_v (e_v - p) - s_v dH/dz)

where w_v is the weight of the objective on the NLL gradient at target v, s_v its slope in the entropy H, and whatever it
detaches is held. `nll` comes to rest at p = T. `power` with alpha = a < 1 comes to rest at p_v ~ T_v^(1/(1-a)), where `nll` is
if it is sampled at temperature 1 - a; with a >= 1 it comes to rest at the most probable token alone, which is temperature 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .pricing import price
from .threshold import Threshold

if TYPE_CHECKING:
    from .objective import Objective

# The share of one token, and how many others share the rest evenly: 70 and 30 %; two alike; one of 90 %, and 25 of 0.4 %
CHOICES = ((0.7, 1), (0.5, 1), (0.9, 25))
NUDGE = 1e-4  # of a share of one half: what is stable returns to it, what is not goes to one side
FARTHEST = 700.0  # log-odds beyond which p is 0 in float64
ROUNDING = 1e-14
SAME = 0.01  # temperatures within it count as one


@dataclass(frozen=True)
class Rest:
    """Where training comes to rest that starts from a model with p = T.

    `truth`: T of the first token; `others`: how many others share the rest of T evenly. `p`: of the first token, at rest.
    `temperature`: log-odds of T over log-odds of p, so p_v ~ T_v^(1/temperature): 1 is T itself, 0 the first token alone,
    infinity all tokens alike. Where T is even it is the limit from above; 0 says that one of the two takes over, to `p`.
    """

    truth: float
    others: int
    p: float
    temperature: float

    @property
    def variation(self) -> float:
        """Total variation between p and T, 0 to 1."""
        return abs(self.p - self.truth)


@dataclass(frozen=True)
class Temperature:
    """The effective temperature of an objective: where it comes to rest under each distribution T."""

    rests: tuple[Rest, ...]

    @property
    def fixed(self) -> float | None:
        """The temperature if it is the same for each T, within 0.01; None if it depends on T."""
        values = [rest.temperature for rest in self.rests]
        return values[0] if all(abs(value - values[0]) <= SAME or value == values[0] for value in values) else None

    def __str__(self) -> str:
        if self.fixed is None:
            return "depends on T: " + ", ".join(f"{rest.temperature:.2f}" for rest in self.rests)
        return "0: the most probable token alone" if self.fixed == 0 else f"{self.fixed:.2g}"


def effective_temperature(
    objective: "str | Mapping[str, Any] | Objective",
    threshold: Any = None,
    progress: float = 1.0,
    choices: Sequence[tuple[float, int]] = CHOICES,
) -> Temperature:
    """Return the temperature at which `nll` would be sampled to equal this objective at its optimum.

    `objective`, `threshold`: as recipes have them; weights that a function detaches are held, as in training. `progress`: the
    share of training at which schedules are read. `choices`: distributions T, each the share of one token and the number of
    others. A reference model, for `ref_logp`, has p = T. It follows the gradient flow
    from p = T to the first rest, in float64, as far as log-odds of 700. Raises RecipeError on a spec that can't be parsed.
    """
    from .objective import Objective

    parsed, limits = Objective.parse(objective), Threshold.parse(threshold)
    return Temperature(tuple(_rest(Flow(parsed, limits, progress, *choice), *choice) for choice in choices))


def _rest(flow: "Flow", truth: float, others: int) -> Rest:
    odds = flow.rest()
    p = 1 / (1 + others * math.exp(-odds)) if odds > -FARTHEST else 0.0
    p = truth if odds == flow.start else p
    temperature = 0.0 if odds == math.inf else flow.start / odds if odds > 0 else math.inf
    return Rest(truth, others, p, temperature)


@dataclass(frozen=True)
class Flow:
    """The gradient flow of one token against `others` like each other, in its log-odds log(p / p of one other)."""

    objective: "Objective"
    threshold: Threshold
    progress: float
    truth: float
    others: int

    @property
    def share(self) -> float:
        """T of the first token, beside one half where T is even."""
        return self.truth + (NUDGE if self.truth * (1 + self.others) == 1 else 0)

    @property
    def start(self) -> float:
        """The log-odds of T."""
        return math.log(self.share * self.others / (1 - self.share))

    def rest(self) -> float:
        """Return the log-odds at which the flow from T comes to rest: infinity if it ends at the first token alone."""
        way = self.push(torch.tensor([self.start], dtype=torch.float64)).sign().item()
        if way == 0:
            return self.start
        low, reach = 0.0, torch.logspace(-7, math.log10(FARTHEST), 4000, dtype=torch.float64)
        for _ in range(6):  # each finds the first of many steps at which the push has ended, or turned
            ended = self.push(self.start + way * reach) * way <= 0
            if not ended.any():
                return way * math.inf
            first = int(ended.int().argmax())
            low, high = (reach[first - 1].item() if first else low), reach[first].item()
            reach = torch.linspace(low, high, 300, dtype=torch.float64)
        return self.start + way * high

    def push(self, odds: Tensor) -> Tensor:
        """Return d(odds)/dt at these log-odds, (N,), but for a positive factor; 0 where nothing but rounding moves them.

        With H the entropy, dH/dz of the first token is -p p_other odds `others`. NaN counts as no push.
        """
        n = self.others
        other = -torch.logaddexp(odds, torch.full_like(odds, math.log(n)))
        logp = torch.stack([odds + other, other])  # of the first token, and of one other
        shares = logp.new_tensor([[self.share], [(1 - self.share) / n]])
        counts = logp.new_tensor([[1.0], [n]])
        cost = price(self.objective, self.threshold, self._statistics(logp, counts, shares.log().expand_as(logp)))
        weight = cost.weight.view_as(logp) * shares
        slope = torch.zeros_like(logp) if cost.entropy_slope is None else cost.entropy_slope.view_as(logp) * shares
        parts = torch.stack([weight[0], -odds.exp() * weight[1], (slope * counts).sum(0) * logp[0].exp() * odds])
        pushed = parts.sum(0)
        return torch.where(pushed.abs() > ROUNDING * parts.abs().sum(0), pushed, 0.0)

    def _statistics(self, logp: Tensor, counts: Tensor, reference: Tensor) -> dict[str, Any]:
        """Return the statistics of both kinds of target, flat."""
        entropy = -(counts * logp.exp() * logp).sum(0)
        squares = (counts.log() + 2 * logp).logsumexp(0)
        found = {
            "logp": logp,
            "entropy": entropy.expand_as(logp),
            "log_sum_sq_probs": squares.expand_as(logp),
            "is_top1": logp >= logp.amax(0),
            "ref_logp": reference,
            "label": torch.tensor([[0], [1]]).expand(logp.shape),
            "is_special": torch.zeros(logp.shape, dtype=torch.bool),
        }
        return {**{name: value.flatten() for name, value in found.items()}, "progress": self.progress}
