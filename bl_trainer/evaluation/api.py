"""The evaluate verb as a function."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .._util.text import nearest
from ..errors import RecipeError
from . import run_tasks
from .options import EvaluateArguments
from .table import table


@dataclass(frozen=True)
class Evaluation:
    """The results of checkpoints on tasks. As text it is the table that the verb prints.

    `evaluations`: one mapping for each checkpoint and task, with its `scores`. `differences`: from the first checkpoint, on the
    same items. `notes`: what makes the checkpoints less comparable. These are what results.json holds.
    """

    evaluations: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    notes: list[str]
    text: str

    def __str__(self) -> str:
        return self.text

    def score(self, checkpoint: str | Path, metric: str, task: str | None = None) -> float:
        """Return a checkpoint's score by a metric; `task` where several have it. Raises RecipeError if there is not one."""
        entries = [entry for entry in self.evaluations if entry["checkpoint"] == str(checkpoint)]
        scores = [score for entry in entries for score in entry["scores"]]
        found = [each for each in scores if each["metric"] == metric and task in (None, each["task"])]
        if len(found) != 1:
            names = ", ".join(sorted({f"{each['task']} {each['metric']}" for each in scores})) or "none"
            raise RecipeError(f"Cannot return the score {metric!r} of {checkpoint}: {len(found)} found. There are: {names}.")
        return float(found[0]["value"])


def evaluate(
    model: str | Path | Sequence[str | Path],
    tasks: str | Sequence[str],
    output: str | Path | None = None,
    data: dict[str, str | Path] | None = None,
    **options: Any,
) -> Evaluation:
    """Score checkpoints on tasks, and compare each with the first item by item.

    Args:
        model: Folder or Hub name of one or several checkpoints; an adapter's folder is taken over its base.
        tasks: Names of tasks, ours or lm-evaluation-harness's, or YAML files of further ones.
        output: The folder for results.json and the items, where finished tasks are taken from; None keeps nothing.
        data: Task -> a local file in place of that task's data set.
        options: The other options of `EvaluateArguments`, such as `limit=100`.

    Returns:
        The results. Of several processes the first one alone has them; the others' are empty.

    Raises:
        RecipeError: On a wrong option, and on what can't be evaluated.
    """
    known = [field.name for field in fields(EvaluateArguments)]
    for key in options:
        if key not in known:
            raise RecipeError(f"Unknown option {key!r}.{nearest(key, known)} Options of `evaluate`: {', '.join(known)}.")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = EvaluateArguments(
            model=[model] if isinstance(model, str) else [str(model)] if isinstance(model, Path) else [*map(str, model)],
            tasks=[tasks] if isinstance(tasks, str) else [*tasks],
            data=[f"{task}={path}" for task, path in (data or {}).items()],
            output=str(output or scratch),
            **options,
        )
        results = run_tasks(arguments)
        content = results.content()
        return Evaluation(content["evaluations"], content["differences"], content.get("notes", []), table(results))
