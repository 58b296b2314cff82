"""What a trainer must keep for its gradient to be that of the objective's mean cost over an optimizer step's targets."""

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._util.bitsandbytes import keep_trainable
from .._util.logs import warn_once
from ..errors import LossError, RecipeError
from ..head.targets import IGNORED, are_shifted
from ..losses.metrics import compares_models, own_targets
from ..losses.pricing import SPLIT_BATCH
from ..objectives import Objective, Threshold
from ..objectives.pricing import METRICS
from ..tokens.names import TOKEN_WEIGHT, WEIGHT

WEIGHTS = (WEIGHT, TOKEN_WEIGHT)  # columns that only `BLTrainer` reads
UNREAD = "only `BLTrainer` weights rows and tokens. Remove it, or use `BLTrainer`."
REPEATED = (
    "The metrics of an evaluation may count some rows twice: accelerate repeats rows to fill the last batch of all processes, "
    "and here they can't be told from the others. Evaluate in one process for exact means."
)


def refuse_settings(args: Any, objective: Objective, threshold: Threshold) -> None:
    """Raise RecipeError if `args`, transformers' `TrainingArguments`, change the loss or its average, or choose by it.

    It lists all mistakes.
    """
    mistakes = []
    if smoothing := getattr(args, "label_smoothing_factor", 0):
        mistakes.append(f"`label_smoothing_factor: {smoothing}` is a loss of its own. Set it to 0.")
    if args.n_gpu > 1:
        mistakes.append(SPLIT_BATCH)
    if args.world_size > 1 and not args.average_tokens_across_devices:
        mistakes.append("each process would average over its own targets. Set `average_tokens_across_devices: true`.")
    mistakes = [f"Cannot train the objective: {mistake}" for mistake in mistakes] + _wrong_choice(args, objective, threshold)
    if mistakes:
        raise RecipeError("\n".join(mistakes))


def _wrong_choice(args: Any, objective: Objective, threshold: Threshold) -> list[str]:
    """Return what is wrong with the metric that chooses checkpoints, or the learning rate under `reduce_lr_on_plateau`."""
    metric = args.metric_for_best_model or ""
    if args.eval_strategy == "no":  # ms-swift names a metric always
        return []
    if metric.endswith("loss") and not compares_models(objective, threshold):
        return [
            f"Cannot choose by `metric_for_best_model: {metric}`: only the loss of `objective: nll` without `threshold` tells "
            "the better model. Set `metric_for_best_model: nll` and `greater_is_better: false`."
        ]
    if metric.endswith("nll") and args.greater_is_better:
        return [f"Cannot choose by the highest `{metric}`: the lowest is the best. Set `greater_is_better: false`."]
    return []


def refuse_split_rows(trainer: Any) -> None:
    """Raise RecipeError if each process of `trainer` sees a part of a row, as under context and sequence parallelism."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (getattr(parallelism, "cp_enabled", False) or getattr(parallelism, "sp_enabled", False)):
        raise RecipeError("Cannot train the objective: parallelism splits a row at targets. Set `cp_size` and `sp_size` to 1.")


def refuse_weights(trainer: Any, looked: set[int]) -> None:
    """Raise RecipeError if a data set of `trainer` has a column of weights, which it would drop or give to the model.

    `looked`: ids of the sets whose first row has been looked at, since they name no columns; it is added to.
    """
    for kind in ("train", "eval"):
        found = getattr(trainer, f"{kind}_dataset", None)
        for dataset in found.values() if isinstance(found, dict) else [found]:
            columns = getattr(dataset, "column_names", None) or _keys_of_first(dataset, looked)
            for column in WEIGHTS:
                if column in columns:
                    raise RecipeError(f"Cannot use the column `{column}` of the {kind} set: {UNREAD}")


def _keys_of_first(dataset: Any, looked: set[int]) -> Collection[str]:
    """Return the keys of the first row of a stream, or of a set of the user's own class.

    None the second time, nor of what can be read once only, which would lose the row.
    """
    if dataset is None or id(dataset) in looked:
        return ()
    looked.add(id(dataset))
    rows = iter(dataset)
    row = None if rows is iter(dataset) else next(rows, None)
    return row.keys() if isinstance(row, Mapping) else ()


def refuse_aligned(model: Any) -> None:
    """Raise RecipeError if `model` is an encoder-decoder, whose logits at t predict the label at t."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RecipeError("Cannot train the objective: the model is an encoder-decoder. Use a causal language model.")


def watch(trainer: Any, loss: Any) -> None:
    """Make `trainer` keep to `loss`: its batches, its own loss, its evaluation, and its log.

    Labels are checked and corrected by `with_targets` before the trainer counts them, and 4-bit weights stay trainable. A loss
    that the trainer computes without calling `loss` is a LossError before its gradient is taken. The log gets `loss.metrics`.
    """
    collect, compute, log = trainer.get_batch_samples, trainer.compute_loss, trainer.log
    loop, predict = trainer.evaluation_loop, trainer.prediction_step
    looked: set[int] = set()

    def get_batch_samples(batches: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        refuse_split_rows(trainer)
        refuse_weights(trainer, looked)
        refuse_aligned(trainer.model)
        keep_trainable(trainer.model)  # here and below: a trainer may have no model yet when it makes its loss
        return collect(map(with_targets, batches), *args, **kwargs)

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        before, found = loss.calls, compute(*args, **kwargs)
        if loss.calls == before:
            name = type(trainer).__name__
            raise LossError(f"Cannot train the objective: {name} computes a loss of its own. Turn off its other loss.")
        return found

    def evaluation_loop(*args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        keep_trainable(trainer.model)
        refuse_weights(trainer, looked)
        loss.forget("eval")  # what a failed evaluation has left
        with refusing_clashes(trainer, metric_key_prefix):
            output = loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = loss.metrics("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "labels" in inputs:
            inputs = without_repeats(trainer, with_targets(inputs))
        return predict(model, inputs, *args, **kwargs)

    def logged(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(loss.metrics("train"))
        log(logs, *args, **kwargs)

    trainer.get_batch_samples, trainer.compute_loss, trainer.log = get_batch_samples, compute_loss, logged
    trainer.evaluation_loop, trainer.prediction_step = evaluation_loop, prediction_step
    trainer.loss_is_scaled_for_ga = True


@contextmanager
def refusing_clashes(trainer: Any, prefix: str) -> Iterator[None]:
    """Raise RecipeError if the trainer's `compute_metrics` returns a metric of the objective's own name."""
    compute: Any = getattr(trainer, "compute_metrics", None)

    def checked(*args: Any, **kwargs: Any) -> Any:
        found = compute(*args, **kwargs)
        for name in (*METRICS, "loss"):
            for key in (name, f"{prefix}_{name}"):
                if key in (found or {}):
                    raise RecipeError(f"Cannot report `{key}` twice: `compute_metrics` returns it too. Rename its metric.")
        return found

    if compute is None:
        yield
        return
    trainer.compute_metrics = checked
    try:
        yield
    finally:
        trainer.compute_metrics = compute


def with_targets(batch: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Return a collated batch whose labels leave out the first token of each example, which nothing predicts.

    An example begins with a row, at `position_ids` 0, and where the number in `attention_mask` changes. Raises LossError if
    the labels stand a place before their tokens, since the loss would shift them a second time; and on weights.
    """
    if found := next((column for column in WEIGHTS if column in batch), None):
        raise LossError(f"Cannot use `{found}` of a batch: {UNREAD}")
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        raise LossError("Cannot train the objective: a batch has no `labels` of shape (rows, length). Check the data collator.")
    tokens, is_target = batch.get("input_ids"), labels != IGNORED
    batch.pop("shift_labels", None)  # transformers would count these
    if tokens is not None and tokens.shape == labels.shape and are_shifted(tokens, labels):
        raise LossError("Cannot train the objective: `labels` are shifted already. Let the data collator leave them unshifted.")
    begins = torch.zeros_like(is_target)
    begins[:, 0] = True
    positions, examples = batch.get("position_ids"), batch.get("attention_mask")
    if positions is not None and positions.shape == labels.shape:
        begins |= positions == 0
    if examples is not None and examples.shape == labels.shape:
        begins[:, 1:] |= examples[:, 1:] != examples[:, :-1]
    batch["labels"] = labels.masked_fill(begins, IGNORED)
    return batch


def without_repeats(trainer: Any, batch: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Return a batch of an evaluation without targets in the rows that accelerate repeats to fill the last batch.

    It warns where they can't be told from others: of a stream of unknown length, and of packed rows that are joined to one.
    """
    labels, accelerator = batch["labels"], trainer.accelerator
    joined, state = trainer.args.per_device_eval_batch_size, accelerator.gradient_state
    lengths = example_lengths(batch) if len(labels) == 1 < joined else None
    is_unknown = lengths is not None and len(lengths) != joined
    is_unknown |= state.remainder < 0 and not trainer.args.dataloader_drop_last
    if accelerator.num_processes > 1 and state.end_of_dataloader and is_unknown:
        warn_once(REPEATED)
    counted = own_targets(accelerator, labels != IGNORED, None if is_unknown else lengths)
    batch["labels"] = labels.masked_fill(~counted, IGNORED)
    return batch


def example_lengths(batch: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens of each example of a padding-free batch, whose one row holds them all; None if it has no positions."""
    positions = batch.get("position_ids")
    if positions is None or positions.shape != batch["labels"].shape:
        return None
    begins = (positions[0] == 0).nonzero()[:, 0]
    return torch.diff(begins, append=begins.new_tensor([positions.shape[1]]))
