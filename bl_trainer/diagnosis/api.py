"""The diagnose verb as a function."""

import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from .._util.text import nearest, sentence
from ..errors import RecipeError
from ..objectives.spec import named
from ..training.trainer import BLTrainer
from .of_trainer import diagnose_trainer
from .options import DiagnoseArguments, read_diagnosis
from .page import write_report
from .report import Report
from .run import Diagnosis


def diagnose(
    recipe: str | Path | Mapping[str, Any] | BLTrainer | None = None, report: str | Path | None = None, **options: Any
) -> Report:
    """Measure where a model and data stand on the continuum, and return the report.

    Args:
        recipe: The path of a recipe, or its keys with their values, as YAML has them. None with `model` and `data`. Or a
            `BLTrainer`, whose model is measured as it is now, on its prepared rows; it trains afterwards as before.
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
        folder = str(report or Path(scratch) / "report")
        if isinstance(recipe, BLTrainer):
            found, writes = diagnose_trainer(recipe, _checked({"report": folder, **options}))
            scored = None
        else:
            diagnosis = Diagnosis(read_diagnosis(_argv(recipe, Path(scratch), {"report": folder, **options})))
            diagnosis.score()
            found, writes, scored = diagnosis.run(), diagnosis.trainer.is_world_process_zero(), diagnosis.scored()
        if report is not None and writes:
            write_report(found, folder, scored, options.get("draw") is not False)
    return found


def _checked(options: dict[str, Any]) -> DiagnoseArguments:
    """Return options given by name. Raises RecipeError on one that there is not, or a wrong value."""
    known = [field.name for field in fields(DiagnoseArguments)]
    for key in options:
        if key not in known:
            raise RecipeError(f"Unknown option {key!r}.{nearest(key, known)} Options of `diagnose`: {', '.join(known)}.")
    made = DiagnoseArguments(**options)
    made.check()
    return made


def _argv(recipe: str | Path | Mapping[str, Any] | None, scratch: Path, options: dict[str, Any]) -> list[str]:
    """Return the command line that means the same; a mapping is written into `scratch`."""
    argv: list[str] = []
    if isinstance(recipe, Mapping):
        path = scratch / "recipe.yaml"
        path.write_text(_yaml(recipe), encoding="utf-8")
        argv += ["--config", str(path)]
    elif recipe is not None:
        argv += ["--config", str(recipe)]
    for key, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        argv += [f"--{key}", *map(str, values)] if values else []
    return argv


def _yaml(recipe: Mapping[str, Any]) -> str:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in recipe.items()}
    plain |= {"objective": named(recipe["objective"])} if "objective" in recipe else {}
    try:
        return yaml.safe_dump(plain)
    except yaml.YAMLError as error:
        raise RecipeError(f"Cannot read the recipe: {sentence(error)}. Give texts, numbers, lists and mappings.") from error
