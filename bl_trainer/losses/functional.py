"""Any objective as a loss.

    as_loss          a function of a model's outputs and labels, as transformers' `compute_loss_func` and its like take
    fused_objective  from the last hidden states and the LM head's weight: no logits are held
    per_token        from log-probabilities: one loss per token, for the caller to sum and divide

All give the costs and gradients that `BLTrainer` trains with. `LossMetrics` collects what they report.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import LossError
from ..head.lm_head import Head, whole
from ..head.logits import objective_of_logits
from ..head.ops import objective_head
from ..head.targets import IGNORED
from ..objectives.objective import Objective
from ..objectives.pricing import LOSS_WEIGHT, masked_cost
from ..objectives.threshold import Threshold, trains
from .inputs import at_targets, check_bounds, check_labels, check_states, gathered, logits_of, read_targets, targets_of
from .metrics import LossMetrics
from .pricing import COLUMNS, GIVEN, Pricing

logger = logging.getLogger(__name__)
FIRST_LABEL = (
    "The first token of a row has a label, which nothing predicts. Trainers may count it as a target, as transformers does for "
    "GPT-2. The loss and its gradient are then too small. Write `labels[:, 0] = -100` in the data collator, or use "
    "`bl_trainer.adapters.transformers.attach`."
)


@dataclass(eq=False)
class ObjectiveOfLogits:
    """The function that `as_loss` returns."""

    pricing: Pricing
    micro_batches: int | Callable[[], int] | None
    seen: LossMetrics = field(default_factory=LossMetrics)
    # Whether it has compared the trainer's count with first labels that are no targets
    _knows_count: bool = field(default=False, init=False)

    @property
    def objective(self) -> Objective:
        """The objective of kept tokens."""
        return self.pricing.objective

    @property
    def threshold(self) -> Threshold:
        """The threshold that keeps them."""
        return self.pricing.threshold

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **columns: Tensor
    ) -> Tensor:
        """Return the loss of a micro-batch, a scalar; see `as_loss`."""
        logits, labels = logits_of(outputs), gathered(labels)
        columns = {name: gathered(column) for name, column in columns.items()}
        has_first = check_labels(labels, logits.shape[:2], logits.shape[-1], "logits")
        self.pricing.check_given(columns, COLUMNS, labels.shape, ("num_items_in_batch",))
        targets = targets_of(labels.to(logits.device))
        price, extras = self.pricing.pricer(), self.pricing.extras
        costs = objective_of_logits(logits, targets.index, targets.ids, price, extras, at_targets(targets, columns))
        self.seen.add_costs(costs)
        loss = self.pricing.mean(costs, num_items_in_batch, self.micro_batches)
        if has_first and num_items_in_batch is not None and not self._knows_count:
            self._knows_count = True
            if float(num_items_in_batch) >= int((labels != IGNORED).sum()):  # a right count may be less
                logger.warning(FIRST_LABEL)
        return loss

    def metrics(self, mode: str = "train", reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the means over all target tokens since the last call; see `LossMetrics.pop`."""
        return self.seen.pop(mode, reduce)


def as_loss(
    objective: str | Mapping[str, Any] | Objective,
    threshold: float | Mapping[str, Any] | Threshold | None = None,
    *,
    progress: float | Callable[[], float] | None = None,
    micro_batches: int | Callable[[], int] | None = None,
) -> ObjectiveOfLogits:
    """Make a loss function of `(outputs, labels, num_items_in_batch=None)`, transformers' `compute_loss_func` contract.

    The function returns the sum of f(p) over kept target tokens, divided by `num_items_in_batch`. Without that number, as in
    evaluation, it divides by the micro-batch's own targets. Under `normalize: kept` it divides by the micro-batch's kept
    tokens and by `micro_batches`. Values and gradients are those of `BLTrainer`. Logits are read in blocks, in float32 or
    wider; their gradient has their own type. A batch without targets costs a finite zero that is connected to the logits.

    The function's arguments:
        outputs: A mapping or an object with `logits`, (batch, length, vocabulary).
        labels: (batch, length) token ids, unshifted: logits at t predict the label at t + 1. -100 is no target.
        num_items_in_batch: Target tokens of all micro-batches (and processes) whose losses are added, a number or a tensor.
            The value of a tensor on an accelerator is not checked, since reading it would wait for the device. A warning
            says once that it may count first labels of rows, which are no targets.
        ref_logp, is_special, objective_weight: Tensors of the shape of `labels`, where the objective or the data have them.

    Its method `metrics(mode="train", reduce=None)` returns what `BLTrainer` logs, as means since the last call.

    Args:
        objective: What `Objective.parse` reads.
        threshold: What `Threshold.parse` reads.
        progress: Share of training that is done, 0 to 1, or a function that returns it; for objectives that depend on it.
        micro_batches: For `normalize: kept`, the number of micro-batches whose losses are added in a step, or a function that
            returns it: the accumulation steps, times the processes if the trainer adds losses over them. Ignored under
            `no_grad`, in evaluation.

    Raises:
        RecipeError: On a wrong objective or threshold.
        LossError: On a percentile that is not measured, or progress that is not given. The function raises it on missing
            logits, labels of another length or type, ids outside of the vocabulary, and per-token tensors that are missing.
    """
    return ObjectiveOfLogits(Pricing.read(objective, threshold, progress), micro_batches)


def fused_objective(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    objective: str | Mapping[str, Any] | Objective,
    threshold: float | Mapping[str, Any] | Threshold | None = None,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    num_items: Tensor | int | None = None,
    progress: float | Callable[[], float] | None = None,
    micro_batches: int | Callable[[], int] | None = None,
    metrics: LossMetrics | None = None,
    **columns: Tensor,
) -> Tensor:
    """Return the loss of a micro-batch from its last hidden states; the logits are never held.

    Logits are softcap(scale (hidden weight^T + bias)), softcap(x) = c tanh(x / c). Value, division and per-token tensors are
    those of `as_loss`. The gradients in hidden states, weight and bias are formed along with the value, so the loss holds a
    gradient of the weight's shape in float32 until `backward`. `backward` may be called once, and has no derivative. Add the
    losses of several micro-batches by calling `backward` on each.

    Args:
        hidden: (batch, length, H), where state t predicts the label at t + 1; or (N, H), where state i predicts label i.
        lm_head_weight: (vocabulary, H). What FSDP2 shards is gathered, and its gradient is the mean over processes.
        labels: Token ids, (batch, length) unshifted or (N,); -100 is no target.
        objective: What `Objective.parse` reads. Parse it once: a name is read and checked at each call.
        threshold: What `Threshold.parse` reads.
        bias: (vocabulary,).
        scale: Multiplies the logits.
        softcap: Bounds the logits.
        num_items: Target tokens of all micro-batches whose losses are added; None divides by this one's.
        progress: As in `as_loss`.
        micro_batches: As in `as_loss`.
        metrics: Collects what `BLTrainer` logs.
        columns: `ref_logp`, `is_special`, `objective_weight`, of the shape of `labels`.

    Raises:
        RecipeError, LossError: As `as_loss` and its function.
    """
    pricing = Pricing.read(objective, threshold, progress)
    hidden, labels = gathered(hidden), gathered(labels)
    columns = {name: gathered(column) for name, column in columns.items()}
    check_states(hidden, lm_head_weight)
    check_bounds(scale, softcap)
    check_labels(labels, hidden.shape[:-1], len(lm_head_weight), "hidden states")
    pricing.check_given(columns, COLUMNS, labels.shape, ("num_items", "bias", "scale", "softcap", "metrics"))
    targets = targets_of(labels.to(hidden.device))
    states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets.index)
    head = Head(whole(lm_head_weight), whole(bias), scale, softcap)
    costs = objective_head(states, head, targets.ids, pricing.pricer(), pricing.extras, at_targets(targets, columns))
    if metrics is not None:
        metrics.add_costs(costs)
    return pricing.mean(costs, num_items, micro_batches)


def per_token(
    logp: Tensor,
    labels: Tensor,
    objective: str | Mapping[str, Any] | Objective,
    threshold: float | Mapping[str, Any] | Threshold | None = None,
    *,
    progress: float | Callable[[], float] | None = None,
    metrics: LossMetrics | None = None,
    **statistics: Tensor,
) -> Tensor:
    """Return f(p) of each token, 0 where it is no target or not kept; differentiable in `logp`.

    Sum it over all tokens, and divide by the target tokens of all micro-batches whose losses are added.

    Args:
        logp: Log-probabilities in nats, of any shape and float type.
        labels: Of its shape, aligned with it: the ids of the tokens that `logp` is about, -100 where there is no target. A bool
            tensor, True at targets, serves objectives that do not ask for `label`. Integers that are all 0 or 1 are refused,
            as a mask. Where these are the ids, add a token that is no target, with label -100.
        objective: What `Objective.parse` reads. Parse it once: a name is read and checked at each call.
        threshold: What `Threshold.parse` reads, with `normalize: tokens`.
        progress: As in `as_loss`.
        metrics: Collects what `BLTrainer` logs, without entropy and accuracy where these are not given.
        statistics: Of the shape of `logp`, at least those that the objective names: `entropy` (nats, with gradient if it has
            one), `log_sum_sq_probs`, `is_top1`, `ref_logp`, `is_special`; and `objective_weight`.

    Returns:
        Tensor of the shape of `logp`, in float32 or wider.

    Raises:
        RecipeError, LossError: As `as_loss`; on `normalize: kept`; on log-probabilities above 0, such as losses given by
            mistake.
    """
    pricing = Pricing.read(objective, threshold, progress)
    if pricing.threshold.normalize == "kept":
        raise LossError(
            "Cannot use `normalize: kept` with `per_token`: it divides nothing. Remove it, and divide by what you like."
        )
    logp, labels = gathered(logp), gathered(labels)
    statistics = {name: gathered(value) for name, value in statistics.items()}
    ids, is_target = read_targets(labels, logp, pricing.objective)
    pricing.check_given(statistics, GIVEN, logp.shape)
    statistics = {name: value.to(logp.device) for name, value in statistics.items()}
    wide = logp.to(torch.promote_types(logp.dtype, torch.float32))
    if (wide.detach()[is_target] > 1e-3).any():
        raise LossError(
            f"Cannot price tokens: log p is {wide.detach()[is_target].max().item():.3g}, above 0. Give log-probabilities."
        )
    wide = wide - wide.detach().clamp(min=0)  # what kernels round to above 0 has the cost of p = 1, and its gradient
    given = {"label": ids, **statistics, **pricing.now()}
    asked: dict[str, Any] = {name: given[name] for name in pricing.objective.statistics}
    kept = is_target & trains(pricing.threshold, wide, asked.get("is_special"))
    cost, weight = masked_cost(pricing.objective, kept, wide, statistics.get(LOSS_WEIGHT), **asked)
    if metrics is not None:
        found = {"entropy": statistics.get("entropy"), "mean_token_accuracy": statistics.get("is_top1")}
        found |= {"nll": -wide, "target_prob": wide.exp(), "kept_fraction": kept, "gradient_weight": weight, "objective": cost}
        metrics.add({name: each[is_target] for name, each in found.items() if each is not None})
    return cost
