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
        if args.task_type != "causal_lm":
            raise RecipeError(f"Cannot train the objective: it is no loss of `task_type: {args.task_type}`.")
        if args.enable_dft_loss:
            raise RecipeError("Cannot train two losses at once. Set `enable_dft_loss: false`.")
        super().__init__(trainer, args, objective, threshold)

    def __call__(
        self, outputs: Any, labels: Tensor, *, num_items_in_batch: Any = None, loss_scale: Any = None, **kwargs: Any
    ) -> Tensor:
        """Return the loss; `labels` are unshifted. Raises LossError on ms-swift's own weights of tokens."""
        if loss_scale is not None:
            raise LossError("Cannot train the objective: `loss_scale` weighs tokens of its own. Set `loss_scale: default`.")
        return super().__call__(outputs, labels, num_items_in_batch)
