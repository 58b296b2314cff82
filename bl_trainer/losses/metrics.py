"""What losses report: exact means over target tokens."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..head.ops import TokenCosts
from ..objectives.pricing import METRICS


class LossMetrics:
    """Sum what losses report over target tokens, on their device, and hand out exact means.

    A loss adds to `train` where gradients are on, and to `eval` under `no_grad`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add target tokens. `values`: per token, (N,) each, `nll` and what else is known of `METRICS` and `objective`."""
        mode = "train" if torch.is_grad_enabled() else "eval"
        with torch.no_grad():
            wide = torch.float32 if values["nll"].device.type == "mps" else torch.float64
            found = {name: each.sum(dtype=wide) for name, each in values.items()}
            found["tokens"] = found["nll"].new_full((), values["nll"].numel())
            before = self._sums.get(mode, dict.fromkeys(found, found["nll"].new_zeros(())))
            self._sums[mode] = {name: before[name] + each for name, each in found.items() if name in before}

    def add_costs(self, costs: TokenCosts) -> None:
        """Add the target tokens that a loss head has priced."""
        scores = costs.scores
        values = (-scores.logp, scores.logp.exp(), costs.kept, costs.weight, scores.entropy, costs.is_top1, costs.cost)
        self.add(dict(zip((*METRICS, "objective"), values, strict=True)))

    def pop(self, mode: str = "train", reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the means over target tokens since the last call, and forget them.

        They are `METRICS` and `objective`, the mean of f, in the units that `BLTrainer` reports, as far as they are known of
        all tokens. The result is empty without a micro-batch; means are NaN if none had a target.

        Args:
            mode: `train` or `eval`.
            reduce: Sums a tensor over processes, such as `accelerator.reduce`. Then call this on every process.
        """
        sums = self._sums.pop(mode, None)
        if sums is None:
            return {}
        total = torch.stack([*sums.values()])
        found = dict(zip(sums, (total if reduce is None else reduce(total)).tolist(), strict=True))
        tokens = found.pop("tokens")
        return {name: value / tokens if tokens else torch.nan for name, value in found.items()}
