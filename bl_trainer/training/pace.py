"""How fast a run goes through its training set: what decides its number of steps, and where it resumes."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from .._util.transformers import has_length


@dataclass(frozen=True)
class Pace:
    """
    How fast a run goes through its training set.

    `steps`: of an epoch, None for a stream. `examples`: of a step, on all processes together; a packed row counts as one.
    """

    steps: int | None
    examples: int

    @classmethod
    def of(cls, trainer: Any, loader: Any) -> "Pace":
        """Return the pace of a trainer whose batches come from `loader`, or from none yet."""
        batches = len(loader) if loader is not None and has_length(loader) else None
        accumulation = trainer.args.gradient_accumulation_steps
        steps = None if batches is None else max(math.ceil(batches / accumulation), 1)
        return cls(steps, trainer.get_total_train_batch_size(trainer.args))

    @classmethod
    def resumed(cls, trainer: Any, state: TrainerState) -> "Pace":
        """Return the pace at which a trainer will resume from `state`, and leave the random numbers as they are."""
        if trainer.args.auto_find_batch_size and state.train_batch_size:
            trainer._train_batch_size = state.train_batch_size  # as transformers will
        with torch.random.fork_rng(devices=[]):
            return cls.of(trainer, trainer.get_train_dataloader() if has_length(trainer.train_dataset) else None)

    def length(self, args: TrainingArguments) -> int:
        """Return the number of steps of a run with `args`, 0 if it is unknown."""
        return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * (self.steps or 0))

    def at(self, step: int) -> tuple[int, int]:
        """Return how many epochs are complete after `step`, and how many examples of the next are trained."""
        epochs, rest = divmod(step, self.steps) if self.steps else (0, step)
        return epochs, rest * self.examples
