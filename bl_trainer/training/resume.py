"""What a run may resume from, and with which settings."""

import json
import os
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version
from transformers import TrainingArguments

from ..errors import CheckpointError
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from .checkpoints import STATE_FILE, read_json, read_record


def refuse_other_recipe(checkpoint: str, args: TrainingArguments) -> Threshold:
    """Return the threshold to go on with from `checkpoint`: a percentile's value is what it was at the start.

    Raises CheckpointError if `checkpoint` records another objective or threshold than `args` has, or none where a percentile
    needs it.
    """
    objective = Objective.parse(getattr(args, "objective", "nll"))
    threshold = Threshold.parse(getattr(args, "threshold", None))
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
    said = {"objective": current["objective"], "threshold": Threshold.parse(getattr(args, "threshold", None)).to_dict()}
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


# Keys under another value of which no checkpoint can be resumed from; the others may change, which is said
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
                f"Cannot resume from {checkpoint}: the recipe changes {changed[key]}. Change it back, or write another "
                "`output_dir`."
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
