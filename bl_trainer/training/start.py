"""What a run says of itself before its first step: one line, and where its loss is another number than `nll`."""

from collections.abc import Iterator
from typing import Any

import pyarrow.compute
from datasets import Dataset

from ..tokens.labels import columns_of, plain
from ..tokens.names import REFERENCE, WEIGHT

COUNTED = 200_000  # rows at most whose tokens are counted, which takes a moment


def say_start(trainer: Any, steps: int) -> None:
    """Print what a trainer trains, in one line, then what its loss depends on besides. `steps`: of the whole run."""
    for line in _lines(trainer, steps):
        trainer.accelerator.print(line)


def _lines(trainer: Any, steps: int) -> Iterator[str]:
    head = "bl_trainer's own" if trainer.reference_head is None else f"TRL's, since {trainer.reference_head}"
    threshold = f"{'' if trainer.threshold.keeps_all else 'threshold '}{trainer.threshold}"
    what = f"objective {trainer.parsed_objective}, {threshold}, loss head {head}"
    accelerator = trainer.accelerator
    many = accelerator.num_processes
    devices = f"{many} {accelerator.device.type} {'process' if many == 1 else 'processes'}"
    yield f"Training: {what}; {_size(trainer.train_dataset)}, {steps:,} step{'' if steps == 1 else 's'} on {devices}."
    if trainer.kept_rows is not None:
        said = trainer.kept_rows.record
        yield f"Rows: {said['dropped']:,} of {said['rows']:,} dropped by {said['rule']}."
    if trainer.reference is not None:
        source = f"the column `{REFERENCE}`" if trainer.reference == "column" else "the model without its adapter"
        yield f"Reference: {source}."
    weighs = trainer.train_dataset is not None and WEIGHT in columns_of(trainer.train_dataset)
    if weighs:
        yield f"Weights: `{WEIGHT}`, and those of messages and tokens, multiply the costs of tokens."
    reasons = _differences(trainer, weighs)
    if reasons:
        yield f"`loss` is not `nll` here: {'; '.join(reasons)}."


def _differences(trainer: Any, weighs: bool) -> list[str]:
    """Return why the logged loss of `objective: nll` is another number than `nll`; of other objectives nobody expects it."""
    if trainer.parsed_objective.to_dict() != {"name": "nll"}:
        return []
    reasons = {
        "it has the auxiliary loss of the experts": trainer.aux_loss_enabled and trainer.router_aux_loss_coef,
        "the threshold drops tokens from it": not trainer.threshold.keeps_all,
        f"`{WEIGHT}` multiplies its tokens": weighs,
    }
    return [reason for reason, holds in reasons.items() if holds]


def _size(dataset: Any) -> str:
    """Return a data set's rows, and its tokens where they are counted at once; of a stream nobody knows them."""
    rows = plain(dataset)
    if not isinstance(rows, Dataset):
        return "streamed rows"
    size = f"{len(rows):,} rows"
    if "input_ids" not in rows.column_names or len(rows) > COUNTED:
        return size
    parts = rows.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
    tokens = sum(pyarrow.compute.sum(pyarrow.compute.list_value_length(part["input_ids"])).as_py() for part in parts)
    return f"{size} of {tokens:,} tokens"
