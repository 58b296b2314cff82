"""Checkpoints: which are whole, of which recipe they are, and what is recorded in them."""

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


class CheckpointError(ValueError):
    """A checkpoint that can't be written or gone on with; the message is one sentence for the user."""


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn what json, torch and safetensors raise on a full disk into a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
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
    names = [f"{path.parent.name}/.metadata" for path in checkpoint.glob("*/*.distcp")]
    names += ["latest" for _ in checkpoint.glob("global_step*")]
    for index in checkpoint.glob("*.index.json"):
        names += sorted(set((_read_json(index) or {}).get("weight_map", {}).values()))
    record = _read_json(checkpoint / RECORD_FILE) or {}
    processes = record.get("processes", 0)
    if processes and not record.get("save_only_model"):
        if not any(checkpoint.glob("global_step*")):  # DeepSpeed's, which has the optimizer
            names += ["scheduler.pt", *([] if any(checkpoint.glob("optimizer*")) else ["optimizer.pt"])]
        names += ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    return names


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
    return None, broken


def refuse_other_recipe(checkpoint: str, args: TrainingArguments) -> Threshold:
    """Return the threshold to go on with from `checkpoint`: a percentile's value is what it was at the start.

    Raises CheckpointError if `checkpoint` records another objective or threshold than `args` has, or none where a percentile
    needs it.
    """
    objective = Objective.parse(getattr(args, "objective", "nll"))
    threshold = Threshold.parse(getattr(args, "threshold", None))
    recorded = _read_json(Path(checkpoint) / RECORD_FILE) or {}
    value = (recorded.get("threshold") or {}).get("above")
    if not threshold.resolved and isinstance(value, float) and value > 0:
        threshold = replace(threshold, above=value)
    if not threshold.resolved:
        raise CheckpointError(
            f"{checkpoint} doesn't record the probability that `above_percentile: {threshold.above_percentile}` stands for, "
            "and its model is no longer the one to measure it on. Write it as `threshold: {above: ...}`."
        )
    current = {"objective": objective.to_dict(), "threshold": threshold.to_dict()}
    said = {"objective": current["objective"], "threshold": Threshold.parse(getattr(args, "threshold", None)).to_dict()}
    for key, value in current.items():
        if recorded and recorded.get(key) != value:
            raise CheckpointError(
                f"{checkpoint} was trained with {key} {recorded.get(key)}, the recipe says {said[key]}. Resume with the "
                f"recorded {key}, or start a new run from that checkpoint as `model_name_or_path`."
            )
    return threshold


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
