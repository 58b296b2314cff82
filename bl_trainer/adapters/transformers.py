"""Any objective in `transformers.Trainer`, and in trainers derived from it that call their `compute_loss_func`."""

from typing import Any

from torch import Tensor

from .._standin import as_loss
from ..errors import LossError, RecipeError
from .contract import refuse_settings, refuse_split_rows, with_targets


def attach(trainer: Any, objective: Any, threshold: Any = None) -> None:
    """Make a `transformers.Trainer` minimise an objective: its mean cost over the targets of the whole optimizer step.

    `objective`, `threshold`: as in a recipe. Call it before `trainer.train()`. The first token of a row, and of each example
    of a packed row, is no target. Raises ValueError on settings under which the trainer would minimise something else.
    """
    if trainer.compute_loss_func is not None:
        raise RecipeError("Cannot attach an objective: the trainer has a `compute_loss_func` already. Turn off its other loss.")
    trainer.compute_loss_func = TrainerLoss(trainer, trainer.args, objective, threshold)


class TrainerLoss:
    """A trainer's `compute_loss_func`: an objective's mean cost, at the trainer's progress.

    It wraps the trainer's `get_batch_samples`, for labels whose targets are counted as the loss counts them, and `compute_loss`,
    to raise LossError before a step with another loss.
    """

    adds_router_loss = False  # whether the trainer adds a router's auxiliary loss itself

    def __init__(self, trainer: Any, args: Any, objective: Any, threshold: Any = None):
        refuse_settings(args)
        self.loss, self.trainer, self.calls = as_loss(objective, threshold), trainer, 0
        collect, compute = trainer.get_batch_samples, trainer.compute_loss

        def get_batch_samples(iterator: Any, *args: Any, **kwargs: Any) -> Any:
            refuse_split_rows(trainer)
            return collect(map(with_targets, iterator), *args, **kwargs)

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            before, loss = self.calls, compute(*args, **kwargs)
            if self.calls == before:
                name = type(trainer).__name__
                raise LossError(f"Cannot train the objective: {name} computes a loss of its own. Turn off its other loss.")
            return loss

        trainer.get_batch_samples, trainer.compute_loss = get_batch_samples, compute_loss
        trainer.loss_is_scaled_for_ga = True

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        self.calls += 1
        args, state = self.trainer.args, self.trainer.state
        if getattr(outputs, "aux_loss", None) is not None and not self.adds_router_loss:
            raise LossError("Cannot add the router's auxiliary loss to an objective. Set `output_router_logits: false`.")
        if num_items_in_batch is None and self.trainer.model.training and args.gradient_accumulation_steps * args.world_size > 1:
            raise LossError("Cannot average over the step: the trainer did not count its targets. Update transformers.")
        progress = state.global_step / state.max_steps if state.max_steps > 0 else 0.0
        return self.loss(outputs, labels, num_items_in_batch, progress=progress)
