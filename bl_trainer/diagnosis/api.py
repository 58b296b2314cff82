"""The diagnose verb as a function."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .._util.text import sentence
from ..errors import RecipeError
from ..recipe import Recipe
from .options import DiagnoseArguments
from .page import write_report
from .run import Diagnosis


def diagnose(recipe: str | Path | Mapping[str, Any], report: str | Path | None = None, **options: Any) -> Any:
    """Measure where a recipe's model and data stand on the continuum, and return the report.

    `recipe`: the path of a recipe, or its keys with their values, as YAML has them. `report`: the folder to write the report
    to; None writes nothing. `options`: those of `DiagnoseArguments`, such as `max_tokens=100_000` or `compare="out/model"`.
    Returns the same report in every process; the first one writes it. Raises RecipeError on a mistake in any of them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = recipe
        if isinstance(recipe, Mapping):
            path = Path(scratch) / "recipe.yaml"
            path.write_text(_yaml(recipe), encoding="utf-8")
        argv = ["--config", str(path), "--report", str(report or Path(scratch) / "report")]
        for key, value in options.items():
            argv += [f"--{key}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
        read = Recipe.read(argv, "diagnose", DiagnoseArguments)
        read.options.check()
        diagnosis = Diagnosis(read)
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
