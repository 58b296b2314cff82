"""What runs leave in a sweep's folder: results, values by held-out item, and the scores of tasks."""

import csv
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .._util.files import write_text
from .._util.text import sentence
from ..errors import MeasurementError, RecipeError
from ..evaluation import read_items
from .rulers import RULERS, measured_by, with_best

RESULT_SCHEMA = 1

Values = dict[str, tuple[float, float]]  # by held-out item: weight, and weighted value of a ruler


def arm_folder(folder: Path, index: int) -> Path:
    """Return an arm's folder in a sweep's."""
    return folder / "arms" / f"{index:03d}"


Kind = TypeVar("Kind", bound="Result")


@dataclass(frozen=True)
class Result:
    """What a finished run leaves in result.json.

    `rulers`, `base`: metric -> value on the held-out data, of its model and of the one that it started from. `loss`: the last
    training loss. `examples`, `tokens`: how many were held out. `trained_tokens`: how many it trained on. `seconds`: what all
    its steps took, None if a kill came between; `devices`: how many GPUs it had meanwhile.
    """

    index: int
    setting: dict[str, Any]
    rulers: dict[str, float]
    base: dict[str, float] = field(default_factory=dict)
    lower_is_better: list[str] = field(default_factory=list)
    loss: float | None = None
    examples: int = 0
    tokens: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    trained_tokens: int | None = None
    seconds: float | None = None
    devices: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return what result.json holds. Raises ValueError on a value that JSON has no number for."""
        found = {"schema": RESULT_SCHEMA, **asdict(self)}
        json.dumps(found, allow_nan=False)
        return found

    def write(self, folder: Path) -> None:
        """Write `folder`/result.json in one go, after which the run counts as finished."""
        write_text(folder / "result.json", json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def read(cls: type[Kind], folder: Path) -> Kind | None:
        """Read a finished run's result; None if there is none. Raises RecipeError if it can't be read."""
        path = folder / "result.json"
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("schema", None) == RESULT_SCHEMA:
                return cls(**{each.name: found[each.name] for each in fields(cls) if each.name in found})
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise RecipeError(f"Cannot read {path}: {sentence(error)}. Remove {folder} to repeat the run.") from error
        raise RecipeError(f"Cannot read {path}: another version of bl_trainer wrote it. Remove {folder} to repeat the run.")


def finished(count: int, folder: Path, kind: type[Kind]) -> dict[int, Kind]:
    """Return the results, of a kind, of the finished ones of a sweep's first `count` arms."""
    found = {index: kind.read(arm_folder(folder, index)) for index in range(count)}
    return {index: result for index, result in found.items() if result is not None}


@dataclass(frozen=True)
class HeldOut:
    """What the report on held-out data says of a run.

    `rulers`, `base`: metric -> value, of the run's model and of the model that it started from. `examples`, `tokens`: how many
    they are means over. `versions`: package -> version that measured.
    """

    rulers: dict[str, float]
    base: dict[str, float]
    examples: int
    tokens: int
    versions: dict[str, str]


def read_held_out(folder: Path) -> HeldOut:
    """Read a run's report on held-out data. Raises MeasurementError if it is not there, or not whole."""
    path = folder / "held_out" / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        compared = report["compare"]
        tuned, base = (measured_by(compared, is_base) for is_base in (False, True))
        return HeldOut(tuned, base, compared["train"]["examples"], compared["train"]["tokens"], report["versions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"it has no `{error.args[0]}`" if isinstance(error, KeyError) else sentence(error)
        raise MeasurementError(f"Cannot read {path}: {why}. Run the sweep again with `--retry_failed`.") from error


def read_values(folder: Path, ruler: str) -> Values | None:
    """Return an arm's values by held-out item of a ruler that is a mean over them, else None."""
    column = RULERS[ruler].column if ruler in RULERS else None
    if column:
        name = "probe.csv" if ruler == "drift" and (folder / "held_out" / "probe.csv").exists() else "compare.csv"
        with (folder / "held_out" / name).open(encoding="utf-8", newline="") as file:
            return {line["row"]: (float(line["tokens"]), float(line[column])) for line in csv.DictReader(file)}
    score = task_scores(folder / "tasks").get(ruler)
    if score is None or not score["is_mean"]:
        return None
    items = read_items(folder / "tasks" / score["samples"], score["metric"])
    return {item: (1.0, value) for item, value in items.items()}


def task_scores(output: Path) -> dict[str, dict[str, Any]]:
    """Return task/metric -> score of an evaluation's results; there may be none."""
    scores = [score for entry in _evaluations(output) for score in entry["scores"]]
    return {f"{score['task']}/{score['metric']}": score for score in scores if isinstance(score["value"], (int, float))}


def base_scores(folder: Path) -> dict[str, float]:
    """Return task/metric -> value of the base model of a sweep, evaluated in its `folder`."""
    scores = task_scores(folder / "base" / "tasks")
    lower = [name for name, score in scores.items() if score["higher_is_better"] is False]
    return with_best({name: score["value"] for name, score in scores.items()}, lower)


def task_versions(output: Path) -> dict[str, str]:
    """Return the versions of packages by which an evaluation was done; there may be none."""
    return {name: version for entry in _evaluations(output) for name, version in entry.get("versions", {}).items()}


def _evaluations(output: Path) -> list[dict[str, Any]]:
    path = output / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))["evaluations"] if path.exists() else []
