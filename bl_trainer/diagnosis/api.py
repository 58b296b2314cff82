"""The diagnose verb as a function."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .._util.text import sentence
from ..errors import RecipeError
from .options import read_diagnosis
from .page import write_report
from .run import Diagnosis


def diagnose(recipe: str | Path | Mapping[str, Any] | None = None, report: str | Path | None = None, **options: Any) -> Any:
    """Measure where a model and data stand on the continuum, and return the report.

    Args:
        recipe: The path of a recipe, or its keys with their values, as YAML has them. None with `model` and `data`.
        report: The folder to write the report to; None writes nothing.
        options: Those of `DiagnoseArguments`, such as `max_tokens=100_000` or `compare="out/model"`. `model="M"` and
            `data="D.jsonl"` take the place of a recipe. None and an empty list leave an option at its default.

    Returns:
        The same report in every process; the first one writes it.

    Raises:
        RecipeError: On a mistake in any of them.
        MeasurementError: On a measurement that is no number, or has no target token.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = recipe
        if isinstance(recipe, Mapping):
            path = Path(scratch) / "recipe.yaml"
            path.write_text(_yaml(recipe), encoding="utf-8")
        argv = ["--report", str(report or Path(scratch) / "report")]
        if path is not None:
            argv += ["--config", str(path)]
        for key, value in options.items():
            values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            argv += [f"--{key}", *map(str, values)] if values else []
        diagnosis = Diagnosis(read_diagnosis(argv))
        found = diagnosis.run()
        if report is not None and diagnosis.trainer.is_world_process_zero():
            write_report(found, str(report))
    return found


def _yaml(recipe: Mapping[str, Any]) -> str:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in recipe.items()}
    try:
        return yaml.safe_dump(plain)
    except yaml.YAMLError as error:
        raise RecipeError(f"Cannot read the recipe: {sentence(error)}. Give texts, numbers, lists and mappings.") from error
