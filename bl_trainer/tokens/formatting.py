"""Rows whose text a user's `formatting_func` makes."""

from dataclasses import replace
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from ..errors import RecipeError
from .labels import columns_of
from .layouts import RIVALS
from .messages import short
from .prepare import Rows


def formatted(rows: Rows) -> Rows:
    """Return rows whose text `formatting_func` makes, without the columns that TRL would train instead.

    Raises RecipeError with the number of the first row that it makes no text from, in a stream as it is read.
    """
    function, field, dataset, name = rows.formatting_func, rows.args.dataset_text_field, rows.dataset, rows.name
    if function is None:
        return rows
    present, is_set = columns_of(dataset), isinstance(dataset, Dataset)
    if "input_ids" in present or (is_set and dataset.format["type"] == "custom"):
        return rows  # TRL warns of ids, and refuses a transform

    def render(example: dict[str, Any], row: int) -> dict[str, str]:  # `datasets` caches its result by all that it holds
        text = function(example)
        if not isinstance(text, str):
            raise RecipeError(
                f"Cannot train on row {row} of the {name} set, counted from 0: `formatting_func` gives {short(text)}, not "
                "a text. Return the text of one example."
            )
        return {field: text}

    rivals = [column for column in present if column in RIVALS and column != field]
    how = {"num_proc": rows.args.dataset_num_proc} if is_set else {}
    with PartialState().local_main_process_first():
        dataset = dataset.map(render, with_indices=True, remove_columns=rivals, **how)
    return replace(rows, dataset=dataset, formatting_func=None)
