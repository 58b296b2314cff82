"""What prices the tokens of a loss, and the sum that it makes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._util.text import nearest
from ..errors import LossError
from ..head.ops import TokenCosts
from ..objectives.objective import Objective
from ..objectives.pricing import LOSS_WEIGHT, Price, mean_cost, price
from ..objectives.threshold import Threshold

COLUMNS = ("ref_logp", "is_special", LOSS_WEIGHT)  # that a caller may give of each token
GIVEN = (*COLUMNS, "entropy", "log_sum_sq_probs", "is_top1")  # and to `per_token`, which has log p alone
SPLIT_BATCH = "DataParallel splits a batch after its targets are counted. Start a process per GPU with `torchrun`."


@dataclass(frozen=True)
class Pricing:
    """What prices tokens. Raises LossError on an objective or threshold that can't be used outside of `BLTrainer`."""

    objective: Objective
    threshold: Threshold
    progress: float | Callable[[], float] | None

    @classmethod
    def read(cls, objective: Any, threshold: Any, progress: Any) -> "Pricing":
        read = cls(Objective.parse(objective), Threshold.parse(threshold), progress)
        if not read.threshold.resolved:
            raise LossError(
                f"Cannot use `above_percentile: {read.threshold.above_percentile:g}` here: the percentile is not measured. Run "
                "`bl-trainer diagnose --model MODEL --data DATA.jsonl --report DIR`, and give the p that it reports as `above`."
            )
        if "progress" in read.objective.statistics and progress is None:
            raise LossError(
                f"Cannot use objective {read.objective.name!r} without training progress: its cost depends on it. Give "
                "`progress`, a number from 0 to 1 or a function that returns the number."
            )
        return read

    @property
    def extras(self) -> tuple[str, ...]:
        return tuple({"log_sum_sq_probs"} & set(self.objective.statistics))

    def now(self) -> dict[str, float]:
        """Return training progress, where the objective asks for it."""
        if "progress" not in self.objective.statistics:
            return {}
        progress: Any = self.progress() if callable(self.progress) else self.progress
        if not isinstance(progress, Real) or not 0 <= float(progress) <= 1:
            raise LossError(
                f"Cannot use training progress {progress!r}: it is no number from 0 to 1. Give the share of steps done."
            )
        return {"progress": float(progress)}

    def check_given(
        self, given: Mapping[str, Any], allowed: tuple[str, ...], shape: torch.Size, others: tuple[str, ...] = ()
    ) -> None:
        """Raise LossError unless `given` are per-token tensors of this shape, and all that the objective needs.

        `others`: further arguments that a misspelled name may mean.
        """
        for name, value in given.items():
            if name not in allowed:
                near = nearest(name, (*allowed, *others))
                raise LossError(f"Unknown argument {name!r}.{near} Per-token tensors: {', '.join(allowed)}.")
            if not isinstance(value, Tensor) or value.shape != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise LossError(
                    f"Cannot use `{name}`: it is {got}, not of the labels' shape {tuple(shape)}. Give one per label."
                )
            if name in ("is_special", "is_top1") and value.dtype != torch.bool:
                raise LossError(f"Cannot use `{name}`: it is {value.dtype}. Give a bool tensor.")
            if name == LOSS_WEIGHT and not ((value >= 0) & value.isfinite()).all():
                raise LossError(f"Cannot use `{name}`: a weight is below 0, infinite, or no number. Give weights from 0 up.")
        lacking = [name for name in allowed if name in self.objective.statistics and name not in given]
        if lacking:
            raise LossError(
                f"Cannot price tokens: objective {self.objective.name!r} needs {' and '.join(map(repr, lacking))}. Pass "
                f"`{lacking[0]}=`, a tensor of the shape of the labels, or train with `BLTrainer`."
            )

    def pricer(self) -> Callable[[dict[str, Tensor]], Price]:
        """Return what prices a block of tokens by their statistics."""
        now = self.now()
        return lambda statistics: price(self.objective, self.threshold, {**statistics, **now})

    def mean(self, costs: TokenCosts, num_items: Any, micro_batches: Any) -> Tensor:
        """Return the loss to minimise; see `as_loss`."""
        if num_items is not None and not _is_count(num_items):
            raise LossError(
                f"Cannot compute the loss: the number of items is {num_items!r}. Give the number of targets, or None."
            )
        targets = torch.as_tensor(len(costs.cost) if num_items is None else num_items)
        if targets.numel() != 1:
            raise LossError(f"Cannot compute the loss: the number of items has shape {tuple(targets.shape)}. {SPLIT_BATCH}")
        adds = num_items is not None or micro_batches is not None
        steps = 1
        if self.threshold.normalize == "kept" and adds and torch.is_grad_enabled():  # in evaluation losses are not added
            steps = _number_of(micro_batches)
        return mean_cost(costs.cost, costs.kept.sum(), self.threshold, targets.reshape(()), steps)


def _is_count(number: Any) -> bool:
    """Whether `number` is finite and 0 or above. Of a tensor on a device the type alone is read, which waits for nothing."""
    if isinstance(number, Tensor):
        is_number = number.dtype != torch.bool and not number.is_complex()
        return is_number and (number.device.type != "cpu" or bool(((number >= 0) & number.isfinite()).all()))
    return isinstance(number, Real) and not isinstance(number, bool) and isfinite(number) and float(number) >= 0


def _number_of(micro_batches: Any) -> int:
    if micro_batches is None:
        raise LossError(
            "Cannot divide by kept tokens: the trainer accumulates micro-batches, and their number is not known. Give "
            "`micro_batches`, or write `normalize: tokens`."
        )
    number: Any = micro_batches() if callable(micro_batches) else micro_batches
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise LossError(
            f"Cannot divide by {number!r} micro-batches. Give an integer of at least 1 as `micro_batches`, or a function that "
            "returns one."
        )
    return number
