"""Any objective in `transformers.Trainer`, and in trainers derived from it that call their `compute_loss_func`."""

from typing import Any

from torch import Tensor

from .._util.bitsandbytes import keep_trainable
from ..errors import LossError, RecipeError
from ..losses import as_loss
from ..losses.metrics import loss_of
from ..objectives.pricing import METRICS
from .contract import refuse_settings, refuse_weights, watch


def attach(trainer: Any, objective: Any, threshold: Any = None) -> None:
    """Make a `transformers.Trainer` minimise an objective: its mean cost over the targets of the whole optimizer step.

    `objective`, `threshold`: as in a recipe. Call it before `trainer.train()`. The first token of a row, and of each example
    of a packed row, is no target. Raises ValueError on settings under which the trainer would minimise something else, and on
    columns of weights, which only `BLTrainer` reads.
    """
    if (kind := getattr(trainer.args, "loss_type", None)) not in (None, "nll", "chunked_nll"):  # TRL's trainers have others
        raise RecipeError(f"Cannot train two losses at once: `loss_type: {kind}` is another. Remove it.")
    if trainer.compute_loss_func is not None:
        raise RecipeError("Cannot attach an objective: the trainer has a `compute_loss_func` already. Turn off its other loss.")
    refuse_weights(trainer, set())
    keep_trainable(trainer.model)
    trainer.compute_loss_func = TrainerLoss(trainer, trainer.args, objective, threshold)


class TrainerLoss:
    """A trainer's `compute_loss_func`: an objective's mean cost at the trainer's progress, and the metrics that it logs."""

    adds_router_loss = False  # whether the trainer adds a router's auxiliary loss itself

    def __init__(self, trainer: Any, args: Any, objective: Any, threshold: Any = None):
        self.trainer, self.calls = trainer, 0
        self.loss = as_loss(objective, threshold, progress=self._progress, micro_batches=self._micro_batches)
        refuse_settings(args, self.loss.objective, self.loss.threshold)
        watch(trainer, self)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        self.calls += 1
        if getattr(outputs, "aux_loss", None) is not None and not self.adds_router_loss:
            raise LossError("Cannot add the router's auxiliary loss to an objective. Set `output_router_logits: false`.")
        if num_items_in_batch is None and self.trainer.model.training and self._micro_batches() > 1:
            raise LossError("Cannot average over the step: the trainer did not count its targets. Update transformers.")
        return self.loss(outputs, labels, num_items_in_batch)

    def metrics(self, mode: str) -> dict[str, float]:
        """Return what `BLTrainer` logs of `train` or `eval`, over all processes, since the last call.

        Of `eval` with the loss, without a router's: transformers' own is a mean of the means of batches, which a batch of few
        targets would bias.
        """
        found = self.loss.metrics(mode, self.trainer.accelerator.reduce)
        made = {name: value for name, value in found.items() if name in METRICS}
        if mode == "eval" and found:
            made["loss"] = loss_of(found, self.loss.threshold)
        return made

    def forget(self, mode: str) -> None:
        """Drop what was measured since the last log."""
        self.loss.metrics(mode)

    def _progress(self) -> float:
        state = self.trainer.state
        return state.global_step / state.max_steps if state.max_steps > 0 else 0.0

    def _micro_batches(self) -> int:
        args = self.trainer.args
        return getattr(self.trainer, "current_gradient_accumulation_steps", args.gradient_accumulation_steps) * args.world_size
