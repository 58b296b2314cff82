"""What a data set says of each token besides its label, on its way to the objective: weights, and the chat template's tokens.

A column has a value for each token of a row, or one for all of them; packing cuts and joins it does the tokens, and it
is collated as the labels are.
"""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from ..errors import RecipeError
from ..objectives.pricing import LOSS_WEIGHT
from .labels import columns_of, plain
from .messages import GREATEST, fault_of_weight
from .names import FILLS, MESSAGE_WEIGHT, REFERENCE, ROW, TEMPLATE, TOKEN_WEIGHT, WEIGHT
from .spans import weighing_of

STATISTICS = {WEIGHT: LOSS_WEIGHT, REFERENCE: "ref_logp"}  # of a column: what it is to objectives and their prices


def check_weights(dataset: Any, name: str, column: str = WEIGHT) -> Any:
    """Return the data set, its column of weights checked; a stream's is checked as it is read.

    Raises RecipeError with the number of the first row whose weight isn't a number >= 0.
    """
    has_tokens = "input_ids" in columns_of(dataset)
    if isinstance(dataset, Dataset):
        start = 0
        for table in plain(dataset).select_columns([column]).with_format("arrow").iter(1000):
            if not _are_weights(table[column], has_tokens):
                for row, value in enumerate(table[column].to_pylist(), start):
                    _check_weight(value, row, name, column, has_tokens)
            start += len(table)
        return dataset

    def check(example: dict[str, Any], row: int) -> dict[str, Any]:
        _check_weight(example[column], row, name, column, has_tokens)
        return {}

    return dataset.map(check, with_indices=True)


def _are_weights(values: pa.ChunkedArray, has_tokens: bool) -> bool:
    """Whether nothing in a column needs a look, row by row."""
    kind = values.type
    if has_tokens and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        if values.null_count or pc.min(pc.list_value_length(values)).as_py() == 0:
            return False
        values = pc.list_flatten(values)
        kind = values.type
    if values.null_count or not (pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind)):
        return False
    return bool(
        pc.all(pc.and_(pc.less_equal(pc.cast(values, pa.float64(), safe=False), GREATEST), pc.greater_equal(values, 0))).as_py()
    )


def _check_weight(value: Any, row: int, name: str, column: str, has_tokens: bool) -> None:
    for each in value if isinstance(value, list) and value and has_tokens else [value]:  # a list: of each token
        wrong = fault_of_weight("a truth value" if isinstance(each, bool) else each)
        if wrong:
            got = "is missing" if each is None else f"is {each!r}"
            raise RecipeError(
                f"`{column}` of row {row} of the {name} set, counted from 0, {got}: it {wrong}. Give every row one, 1 where "
                "nothing is to change, or rename the column."
            )


def check_columns(dataset: Any, name: str, marks: bool, obstacle: str | None = None) -> Any:
    """Return the data set, its columns of tokens checked; a stream's weights are checked as it is read.

    Raises RecipeError if its weights are wrong, or it can't tell what `special_tokens` needs to know.

    `marks`: whether the objective has `special_tokens`. `obstacle`: what would leave the columns out, if anything.
    """
    present = columns_of(dataset)
    columns = [column for column in (WEIGHT, TOKEN_WEIGHT) if column in present]
    near = [] if WEIGHT in present else get_close_matches(WEIGHT, present, 1, 0.85)
    if near:
        raise RecipeError(
            f"The column {near[0]!r} of the {name} set would be ignored. Did you mean `{WEIGHT}`? Rename or remove it."
        )
    obstacle = "the data set has images" if {"image", "images"} & {*present} else obstacle
    weighs = {f"`{column}`": "the column" for column in columns}
    weighs |= {f"`{MESSAGE_WEIGHT}` of messages": "the key"} if any(weighing_of(dataset)) and not columns else {}
    what, it = next(iter(weighs.items()), ("`special_tokens`", "it"))
    if obstacle and (weighs or marks):
        raise RecipeError(
            f"{what} needs to follow tokens through the collator and the loss, which it can't here: {obstacle}. Remove {it}."
        )
    if marks and "input_ids" in present and TEMPLATE not in present:
        raise RecipeError(
            f"`special_tokens` needs to know which tokens the chat template made, and the {name} set can't tell: it holds "
            "token ids already (`input_ids`). Give messages, prompts and completions, or texts."
        )
    if TOKEN_WEIGHT in columns and "input_ids" not in present:
        raise RecipeError(
            f"Cannot use the column `{TOKEN_WEIGHT}` of the {name} set: it has no `input_ids` to go with. Give them as well, "
            f"or give messages a key `{MESSAGE_WEIGHT}`."
        )
    for column in columns:
        dataset = check_weights(dataset, name, column)
    return dataset


def for_each_token(columns: list[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what turns an example's columns into ones of each token, which packing cuts and joins as it does the tokens."""

    def spread(example: dict[str, Any]) -> dict[str, Any]:
        size = len(example["input_ids"])
        return {key: example[key] if isinstance(example[key], list) else [example[key]] * size for key in columns}

    return spread


class TokenColumns:
    """What a batch says of its tokens besides their labels, as statistics: `STATISTICS` and `is_special`.

    Takes the columns out of `inputs`. `special_ids`: (number,) ids of the tokens that are special wherever they stand, None if
    the objective has no `special_tokens`.
    """

    def __init__(self, inputs: dict[str, Any], special_ids: Tensor | None):
        self.columns = {key: inputs.pop(key) for key in FILLS if key in inputs}
        self.special_ids = special_ids

    def at(self, labels: Tensor, align: Callable[[Tensor, float], Tensor]) -> dict[str, Tensor]:
        """Return those that there are, at tokens with these `labels`; `align(column, fill)` takes a column's values there."""
        aligned = {key: align(value, FILLS[key]) for key, value in self.columns.items()}
        found = {STATISTICS[key]: value for key, value in aligned.items() if key in STATISTICS}
        if self.special_ids is not None:
            special = torch.isin(labels, self.special_ids.to(labels.device))
            found["is_special"] = special | (aligned[TEMPLATE] == 1) if TEMPLATE in aligned else special
        return found


def number_rows(dataset: Any) -> Any:
    """Add the column `ROW` to a data set or a stream."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda example, row: {ROW: row}, with_indices=True)
    assert isinstance(dataset, Dataset)
    return dataset.add_column(ROW, list(range(len(dataset))))
