"""One pass of a trainer's model over target tokens, without gradient.

The pass goes through transformers' evaluation loop, so that the model is placed, wrapped, sharded and cast as in training.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MeasurementError
from ..head.ops import score
from ..head.targets import IGNORED, Targets
from ..tokens.names import NOT_FOR_THE_MODEL


class Observed(NamedTuple):
    """What `ScoringTrainer.observe` has gone through: target tokens of all processes; whether `max_tokens` left some out."""

    num_tokens: int
    is_cut: bool


def measure(
    trainer: Any,
    batches: Iterable[dict[str, Any]],
    observe: Callable[..., None],
    max_tokens: int | None = None,
    name: str = "",
    expected: int | None = None,
) -> Observed:
    """Call `observe(model, batch)` on each of this process's batches, as `ScoringTrainer.observe` does."""
    return trainer.observe(batches, observe, max_tokens=max_tokens, label=name, expected=expected)


class Lockstep:
    """
    Deals a process's batches out in step with all other processes; has no length.

    Stops after the batch with which `max_tokens` target tokens are reached over all processes. A process that runs out of
    batches gets its last one again with no target in it. So all processes make as many forward passes, as sharded models
    need. Raises MeasurementError if a process gets no batch at all. `bar`: of progress, in target tokens.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], accelerator: Any, max_tokens: int | None, bar: Any):
        self.batches, self.accelerator, self.max_tokens, self.bar = batches, accelerator, max_tokens, bar
        self.num_tokens, self.is_cut = 0, False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        last: Any = None
        for batch in itertools.chain(self.batches, itertools.repeat(None)):
            if batch is None and last is None:
                one = self.accelerator.num_processes == 1
                raise MeasurementError(
                    f"{'There is' if one else f'Process {self.accelerator.process_index} got'} no example with a target "
                    f"token. Raise `max_length`, if it cuts all answers off{'' if one else ', or launch fewer processes'}."
                )
            own = 0 if batch is None else int(count_targets(batch))
            tokens, busy = self._sum(own, batch is not None)
            self.is_cut = bool(busy) and self.max_tokens is not None and self.num_tokens >= self.max_tokens
            if not busy or self.is_cut:
                self.bar.total = self.num_tokens  # it was an estimate; a bar that ends at 93 % looks as if some were left out
                self.bar.refresh()
                return
            last = last if batch is None else batch
            self.num_tokens += tokens
            yield dict(last) if batch is not None else without_targets(last)
            self.bar.update(tokens)

    def _sum(self, tokens: int, busy: bool) -> tuple[int, int]:
        if self.accelerator.num_processes == 1:
            return tokens, int(busy)
        counts = torch.tensor([tokens, int(busy)], device=self.accelerator.device)
        first, second = self.accelerator.reduce(counts, reduction="sum").tolist()
        return first, second


def count_targets(batch: dict[str, Any]) -> Tensor:
    """Return the number of target tokens of a collated batch: labels that are not -100, the first column apart."""
    return Targets.of(batch["labels"]).mask.sum()


def without_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with nothing to measure in it."""
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def score_batch(trainer: Any, model: Any, batch: dict[str, Any], use: Callable[..., Any] = score) -> Any:
    """Return `use(hidden, head, target)` of a batch's target tokens."""
    inputs = trainer._prepare_inputs({key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL})
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return model(**inputs, use=use).found
