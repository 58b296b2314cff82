"""Training of a stack: each model has its own rows, objective and learning rate, and becomes what it would become alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LossError
from ..objectives import spell
from ..objectives.objective import Objective
from ..objectives.pricing import price
from ..objectives.threshold import Threshold
from .transformer import Shape, logits, unpack
from .vocabulary import END


class Rows(NamedTuple):
    """Training rows of several sets. `tokens`: ids, (sets, rows, length + 1); `is_target`: bool, (sets, rows, length), of the
    tokens after the first."""

    tokens: Tensor
    is_target: Tensor


class Arm(NamedTuple):
    """How one model of a stack trains; `rows`: which set of the `Rows` is its own.

    `smoothing`: share e of label smoothing. A token costs (1 - e) f(p) + e times the mean of -log p over the vocabulary.
    """

    objective: Objective
    threshold: Threshold
    rate: float
    rows: int
    smoothing: float = 0.0


@dataclass(frozen=True)
class Course:
    """AdamW without weight decay: `steps` of `batch` rows, the rate rising over `warmup` steps, then falling linearly to 0.

    `clip`: the greatest norm of a model's gradient.
    """

    steps: int = 80
    batch: int = 32
    warmup: int = 5
    clip: float = 1.0

    def factor(self, step: int) -> float:
        """Return what the rate is multiplied by in a step, the first being 0."""
        return min((step + 1) / self.warmup, (self.steps - step) / max(1, self.steps - self.warmup), 1.0)


def train(shape: Shape, start: Tensor, rows: Rows, arms: Sequence[Arm], course: Course) -> Tensor:
    """Return the weights, (models, count), that training makes of `start`, of the same shape, which stays as it is.

    A step's batch is the next `course.batch` rows of an arm's set. All models are independent: in float64 each is what it is
    when it trains alone, but for rounding. Raises LossError where an objective makes weights that are not finite.
    """
    stack = start.detach().clone()
    weights = {name: view.requires_grad_() for name, view in unpack(shape, stack).items()}
    models = [torch.nn.Parameter(row) for row in stack]  # views as well
    groups = [{"params": [model], "lr": arm.rate} for model, arm in zip(models, arms, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    losses = losses_of(arms)
    sets = torch.tensor([arm.rows for arm in arms])
    for step in range(course.steps):
        batch = slice(step * course.batch, (step + 1) * course.batch)
        tokens, is_target = rows.tokens[sets, batch], rows.is_target[sets, batch]
        first, last = map(
            int, is_target.flatten(0, 1).any(0).nonzero().aminmax()
        )  # of the places that have a target in any row
        tokens, is_target = tokens[..., : last + 2], is_target[..., first : last + 1]
        found = logits(shape, weights, tokens[..., :-1], first)
        slopes = torch.zeros_like(found)
        for loss in losses:
            i = loss.models
            base = None
            if "ref_logp" in loss.objective.statistics:
                with torch.no_grad():
                    base = logits(shape, unpack(shape, start[i]), tokens[i, :, :-1], first)
            slopes[i] = loss.slopes(found.detach()[i], tokens[i, :, first + 1 :], is_target[i], step / course.steps, base)
        gradients = torch.autograd.grad(found, list(weights.values()), slopes)
        gradient = torch.cat([each.flatten(1) for each in gradients], dim=1)
        gradient *= (course.clip / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        for model, own, group, arm in zip(models, gradient, optimizer.param_groups, arms, strict=True):
            model.grad, group["lr"] = own, arm.rate * course.factor(step)
        optimizer.step()
    for arm, is_finite in zip(arms, stack.isfinite().all(1).tolist(), strict=True):
        if not is_finite:
            raise LossError(
                f"Cannot score `{spell(arm.objective.to_dict())}`: within {course.steps} steps at a learning rate of "
                f"{arm.rate:g} it makes weights that are not finite. At some p its cost or its slope is no number."
            )
    return stack.detach()


@dataclass(frozen=True)
class StackLoss:
    """The loss of those `models`, (n,) indices into a stack, that share an objective, a threshold and label smoothing."""

    objective: Objective
    threshold: Threshold
    models: Tensor
    smoothing: float = 0.0

    def slopes(self, found: Tensor, labels: Tensor, is_target: Tensor, progress: float, base: Tensor | None) -> Tensor:
        """Return the gradient of each model's mean cost in its logits, of the shape of `found`.

        `found`: logits, (n, rows, places, vocabulary); `labels`, `is_target`: (n, rows, places). `base`: the logits of the
        models before training, where the objective compares with them. As in `BLTrainer`, `progress` and the divisor follow the
        recipe: all target tokens of the batch, or the kept ones.
        """
        logp, label = found[is_target].log_softmax(-1), labels[is_target]
        p = logp.exp()
        entropy = -(p * logp).sum(-1)
        own = logp.gather(-1, label[:, None])[:, 0]
        statistics: dict[str, Any] = {
            "logp": own,
            "entropy": entropy,
            "is_top1": logp.argmax(-1) == label,
            "label": label,
            "is_special": label == END,
            "progress": progress,
        }
        if "log_sum_sq_probs" in self.objective.statistics:
            statistics["log_sum_sq_probs"] = (2 * logp).logsumexp(-1)
        if base is not None:
            statistics["ref_logp"] = base[is_target].log_softmax(-1).gather(-1, label[:, None])[:, 0]
        cost = price(self.objective, self.threshold, statistics)
        slope = cost.weight[:, None] * p
        slope.scatter_add_(1, label[:, None], -cost.weight[:, None])
        if cost.entropy_slope is not None:
            slope -= (cost.entropy_slope)[:, None] * p * (logp + entropy[:, None])
        if self.smoothing:
            slope = (1 - self.smoothing) * slope + self.smoothing * (p - 1 / p.shape[-1])
        slopes = torch.zeros_like(found)
        slopes[is_target] = slope
        return slopes / self._divisor(is_target, cost.kept)[:, None, None, None]

    def _divisor(self, is_target: Tensor, kept: Tensor) -> Tensor:
        counted = is_target
        if self.threshold.normalize == "kept":
            counted = torch.zeros_like(is_target)
            counted[is_target] = kept
        return counted.flatten(1).sum(1).clamp(min=1)


def losses_of(arms: Sequence[Arm]) -> list[StackLoss]:
    """Return the losses of a stack, each with its models."""
    keys = [repr((arm.objective.to_dict(), arm.threshold.to_dict(), arm.smoothing)) for arm in arms]
    firsts = {key: keys.index(key) for key in keys}
    shared = {key: torch.tensor([j for j, other in enumerate(keys) if other == key]) for key in firsts}
    return [StackLoss(arms[i].objective, arms[i].threshold, shared[key], arms[i].smoothing) for key, i in firsts.items()]
