"""What losses report: exact means over target tokens, summed on the device and fetched once."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..head.ops import TokenCosts
from ..objectives.objective import Objective
from ..objectives.pricing import METRICS
from ..objectives.threshold import Threshold

MEANS = (*METRICS, "objective")


class TokenSums:
    """Sums over target tokens, by name and by mode (`train`, `eval`), on the tokens' device."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, mode: str, values: Mapping[str, Tensor], counted: Tensor) -> None:
        """Add the tokens that are `counted`, bool; `values`: of its shape, or () for what all have in common.

        A value that one micro-batch lacks has no sum. Sums are in float64, on MPS in float32.
        """
        wide = torch.float32 if counted.device.type == "mps" else torch.float64
        with torch.no_grad():
            found = {name: torch.where(counted, each, each.new_zeros(())).sum(dtype=wide) for name, each in values.items()}
            found["tokens"] = counted.sum(dtype=wide)
            before = self._sums.get(mode)
            if before is not None:
                found = {name: total + found[name] for name, total in before.items() if name in found}
            self._sums[mode] = found

    def clear(self, mode: str) -> None:
        """Forget the sums of `mode`."""
        self._sums.pop(mode, None)

    def pop(self, mode: str, reduce: Callable[[Tensor], Tensor] | None = None, **others: Tensor | int) -> dict[str, float]:
        """Return the sums of `mode` and of `others` by name, and the number of `tokens`; forget them. One synchronisation.

        Empty without a micro-batch. `reduce` sums a tensor over processes. Then every process must call this.
        """
        sums = self._sums.pop(mode, None)
        if sums is None:
            return {}
        wide = sums["tokens"]
        sums = {**sums, **{name: torch.as_tensor(each).to(wide) for name, each in others.items()}}
        total = torch.stack([*sums.values()])
        return dict(zip(sums, (total if reduce is None else reduce(total)).tolist(), strict=True))


def mean_of(total: float, tokens: float) -> float:
    """Return a mean over target tokens, NaN if there is none."""
    return total / tokens if tokens else torch.nan


def loss_of(means: Mapping[str, float], threshold: Threshold) -> float:
    """Return the loss that training minimises, of means over target tokens: per kept token under `normalize: kept`."""
    if threshold.normalize != "kept":
        return means["objective"]
    return means["objective"] / means["kept_fraction"] if means["kept_fraction"] else 0.0


def compares_models(objective: Objective, threshold: Threshold) -> bool:
    """Whether the lower loss tells the better model: NLL's itself over all targets, which no other is."""
    return objective.to_dict() == {"name": "nll"} and threshold.keeps_all


def own_targets(accelerator: Any, is_target: Tensor, example_lengths: Tensor | None) -> Tensor:
    """Mask out the examples that accelerate repeats to fill the last batch of an evaluation on several processes.

    `is_target`: bool (batch, length). `example_lengths`: tokens of each example of a batch whose one row holds them all, none
    where it is unknown which tokens are whose. Returns the targets that count. Raises RecipeError where it can't tell them.
    """
    state, parallelism = accelerator.gradient_state, getattr(accelerator, "parallelism_config", None)
    sharers = parallelism.non_data_parallel_size if parallelism is not None else 1  # processes that get the same examples
    repeats = accelerator.num_processes > sharers and accelerator.even_batches
    if not repeats or not state.end_of_dataloader or state.remainder <= 0:
        return is_target
    if example_lengths is not None and not len(example_lengths):
        raise RecipeError(
            f"Cannot evaluate on {accelerator.num_processes} processes: accelerate repeats examples to fill the last batch. "
            "Nothing tells which tokens of the `data_collator`'s rows are theirs. Let it give one row per example, or one row "
            "of all examples without padding."
        )
    examples = len(is_target) if example_lengths is None else len(example_lengths)
    own = min(max(state.remainder - accelerator.process_index // sharers * examples, 0), examples)
    is_own = torch.zeros_like(is_target)
    if example_lengths is None:
        is_own[:own] = True
    else:
        is_own[:, : int(example_lengths[:own].sum())] = True
    return is_target & is_own


class LossMetrics:
    """Sum what losses report over target tokens, on their device, and hand out exact means.

    A loss adds to `train` where gradients are on, and to `eval` under `no_grad`.
    """

    def __init__(self) -> None:
        self._sums = TokenSums()

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add target tokens. `values`: per token, (N,) each, `nll` and what else is known of `METRICS` and `objective`."""
        everywhere = torch.ones_like(values["nll"], dtype=torch.bool)
        self._sums.add("train" if torch.is_grad_enabled() else "eval", values, everywhere)

    def add_costs(self, costs: TokenCosts) -> None:
        """Add the target tokens that a loss head has priced."""
        scores = costs.scores
        values = (-scores.logp, scores.logp.exp(), costs.kept, costs.weight, scores.entropy, costs.is_top1, costs.cost)
        self.add(dict(zip(MEANS, values, strict=True)))

    def pop(self, mode: str = "train", reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the means over target tokens since the last call, and forget them.

        They are `METRICS` and `objective`, the mean of f, in the units that `BLTrainer` reports, as far as they are known of
        all tokens. The result is empty without a micro-batch; means are NaN if none had a target.

        Args:
            mode: `train` or `eval`.
            reduce: Sums a tensor over processes, such as `accelerator.reduce`. Then call this on every process.
        """
        sums = self._sums.pop(mode, reduce)
        tokens = sums.pop("tokens", 0)
        return {name: mean_of(total, tokens) for name, total in sums.items()}
