"""What ends a run before its last step: SIGTERM, and a loss that is not finite."""

import signal
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import TrainerCallback

ROW = "bl_row"  # number of the training set's row that an example, or with packing a token, comes from
NOT_FOR_THE_MODEL = (ROW, "example_lengths")  # what our collators add to a batch


class LossError(ValueError):
    """The loss is NaN or infinite; the message says where."""


class StopOnSigterm(TrainerCallback):
    """Saves a checkpoint and stops at the end of the step, or evaluation, in which any process got SIGTERM.

    In place of transformers' callback of `enable_jit_checkpoint`, which saves in the middle of a step, so that a resumed run
    draws other random numbers, and lets each process choose its own step.
    """

    def __init__(self, accelerator: Any):
        self.accelerator, self.received, self.stopped = accelerator, False, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor(int(self.received), device=self.accelerator.device)
        if self.accelerator.reduce(received, reduction="sum"):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        if not self.stopped:
            self.on_step_end(args, state, control)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.previous)


def number_rows(dataset: Any) -> Any:
    """Add the column `ROW` to a data set or a stream."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda example, row: {ROW: row}, with_indices=True)
    assert isinstance(dataset, Dataset)
    return dataset.add_column(ROW, list(range(len(dataset))))


def number_tokens(example: dict[str, Any]) -> dict[str, Any]:
    """Turn an example's row into one of each token, which packing cuts and joins as it does the tokens."""
    return {ROW: [example[ROW]] * len(example["input_ids"])}


class RowCollator:
    """A collator that adds to the batch the rows that its examples come from: (batch, most rows of one), filled up with -1."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator([{key: value for key, value in each.items() if key != ROW} for each in features])
        if ROW in features[0]:
            rows = [each[ROW] if isinstance(each[ROW], list) else [each[ROW]] for each in features]
            distinct = [torch.tensor(sorted(set(each))) for each in rows]
            batch[ROW] = torch.nn.utils.rnn.pad_sequence(distinct, batch_first=True, padding_value=-1)
        return batch


def refuse_nonfinite(loss: Tensor, step: int, rows: Tensor, model: Any, process: int) -> None:
    """Raise LossError if `loss` of the micro-batch that holds `rows` in optimizer step `step` is NaN or infinite."""
    if loss.isfinite():
        return
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    where = (
        f"{len(broken)} of the model's weights are not finite either, from {broken[0]} on, so an earlier step broke them: "
        "lower `learning_rate`, or see whether `grad_norm` was finite"
        if broken
        else "The model's weights are finite: look at these rows and at the objective"
    )
    numbers = ", ".join(str(row) for row in rows.flatten().tolist() if row >= 0)
    raise LossError(
        f"The loss is {loss.item()} in step {step} on process {process}, whose micro-batch holds the rows {numbers} of the "
        f"training set, counted from 0. {where}."
    )
