"""The metrics of a run: exact means over target tokens, summed on the device and fetched once per log."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..losses.metrics import MEANS, TokenSums, loss_of, mean_of
from ..objectives.pricing import METRICS
from ..objectives.threshold import Threshold
from .loss import TokenLoss


class TokenMetrics:
    """
    Sum what a run reports over target tokens, on the device, and hand out the means over all processes.

    `num_tokens` is the number of tokens that training has read, of all processes, as of the last `pop`. `has_met_targets`:
    whether this call of `train` has met a target, as of then.
    """

    def __init__(self, accelerator: Any, sharers: int = 1):
        """`sharers`: processes that read the same tokens, by tensor parallelism."""
        self.accelerator, self.sharers = accelerator, sharers
        self.num_tokens = self._before = 0
        self.has_met_targets = False
        self._read: Tensor | int = 0
        self._sums = TokenSums()

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be fetched."""
        return not self._sums

    def begin(self) -> None:
        """Begin a call of `train`."""
        self._before, self.has_met_targets = self.num_tokens, False

    def restart(self) -> None:
        """Forget what this call of `train` has counted: `auto_find_batch_size` starts again after a failed step."""
        self.clear("train")
        self._read, self.num_tokens = 0, self._before

    def clear(self, mode: str) -> None:
        """Forget the sums of `mode`."""
        self._sums.clear(mode)

    def add(self, mode: str, loss: TokenLoss, counted: Tensor) -> None:
        """Add a micro-batch. `counted`: bool, the shape of `loss.is_target`, which of the targets count."""
        values = (-loss.logp, loss.logp.exp(), loss.kept, loss.weight, loss.entropy, loss.is_top1, loss.cost)
        aux_loss = loss.cost.new_zeros(()) if loss.aux_loss is None else loss.aux_loss
        self._sums.add(mode, {"aux_loss": aux_loss, **dict(zip(MEANS, values, strict=True))}, counted)

    def count(self, inputs: dict[str, Any]) -> None:
        """Count the tokens that a micro-batch of the training set holds, padding apart."""
        mask = inputs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            self._read = self._read + mask.sum()
        elif mask is not None or "position_ids" in inputs:  # padding-free
            self._read = self._read + inputs["input_ids"].numel()
        else:
            raise RecipeError("Cannot count tokens: the batch has neither `attention_mask` nor `position_ids`. Add one.")

    def pop(self, mode: str) -> dict[str, float]:
        """Return the means over all processes' tokens since the last call: `METRICS`, `objective` (f) and `aux_loss`.

        Empty if there was no micro-batch, NaN if none had a target. The one synchronisation per log; call it on every process.
        """
        sums = self._sums.pop(mode, self.accelerator.reduce, read=self._read)
        if not sums:
            return {}
        tokens, read, self._read = sums.pop("tokens"), sums.pop("read"), 0
        self.num_tokens += int(read) // self.sharers
        self.has_met_targets |= mode == "train" and tokens > 0
        return {name: mean_of(total, tokens) for name, total in sums.items()}


EVALUATED = (*METRICS, "loss", "perplexity", "num_tokens", "aux_loss")  # what an evaluation reports or logs


def evaluated(means: dict[str, float], threshold: Threshold, aux_loss_coefficient: float) -> dict[str, float]:
    """Return what an evaluation reports, from `TokenMetrics.pop`: `loss` as training minimises it, and `perplexity`."""
    found = {name: means[name] for name in METRICS}
    loss = loss_of(means, threshold)
    perplexity = torch.tensor(means["nll"], dtype=torch.float64).exp().item()  # infinite where Python would raise
    return {**found, "loss": loss + aux_loss_coefficient * means["aux_loss"], "perplexity": perplexity}


@contextmanager
def owning_names(trainer: Any, prefix: str, names: Collection[str]) -> Iterator[None]:
    """Let a trainer's `compute_metrics` raise RecipeError if it returns one of `names`, with or without `prefix`."""
    given = trainer.compute_metrics

    def computed(*args: Any, **kwargs: Any) -> Any:
        found = given(*args, **kwargs)
        taken = [name for name in found or () if name.removeprefix(f"{prefix}_") in names]
        if taken:
            raise RecipeError(
                f"Cannot evaluate: `compute_metrics` returns `{taken[0]}`, a name of the trainer's own metrics. Rename it."
            )
        return found

    trainer.compute_metrics = given and computed
    try:
        yield
    finally:
        trainer.compute_metrics = given
