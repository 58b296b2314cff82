"""Local files in place of a task's data set."""

import json
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from .._util.text import sentence
from ..errors import RecipeError
from ..recipe.datasets import find_fault, open_binary
from ..recipe.local_files import is_empty
from ..recipe.paths import format_of
from .choices import unique_keys
from .completion import COLUMNS, Completion
from .generation import Generation

TEXTS = (None, "string", "large_string")  # types of a column of texts, or of none


def with_data(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Return the task's configuration with `path` in place of its data set. Raises RecipeError if that doesn't fit."""
    own = config.get("class")
    if isinstance(own, type) and issubclass(own, Generation) and not issubclass(own, Completion):
        return {**config, "dataset_path": None, "custom_dataset": partial(task_splits, path), "test_split": "test"}
    _check(name, path)
    config = {key: value for key, value in config.items() if key not in ("custom_dataset", "dataset_name", "include")}
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    shots = dict(config.get("fewshot_config") or {})
    if "samples" not in shots:  # else the task has its own examples
        splits["fewshot_split"] = "test"  # the same as the items', or an item could be an example for itself
        shots.pop("split", None)
    data = {"dataset_path": format_of(path), "dataset_kwargs": {"data_files": {"test": escape(str(path))}}}
    return {**config, **data, **splits, "fewshot_config": shots or None}


def _check(name: str, path: Path) -> None:
    """Raise RecipeError if a file can't be the data of a task."""
    is_completion = name == "completion"
    fault = find_fault([path], COLUMNS[:2]) if is_completion else None
    if is_empty(path):
        raise RecipeError(f"`--data {name}={path}` is empty.")
    if not fault and format_of(path) == "json":
        _check_keys(name, path)
    try:
        rows = _load(path)
    except Exception as error:  # the libraries raise many kinds for a broken file
        raise RecipeError(f"`--data {name}={path}`: {fault or sentence(error)}") from error
    columns = set(rows.column_names)
    if is_completion and not any(set(wanted) <= columns for wanted in COLUMNS):
        raise RecipeError(
            f"`--data {name}={path}` has the columns {', '.join(sorted(columns))}. Needed: prompt and completion, or messages."
        )
    if fault:
        raise RecipeError(f"`--data {name}=...`: {fault}.")
    for column in sorted({"prompt", "completion"} & columns) if is_completion else ():
        if getattr(rows.features[column], "dtype", None) not in TEXTS:
            raise RecipeError(f"`--data {name}={path}`: its column {column!r} holds numbers, not texts. Use a .jsonl file.")


def _check_keys(name: str, path: Path) -> None:
    """Raise RecipeError if a JSON object has a key twice: `datasets` may keep the last alone."""
    try:
        _json_values(path)
    except RecipeError as error:
        raise RecipeError(f"`--data {name}={path}`: {error}") from error
    except ValueError:
        return  # no JSON: `datasets` raises its own error


def _load(path: Path) -> datasets.Dataset:
    return datasets.load_dataset(format_of(path), data_files=escape(str(path)), split="train")


def task_splits(path: Path, **kwargs: Any) -> dict[str, datasets.Dataset]:
    """Return the rows of a file as the split "test".

    A JSON object is taken as a mapping from the column `source` to rows. Rows may differ in the keys of their mappings.
    """
    if format_of(path) != "json":
        if is_empty(path):
            raise RecipeError("it is empty.")
        return {"test": _load(path)}
    rows = _json_rows(path)
    columns = dict.fromkeys(column for row in rows for column in row)  # `from_list` takes those of the first row alone
    if not columns:
        raise RecipeError("it is empty.")
    return {"test": datasets.Dataset(pa.table({column: _column(column, rows) for column in columns}))}


def _column(name: str, rows: list[dict[str, Any]]) -> pa.Array:
    try:
        return pa.array([row.get(name) for row in rows])
    except pa.ArrowException as error:
        raise RecipeError(f"its column {name!r} mixes types: {sentence(error)}. Write values of one type.") from error


def _json_rows(path: Path) -> list[dict[str, Any]]:
    rows = _json_values(path)
    if isinstance(rows, dict) and not {"prompt", "messages"} & rows.keys() and all(isinstance(v, list) for v in rows.values()):
        return [{**_object(row), "source": source} for source, part in rows.items() for row in part]
    return [_object(row) for row in (rows if isinstance(rows, list) else [rows])]


def _json_values(path: Path) -> Any:
    """Return what a JSON file holds, or the list of what its lines hold."""
    with open_binary(path) as file:
        text = file.read().decode("utf-8-sig")
    if ".jsonl" in path.suffixes[-2:] and not text.lstrip().startswith("["):
        return _json_lines(text)
    try:
        return _parsed(text)
    except json.JSONDecodeError:
        return _json_lines(text)


def _json_lines(text: str) -> list[Any]:
    lines = enumerate(text.split("\n"), 1)  # `splitlines` splits within texts, at U+2028 and U+0085
    return [_parsed(line, number) for number, line in lines if line.strip()]


def _parsed(text: str, line: int | None = None) -> Any:
    """Return what a JSON text holds. Raises RecipeError if an object has a key twice: JSON readers keep the last."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{'' if line is None else f'line {line}: '}{error}") from error


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RecipeError(f"it holds {str(row)[:40]!r} where a row should be. Write each row as an object.")
    return row
