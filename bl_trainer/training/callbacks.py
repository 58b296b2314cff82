"""What a run does as it begins, and what ends it before its last step: SIGTERM, and a loss that is not finite."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from .._util.tensors import local
from .._util.transformers import jit_checkpoint_callback
from ..errors import LossError
from .start import say_start


class StopOnSigterm(TrainerCallback):
    """Saves a checkpoint and stops at the end of the step, or evaluation, in which any process got SIGTERM.

    In place of transformers' callback of `enable_jit_checkpoint`. That one saves in the middle of a step, so a resumed run
    draws other random numbers, and lets each process choose its own step. Does nothing without `enable_jit_checkpoint`.
    """

    def __init__(self, accelerator: Any, args: Any):
        self.accelerator, self.received, self.stopped = accelerator, False, False
        self.enabled = getattr(args, "enable_jit_checkpoint", False)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM for a request; what it meant before holds again afterwards."""
        self.received = self.stopped = False
        if not self.enabled:
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def take_over(self, trainer: Any, previous: Any) -> None:
        """Take the place of transformers' callback, which has replaced the `previous` handler of SIGTERM."""
        if self.enabled:
            trainer.remove_callback(jit_checkpoint_callback)
            signal.signal(signal.SIGTERM, previous)
            trainer.add_callback(self)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor(int(self.received), device=self.accelerator.device)
        if self.accelerator.reduce(received, reduction="sum"):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        if not self.stopped:
            self.on_step_end(args, state, control)

    def on_save(self, args, state, control, **kwargs):
        if self.stopped:  # lest transformers, at the end of training, delete all checkpoints but the best
            state.best_model_checkpoint = None


class RefuseNonfinite(TrainerCallback):
    """Raises LossError before an optimizer step that a gradient which is not finite would break the weights with."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        if args.fp16 or not gradients:  # whose scaler leaves such steps out; DeepSpeed, which keeps them to itself
            return
        flags: dict[torch.device, list[Tensor]] = {}  # of a model that is spread over several devices
        for gradient in gradients:
            flags.setdefault(gradient.device, []).append(gradient.isfinite().all())
        if not all(torch.stack(each).all() for each in flags.values()):
            raise LossError(
                f"The gradient of step {state.global_step + 1} is not finite, and the step is not made. Lower `learning_rate`, "
                "or keep the least probable tokens out by a small `threshold`."
            )


def refuse_nonfinite(loss: Tensor, step: int, rows: Tensor | None, model: Any, process: int) -> None:
    """Raise LossError if `loss` of the micro-batch that holds `rows` in optimizer step `step` is NaN or infinite.

    `rows` is None where they have no numbers: images, and sets that are prepared already. Of a sharded model this process's
    share of the weights is looked at.
    """
    if loss.isfinite():
        return
    broken = [name for name, parameter in model.named_parameters() if not local(parameter).isfinite().all()]
    where = (
        f"{len(broken)} of the model's weights are not finite either, from {broken[0]} on, so an earlier step broke them: "
        "lower `learning_rate`, or see whether `grad_norm` was finite"
        if broken
        else "The model's weights, as far as they are on this process, are finite: look at these rows and at the objective"
    )
    numbers = (
        "unknown rows" if rows is None else f"the rows {', '.join(str(row) for row in rows.flatten().tolist() if row >= 0)}"
    )
    raise LossError(
        f"The loss is {loss.item()} in step {step} on process {process}, whose micro-batch holds {numbers} of the "
        f"training set, counted from 0. {where}."
    )


class BeginTraining(TrainerCallback):
    """Verifies the loss head, measures a percentile threshold, says what trains and begins to count: the model is in place.

    `steps`: that this process has made in this call of `train`.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.steps = trainer, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = 0  # again: `auto_find_batch_size` begins anew after a failed step
        state.compute_steps(args, state.max_steps)  # a checkpoint's state has those of its own run
        self.trainer.ensure_verified()
        self.trainer.resolve_threshold()
        say_start(self.trainer, state.max_steps)
        self.trainer.begin_counting()  # after a measurement, which reads a stream too

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
