"""What a user can do with a trained model: the commands that a run ends with."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoint-*"


def next_steps(folder: str, recipe: Mapping[str, Any], argv: list[str], pushed: bool = False) -> list[str]:
    """Return a line for each thing to do with the model in `folder`, with the command that does it.

    `recipe`: the keys that it was trained with. `argv`: the train verb's; the comparison with the base reads the same recipe.
    `pushed`: whether the model is on the Hub already.
    """
    base = str(recipe.get("model_name_or_path"))
    steps = {
        "Generate": f"run the Python lines of {Path(folder) / 'README.md'}",
        "Evaluate": _command("evaluate", "--model", base, folder, *_tasks(recipe), "--output", f"{folder}-evaluation"),
        "Compare": _command("diagnose", *_without_show(argv), "--compare", folder, "--report", f"{folder}-compared"),
    }
    if (Path(folder) / "adapter_config.json").is_file():
        steps["Merge"] = _command("merge", folder, "--output", f"{folder}-merged")
    if not pushed:
        steps["Push"] = shlex.join(["hf", "upload", _hub_name(recipe), folder, "--exclude", CHECKPOINTS])
    return [f"  {what + ':':<10}{how}" for what, how in steps.items()]


def _without_show(argv: list[str]) -> list[str]:
    """Return the train verb's command line without `--show N`, which no other verb has."""
    return [arg for i, arg in enumerate(argv) if not arg.startswith("--show=") and "--show" not in argv[max(0, i - 1) : i + 1]]


def _hub_name(recipe: Mapping[str, Any]) -> str:
    """Return a name that the Hub takes for the model: its base's and its objective's."""
    objective = recipe.get("objective") or "nll"
    name = objective if isinstance(objective, str) else objective["name"]
    base = Path(str(recipe.get("model_name_or_path"))).resolve().name
    return re.sub(r"[^A-Za-z0-9_.]+|\.{2,}", "-", f"{base}-{name}")[-96:].strip("-.")


def _command(*words: str) -> str:
    return shlex.join(["bl-trainer", *words])


def _tasks(recipe: Mapping[str, Any]) -> list[str]:
    """Return the task of `evaluate` that compares answers with the recipe's own test set; without one, a task of the Hub."""
    name, split = str(recipe.get("dataset_name")), recipe.get("dataset_test_split", "test")
    file = Path(name) / f"{split}.jsonl"
    if file.is_file() and _first_row(file).keys() & {"messages", "completion"}:
        return ["--tasks", "completion", "--data", f"completion={file}"]
    return ["--tasks", "gsm8k"]


def _first_row(file: Path) -> dict[str, Any]:
    with file.open(encoding="utf-8") as lines:
        row = json.loads(next(lines, "{}"))
    return row if isinstance(row, dict) else {}
