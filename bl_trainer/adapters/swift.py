"""Any objective in ms-swift: an external plugin calls `register`, and `--loss_type` names what it registered."""

from typing import Any

from torch import Tensor

from ..errors import LossError, RecipeError
from .transformers import TrainerLoss


def register(objective: Any, threshold: Any = None, name: str = "bl_trainer") -> None:
    """Register an objective as ms-swift's `loss_type`, `bl_trainer` by default. `objective`, `threshold`: as in a recipe."""
    from swift.loss import loss_map

    loss_map[name] = lambda args, trainer: SwiftLoss(trainer, args, objective, threshold)


class SwiftLoss(TrainerLoss):
    """ms-swift's loss of causal language models, which it makes before its trainer is ready."""

    adds_router_loss = True

    def __init__(self, trainer: Any, args: Any, objective: Any, threshold: Any = None):
        template = trainer.template
        if template.sequence_parallel_size > 1:
            raise RecipeError("Cannot train the objective: parts of a row are apart. Set `sequence_parallel_size: 1`.")
        if template.task_type != "causal_lm":
            raise RecipeError(f"Cannot train an objective with `task_type: {template.task_type}`. Set `task_type: causal_lm`.")
        if args.enable_dft_loss:
            raise RecipeError("Cannot train two losses at once: `enable_dft_loss` is another. Set it to false.")
        super().__init__(trainer, args, objective, threshold)

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None, *, loss_scale: Any = None, **kwargs: Any
    ) -> Tensor:
        """Return the loss of unshifted `labels`. Raises LossError where ms-swift weighs tokens of its own."""
        if loss_scale is not None:
            raise LossError("Cannot train two weights of a token: `loss_scale` gives others. Set `loss_scale: default`.")
        loss, trainer = super().__call__(outputs, labels, num_items_in_batch), self.trainer
        # ms-swift leaves this factor to the loss where it does not let the model count targets
        unscaled = num_items_in_batch is not None and not trainer.model_accepts_loss_kwargs
        return loss * trainer.accelerator.num_processes if unscaled else loss
