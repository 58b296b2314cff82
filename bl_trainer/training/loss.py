"""The objective's cost of each token of a batch, over a loss head: `bl_trainer`'s own, or TRL's."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerState

from ..errors import RecipeError
from ..head.lm_head import Head
from ..head.ops import TokenCosts, objective_head, score
from ..head.targets import Targets, shifted
from ..objectives.objective import Objective
from ..objectives.pricing import LOSS_WEIGHT, Price, masked_cost, mean_cost, price
from ..objectives.threshold import Threshold, trains
from ..tokens.columns import TokenColumns
from ..tokens.labels import refuse_misaligned
from ..tokens.names import REFERENCE
from ..tokens.reference import base_of


@dataclass(frozen=True)
class TokenLoss:
    """
    What each token of a micro-batch costs: tensors (batch, length - 1), about the next token, 0 where that is no target.

    `cost`: f, the one with a gradient; 0 on tokens that don't train. `logp`, `entropy`: nats. `weight`: on the NLL gradient.
    `kept`: bool, which train. `is_top1`, `is_target`: bool. `aux_loss`: (), of a mixture of experts, or None.
    """

    cost: Tensor
    logp: Tensor
    weight: Tensor
    kept: Tensor
    entropy: Tensor
    is_top1: Tensor
    is_target: Tensor
    aux_loss: Tensor | None = None


class LossHead(Protocol):
    """Where log p, and what else an objective asks for, come from."""

    name: str  # as checkpoints record it

    def __call__(
        self, loss: "ObjectiveLoss", model: Any, inputs: dict[str, Any], columns: TokenColumns, progress: float
    ) -> TokenLoss:
        """Return the cost of each token of `inputs` under `loss`, from one forward of `model`."""


@dataclass(frozen=True)
class ObjectiveLoss:
    """
    The loss of a batch, per token: `objective` of the tokens within `threshold`, computed by `head`.

    `special_ids`: (number,) ids of end and special tokens, where the objective has `special_tokens`. `adapted`: the PEFT model
    whose base is the reference, where the objective's `ref_logp` comes from there.
    """

    objective: Objective
    threshold: Threshold
    head: LossHead
    special_ids: Tensor | None = None
    adapted: Any = None

    def __call__(self, model: Any, inputs: dict[str, Any], progress: float) -> TokenLoss:
        """Return the cost of each token. Takes the columns out of `inputs`, a collated batch; `progress`: 0 to 1.

        Raises RecipeError on a batch without a label for each token, or without the reference that the objective asks for.
        """
        refuse_misaligned(inputs)
        if "ref_logp" in self.objective.statistics and self.adapted is None and REFERENCE not in inputs:
            raise RecipeError(f"Cannot evaluate: the data set has no column `{REFERENCE}`, as the training set has. Add it.")
        return self.head(self, model, inputs, TokenColumns(inputs, self.special_ids), progress)

    def scheduled_at(self, progress: float) -> dict[str, float]:
        """Return what the objective's schedules have come to, as it is logged: `objective_alpha`."""
        return {f"objective_{name}": value for name, value in self.objective.scheduled_at(progress).items()}


class OwnHead:
    """`objective_head`, which forms the gradient as it goes: exact, in fewer products than TRL's."""

    name = "own"

    def __call__(
        self, loss: ObjectiveLoss, model: Any, inputs: dict[str, Any], columns: TokenColumns, progress: float
    ) -> TokenLoss:
        extras, reference = tuple({"log_sum_sq_probs"} & set(loss.objective.statistics)), {}
        if loss.adapted is not None:
            with base_of(model, loss.adapted):
                reference = {"ref_logp": model(**inputs, use=functools.partial(score, extras=())).found.logp}

        def priced(statistics: dict[str, Tensor]) -> Price:
            return price(loss.objective, loss.threshold, {**statistics, "progress": progress})

        def cost(hidden: Tensor, head: Head, target: Tensor) -> TokenCosts:
            def own(column: Tensor, fill: float) -> Tensor:
                return _at_targets(column, fill, inputs["labels"], len(target)).to(target.device)

            known = columns.at(target, own)
            return objective_head(hidden, head, target, priced, extras, {**known, **reference})

        costs, is_target, aux_loss = model(**inputs, use=cost)

        def laid_out(values: Tensor) -> Tensor:
            # connected to the model where there is no target too, which a backward needs on every process
            return values.new_zeros(is_target.shape).masked_scatter(is_target, values)

        return TokenLoss(
            cost=laid_out(costs.cost),
            logp=laid_out(costs.scores.logp),
            weight=laid_out(costs.weight),
            kept=laid_out(costs.kept),
            entropy=laid_out(costs.scores.entropy),
            is_top1=laid_out(costs.is_top1),
            is_target=is_target,
            aux_loss=aux_loss,
        )


class TRLHead:
    """TRL's fused head, with which `nll` trains weights that are bit-identical to `SFTTrainer`'s."""

    name = "trl"

    def __call__(
        self, loss: ObjectiveLoss, model: Any, inputs: dict[str, Any], columns: TokenColumns, progress: float
    ) -> TokenLoss:
        inputs, ref_logp = {**inputs, "fused_lm_head": True}, None
        if loss.adapted is not None:
            with base_of(model, loss.adapted):
                ref_logp = model(**inputs).log_probs
        outputs = model(**inputs)
        logp, is_target = outputs.log_probs, outputs.label_mask
        targets, virtual_tokens = _targets_of(logp, inputs)
        known = columns.at(targets.labels, lambda column, fill: shifted(column.to(logp.device), fill, virtual_tokens))
        kept = is_target & trains(loss.threshold, logp, known.get("is_special"))
        available = {
            "entropy": lambda: outputs.entropy,
            "log_sum_sq_probs": lambda: outputs.log_sum_sq_probs,
            "is_top1": lambda: outputs.is_top1,
            "ref_logp": lambda: known["ref_logp"] if ref_logp is None else ref_logp,
            "label": lambda: targets.labels,
            "progress": lambda: progress,
            "is_special": lambda: known["is_special"],
        }
        statistics = {name: available[name]() for name in loss.objective.statistics}
        cost, weight = masked_cost(loss.objective, kept, logp, known.get(LOSS_WEIGHT), **statistics)
        aux_loss = getattr(outputs, "aux_loss", None)
        aux_loss = None if aux_loss is None else aux_loss.to(cost.device)  # layers may be spread over devices
        return TokenLoss(cost, logp, weight, kept, outputs.entropy, outputs.is_top1, is_target, aux_loss)


def _at_targets(column: Tensor, fill: float, labels: Tensor, count: int) -> Tensor:
    """Return a column's values at the `count` targets among `labels`, (count,)."""
    targets, virtual_tokens = Targets.of(labels), 0
    if len(targets.index) < count:  # the model has put virtual tokens in front, which predict the first tokens too
        targets, virtual_tokens = Targets.of(labels, 1), 1
    return targets.take(shifted(column, fill, virtual_tokens))


def _targets_of(logp: Tensor, inputs: dict[str, Any]) -> tuple[Targets, int]:
    """Return what `logp`, one per place, is about, and how many virtual tokens stand in front of those of `inputs`."""
    if inputs.get("shift_labels") is not None:  # by context parallelism, before it cuts sequences up
        return Targets(inputs["shift_labels"].to(logp.device)), 0
    virtual_tokens = logp.shape[1] + 1 - inputs["labels"].shape[1]
    return Targets.of(inputs["labels"].to(logp.device), virtual_tokens), virtual_tokens


def mean_over_batch(trainer: Any, tokens: TokenLoss, num_items: Tensor | int | None) -> Tensor:
    """Return the loss to minimise, as `SFTTrainer.compute_loss` forms it: `mean_cost`, times the processes that average it.

    `num_items`: target tokens of all micro-batches and processes of the step, over which the trainer sums gradients; without,
    as in evaluation, the micro-batch's own count.
    """
    adds = num_items is not None
    steps = trainer.current_gradient_accumulation_steps if adds else 1
    kept, sharers = tokens.kept.sum(), 1
    if trainer.threshold.normalize == "kept":
        kept, sharers = _over_sequences(trainer.accelerator, kept)
    elif adds and trainer.args.average_tokens_across_devices:
        sharers = trainer.accelerator.num_processes // trainer.get_tp_size()
    targets = num_items if num_items is not None else tokens.is_target.sum()
    loss = mean_cost(tokens.cost, kept, trainer.threshold, targets, steps) * sharers
    if not trainer.aux_loss_enabled or tokens.aux_loss is None:
        return loss
    return loss + trainer.router_aux_loss_coef * tokens.aux_loss / steps


def _over_sequences(accelerator: Any, count: Tensor) -> tuple[Tensor, int]:
    """Return a count over the processes that a micro-batch's sequences are cut up over, and how many these are."""
    parallelism = accelerator.parallelism_config
    if parallelism is None or not parallelism.cp_enabled:
        return count, 1
    mesh = accelerator.torch_device_mesh["cp"]
    torch.distributed.all_reduce(count, group=mesh.get_group())
    return count, mesh.size()


def progress_of(state: TrainerState, before: int = 0) -> float:
    """Return the share of training that is done, 0 to 1; or was done `before` steps ago."""
    return max(state.global_step - before, 0) / state.max_steps if state.max_steps > 0 else 0.0


@contextmanager
def explains_lost_images(max_length: int | None) -> Iterator[None]:
    """Say what to do where a batch has images whose tokens `max_length` has truncated."""
    try:
        yield
    except ValueError as error:
        if max_length is None or "Image features and image tokens do not match" not in str(error):
            raise
        raise RecipeError(
            f"Cannot compute the loss: `max_length: {max_length}` truncates the tokens of an image. Raise it, or write "
            "`max_length: null`."
        ) from error
