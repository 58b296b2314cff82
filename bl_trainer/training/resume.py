"""What a run may resume from, and with which settings."""

import json
import os
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import IterableDataset
from packaging.version import Version
from transformers import TrainerState, TrainingArguments

from ..errors import CheckpointError
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold, spell_probability
from .checkpoints import STATE_FILE, last_whole, read_json, read_record
from .config import objective_of, threshold_of

logger = get_logger(__name__)


def refuse_other_recipe(checkpoint: str, args: TrainingArguments) -> Threshold:
    """Return the threshold to go on with from `checkpoint`: a percentile's value is what it was at the start.

    Raises CheckpointError if `checkpoint` records another objective or threshold than `args` has, or none where a percentile
    needs it.
    """
    objective, threshold = objective_of(args), threshold_of(args)
    recorded = read_record(checkpoint) or {"objective": {"name": "nll"}, "threshold": Threshold().to_dict()}  # of TRL's own
    if recorded.get("save_only_model"):
        raise CheckpointError(
            f"{checkpoint} was saved with `save_only_model: true`, without what is needed to go on: the optimizer's state and "
            "the random numbers. Start a new run from it as `model_name_or_path`."
        )
    value = (recorded.get("threshold") or {}).get("above")
    if not threshold.resolved and isinstance(value, float) and value > 0:
        threshold = replace(threshold, above=value)
    if not threshold.resolved:
        raise CheckpointError(
            f"{checkpoint} doesn't record the probability that `above_percentile: {threshold.above_percentile}` stands for, "
            "and its model is no longer the one to measure it on. Write it as `threshold: {above: ...}`."
        )
    current = {"objective": objective.resolved.to_dict(), "threshold": threshold.to_dict()}
    said = {"objective": current["objective"], "threshold": threshold_of(args).to_dict()}
    for key, value in current.items():
        if recorded.get(key) != json.loads(json.dumps(value, default=str)):
            raise CheckpointError(
                f"{checkpoint} was trained with {key} {recorded.get(key)}, the recipe says {said[key]}. Resume with the "
                f"recorded {key}, or start a new run from that checkpoint as `model_name_or_path`."
            )
    return threshold


def refuse_other_head(checkpoint: str, loss_head: str) -> None:
    """Raise CheckpointError if `checkpoint` records another loss head than `loss_head`: gradients are rounded differently."""
    recorded = read_record(checkpoint).get("loss_head", loss_head)
    if recorded != loss_head:
        advice = "Add" if recorded == "trl" else "Remove"
        raise CheckpointError(
            f"Cannot resume from {checkpoint}: the loss head changed from `{recorded}` to `{loss_head}`. They round gradients "
            f"differently. {advice} `loss_head: trl` and launch as before, or start a new run with another `output_dir`."
        )


# What a checkpoint can't be gone on with under another value; the others may change, which is said
FIXED = ("optim", "use_dora", "use_rslora", "lora_r", "lora_alpha", "lora_target_modules", "lora_modules_to_save")

FREE = ("output_dir", "resume_from_checkpoint", "env", "objective", "threshold", "model_name_or_path", "use_peft", "report_to")


def refuse_changed_keys(checkpoint: str, given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise CheckpointError if `checkpoint` was trained under other `FIXED` keys than `given`; say which others changed."""
    recorded = read_record(checkpoint).get("recipe")
    if recorded is None:
        return
    now = json.loads(json.dumps(given, default=str))
    changed = {}
    for key in sorted({*recorded, *now} - set(FREE)):
        before, after = (values.get(key, defaults.get(key)) for values in (recorded, now))
        if before != after:
            changed[key] = f"`{key}` from {before} to {after}"
    for key in FIXED:
        if key in changed:
            raise CheckpointError(
                f"{checkpoint} can't be gone on with after a change of {changed[key]}. Write it was, or another `output_dir`."
            )
    if changed and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: since {checkpoint} the recipe has changed: {', '.join(changed.values())}.", file=sys.stderr)
        moves = "progress" in Objective.parse(now.get("objective") or "nll").statistics
        if moves and {"max_steps", "num_train_epochs"} & changed.keys():
            print(
                "warning: the objective goes by training progress, which the change of length moves: the next step is at "
                "another point of its schedule.",
                file=sys.stderr,
            )


def refuse_lost_epoch(checkpoint: str) -> None:
    """Raise CheckpointError if the installed libraries would go on from within a later epoch with the first one's examples.

    accelerate below 1.15 begins to count epochs anew when it skips what was trained, and transformers below 5 doesn't tell it
    the epoch afterwards.
    """
    epoch = (read_json(Path(checkpoint) / STATE_FILE) or {}).get("epoch") or 0
    installed = {name: version(name) for name in ("accelerate", "transformers")}
    if epoch < 1 or not epoch % 1 or Version(installed["accelerate"]) >= Version("1.15"):
        return
    if Version(installed["transformers"]) < Version("5"):
        raise CheckpointError(
            f"{checkpoint} is {epoch:.4g} epochs into its run, and accelerate {installed['accelerate']} with transformers "
            f"{installed['transformers']} would go on with the examples of the first. Run `pip install 'accelerate>=1.15'`."
        )


def refuse_other_model(checkpoint: str, model: str, use_peft: bool) -> None:
    """Raise CheckpointError unless `checkpoint` holds an adapter of `model`, or with no `use_peft` a whole model."""
    path = Path(checkpoint) / "adapter_config.json"
    if path.is_file() is not use_peft:
        holds, says = ("an adapter", "no `use_peft`") if path.is_file() else ("a whole model", "`use_peft: true`")
        raise CheckpointError(f"{checkpoint} holds {holds}, and the recipe has {says}. Make the recipe that of the checkpoint.")
    base = (read_json(path) or {}).get("base_model_name_or_path")
    if base and base != model and Path(base).resolve() != Path(model).resolve():
        raise CheckpointError(
            f"{checkpoint} is an adapter of {base}, and the recipe's model is {model}. Write `model_name_or_path: {base}`, or "
            "another `output_dir` for a new run; if it is the same model in another place, correct `base_model_name_or_path` "
            f"in {path}."
        )


def requested_checkpoint(requested: str | bool | None, folder: Path) -> str | None:
    """Return the checkpoint to resume from: for True the last complete one in `folder`. Raises CheckpointError without one."""
    if requested is not True:
        return requested or None
    last, _ = last_whole(folder)
    if last is None:
        raise CheckpointError(f"There is no whole checkpoint in {folder} to resume from.")
    return str(last)


def state_of(checkpoint: str) -> TrainerState:
    """Return the state that `checkpoint` holds, a new one if it holds none."""
    path = Path(checkpoint) / STATE_FILE
    return TrainerState.load_from_json(str(path)) if path.is_file() else TrainerState()


def steps_of(args: TrainingArguments, checkpoint: str, state: TrainerState) -> int:
    """Return how many steps the run has that `checkpoint` is of, or 0 if it is to be made longer or shorter."""
    if args.max_steps > 0:
        return args.max_steps
    is_same = read_record(checkpoint).get("num_train_epochs") == args.num_train_epochs
    return state.max_steps if is_same else 0


def tell_of_resuming(trainer: Any, checkpoint: str, state: TrainerState) -> None:
    """Print where `trainer` resumes, and warn of what differs from an uninterrupted run."""
    threshold, processes = trainer.threshold, trainer.accelerator.num_processes
    if threshold.above_percentile is not None:
        trainer.accelerator.print(
            f"The threshold is p >= {spell_probability(threshold.above, 6)}: percentile {threshold.above_percentile:g}, as "
            f"{checkpoint} records it."
        )
    recorded = read_record(checkpoint).get("processes", processes)
    if recorded != processes:
        logger.warning(
            f"{checkpoint} is of {recorded} processes, and now there are {processes}: batches and random numbers are others "
            "than in an uninterrupted run."
        )
    is_stream = isinstance(trainer.train_dataset, IterableDataset)
    by_length = getattr(trainer.args, "train_sampling_strategy", "") == "group_by_length"
    by_length |= bool(getattr(trainer.args, "group_by_length", False))  # an older transformers'
    if (state.epoch or 0) > 1 and (is_stream or by_length):
        source = "stream" if is_stream else "set grouped by length"
        logger.warning(
            f"{checkpoint} is {state.epoch:.4g} epochs into its run: from a {source} the examples may come in another order "
            "than in an uninterrupted run."
        )
    trainer.accelerator.print(f"Going on from {checkpoint}, after step {state.global_step}.")
