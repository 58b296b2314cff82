"""Checkpoints: which are whole, of which recipe they are, and what is recorded in them."""

import errno
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments

from .objectives import Objective, Threshold

RECORD_FILE = "bl_trainer.json"
STATE_FILE = "trainer_state.json"  # transformers writes it after all others
SENTINEL = "checkpoint-is-incomplete.txt"  # of transformers, while it saves upon SIGTERM
WEIGHTS = ("*.safetensors", "*/adapter_model.safetensors", "pytorch_model*", "adapter_model.bin", "global_step*")


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class CheckpointError(ValueError):
    """A checkpoint that can't be written or gone on with; the message is one sentence for the user."""


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn what json, torch and safetensors raise on a full disk into a CheckpointError."""
    try:
        yield
    except Exception as error:  # tokenizers' is no more than that
        unwritten = getattr(error, "errno", None) in UNWRITABLE or any(word in str(error) for word in ("os error", "Writer"))
        if not unwritten:  # it has another cause, such as a push to the Hub or a lost process
            raise
        raise CheckpointError(
            f"Can't write {path}: {error}. Checkpoints that were whole still are; with `resume_from_checkpoint: true` the same "
            "command goes on from the last one."
        ) from error


def why_broken(checkpoint: Path) -> str | None:
    """Return what is missing or cut short in `checkpoint`, which a killed run may leave behind; None if it is whole."""
    if (checkpoint / SENTINEL).exists():
        return f"it holds {SENTINEL}"
    if "global_step" not in (_read_json(checkpoint / STATE_FILE) or {}):
        return f"its {STATE_FILE} is {'cut short' if (checkpoint / STATE_FILE).exists() else 'missing'}"
    if not any(next(checkpoint.glob(pattern), None) for pattern in WEIGHTS):
        return "its weights are missing"
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not _is_complete(path):
            return f"its {path.relative_to(checkpoint)} is cut short"
    missing = [name for name in _expected(checkpoint) if not (checkpoint / name).exists()]
    return f"its {missing[0]} is missing" if missing else None


def has_model(folder: Path) -> bool:
    """Whether `folder` holds a whole model that a run of ours has saved at its end."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model.bin")]
    return (folder / RECORD_FILE).exists() and bool(weights) and all(map(_is_complete, weights))


def _is_complete(path: Path) -> bool:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return True
        except (SafetensorError, OSError):
            return False
    if path.suffix in (".pt", ".pth", ".bin"):  # torch's files are zip archives, whose directory comes last
        return zipfile.is_zipfile(path)
    return path.suffix != ".json" or _read_json(path) is not None


def _expected(checkpoint: Path) -> list[str]:
    """Names of files that others in the checkpoint speak of."""
    names = [
        f"{path.name}/.metadata" for pattern in ("pytorch_model_fsdp_*", "optimizer_*") for path in checkpoint.glob(pattern)
    ]
    names = [name for name in names if (checkpoint / name).parent.is_dir()]
    for index in checkpoint.glob("*.index.json"):
        names += sorted(set((_read_json(index) or {}).get("weight_map", {}).values()))
    record = read_record(str(checkpoint))
    processes = record.get("processes", 0)
    if record.get("save_only_model"):
        return names
    if any(checkpoint.glob("global_step*")):  # DeepSpeed's, with the optimizer's state
        names += _expected_of_deepspeed(checkpoint, processes)
    else:
        names += ["scheduler.pt", *([] if any(checkpoint.glob("optimizer*")) else ["optimizer.pt"])]
    return names + (["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)])


def _expected_of_deepspeed(checkpoint: Path, processes: int) -> list[str]:
    if not (checkpoint / "latest").is_file():
        return ["latest"]
    folder = (checkpoint / "latest").read_text().strip()
    found = len(list((checkpoint / folder).glob("*optim_states.pt")))
    return [] if found >= max(processes, 1) else [f"{folder}/*optim_states.pt of process {found}"]


def read_record(checkpoint: str) -> dict[str, Any]:
    """Return what we recorded in `checkpoint`; nothing if another trainer made it."""
    return _read_json(Path(checkpoint) / RECORD_FILE) or {}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def last_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return the last whole checkpoint of `folder`, or None, and the broken ones; says on stderr which it passes over."""
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if re.fullmatch(r"\d+", path.name[11:])}
    broken: list[Path] = []
    for _, path in sorted(found.items(), reverse=True):
        why = why_broken(path)
        if why is None:
            return path, broken
        broken.append(path)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"warning: {path} is passed over, since {why}: it was not written to its end.", file=sys.stderr)
    if broken and os.environ.get("LOCAL_RANK", "0") == "0":
        print("warning: no whole checkpoint is left, so training starts anew.", file=sys.stderr)
    return None, broken


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
                f"{checkpoint} can't be gone on with after a change of {changed[key]}. Write it as it was, or another "
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
    epoch = (_read_json(Path(checkpoint) / STATE_FILE) or {}).get("epoch") or 0
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
    base = (_read_json(path) or {}).get("base_model_name_or_path")
    if base and base != model and Path(base).resolve() != Path(model).resolve():
        raise CheckpointError(
            f"{checkpoint} is an adapter of {base}, and the recipe's model is {model}. Write `model_name_or_path: {base}`, or "
            "another `output_dir` for a new run; if it is the same model in another place, correct `base_model_name_or_path` "
            f"in {path}."
        )
