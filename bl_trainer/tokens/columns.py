"""What a data set says of each token besides its label, on its way to the objective: weights, and the chat template's tokens.

A column has a value for each token of a row, or one for all of them; packing cuts and joins it as it does the tokens, and it
is collated as the labels are.
"""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from trl.data_utils import is_conversational

from .annotation import template_mask
from .interruption import REFERENCE, ROW
from .labels import columns_of, plain
from .parser import RecipeError
from .specs import is_number

WEIGHT = "objective_weight"  # of an example: what the costs of its tokens are multiplied by
TEMPLATE = "bl_template"  # 1 for a token that the chat template made
FILLS = {WEIGHT: 1.0, TEMPLATE: 0, REFERENCE: 0.0}


def check_weights(dataset: Any, name: str) -> Any:
    """Return the data set, its `objective_weight` checked; a stream's is checked as it is read.

    Raises RecipeError with the number of the first row whose weight isn't a number >= 0.
    """
    has_tokens = "input_ids" in columns_of(dataset)
    if isinstance(dataset, Dataset):
        for row, value in enumerate(plain(dataset).select_columns([WEIGHT])[:][WEIGHT]):
            _check_weight(value, row, name, has_tokens)
        return dataset

    def check(example: dict[str, Any], row: int) -> dict[str, Any]:
        _check_weight(example[WEIGHT], row, name, has_tokens)
        return {}

    return dataset.map(check, with_indices=True)


def _check_weight(value: Any, row: int, name: str, has_tokens: bool) -> None:
    for each in value if isinstance(value, list) and value and has_tokens else [value]:  # a list: of each token
        if not is_number(each) or each < 0:
            got = "is missing" if each is None else f"is {each!r}"
            raise RecipeError(
                f"`{WEIGHT}` of row {row} of the {name} set, counted from 0, {got}: it must be a number, 0 or above. Give "
                "every row one, 1 where nothing is to change, or rename the column."
            )


def check_columns(dataset: Any, name: str, marks: bool, obstacle: str | None = None) -> None:
    """Raise RecipeError if a data set's weights are wrong, or it can't tell what `special_tokens` needs to know.

    `marks`: whether the objective has `special_tokens`. `obstacle`: what would leave the columns out, if anything.
    """
    present = columns_of(dataset)
    weighs = WEIGHT in present
    near = [] if weighs else get_close_matches(WEIGHT, present, 1, 0.85)
    if near:
        raise RecipeError(
            f"The column {near[0]!r} of the {name} set would be ignored. Did you mean `{WEIGHT}`? Rename or remove it."
        )
    obstacle = "the data set has images" if {"image", "images"} & {*present} else obstacle
    if obstacle and (weighs or marks):
        raise RecipeError(
            f"`{WEIGHT if weighs else 'special_tokens'}` needs to follow tokens through the collator and the loss, which it "
            f"can't here: {obstacle}. Remove {'the column' if weighs else 'it'}."
        )
    if weighs:
        check_weights(dataset, name)
    if marks and "input_ids" in present and TEMPLATE not in present:
        raise RecipeError(
            f"`special_tokens` needs to know which tokens the chat template made, and the {name} set can't tell: it holds "
            "token ids already (`input_ids`). Give messages, prompts and completions, or texts."
        )


class TemplateMark:
    """Adds `TEMPLATE` to a tokenised example. Raises RecipeError where the template's tokens can't be told from content."""

    def __init__(self, tokenizer: Any, chat_template: str | None, name: str):
        self.tokenizer, self.chat_template, self.name = tokenizer, chat_template, name

    def __call__(self, example: Any) -> dict[str, Any]:
        ids = example["input_ids"]
        if not is_conversational(example):
            return {TEMPLATE: [0] * len(ids)}
        mask = template_mask(self.tokenizer, self.chat_template, example, ids)
        if -1 in mask:
            raise RecipeError(
                f"`special_tokens` can't tell the chat template's tokens from content in row {example[ROW]} of the {self.name} "
                "set, counted from 0: its messages hold more than text (tool calls, reasoning), the template changes them, or "
                "the tokenizer is a slow one. Give messages of plain text, or remove `special_tokens`."
            )
        return {TEMPLATE: mask}


def for_each_token(columns: list[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what turns an example's columns into ones of each token, which packing cuts and joins as it does the tokens."""

    def spread(example: dict[str, Any]) -> dict[str, Any]:
        size = len(example["input_ids"])
        return {key: example[key] if isinstance(example[key], list) else [example[key]] * size for key in columns}

    return spread


def lay_out(features: list[dict[str, Any]], batch: dict[str, Any]) -> None:
    """Add to a collated batch the columns that its examples have: (batch, length) tensors, right-padded, as the labels are."""
    height, width = batch["labels"].shape
    for key, fill in FILLS.items():
        if any(key in each for each in features):
            rows = [_row(key, each) for each in features]
            rows = [torch.cat(rows)] if height < len(rows) else rows  # padding-free: one row
            laid_out = pad_sequence(rows, batch_first=True, padding_value=fill)
            batch[key] = pad(laid_out, (0, width - laid_out.shape[1]), value=fill)


def _row(key: str, example: dict[str, Any]) -> Tensor:
    """Return a column of an example, a number for each token. Raises RecipeError on what only an unprepared set may hold."""
    size, value = len(example["input_ids"]), example.get(key)
    if value is not None and hasattr(value, "tolist"):  # of a set `with_format`
        value = value.tolist()
    if isinstance(value, list) and len(value) != size:
        raise RecipeError(f"`{key}` has {len(value)} numbers for {size} tokens. Give one for each.")
    try:
        row = torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError):
        raise RecipeError(f"`{key}` of an example is {value!r}. Give every example a number, or one for each token.") from None
    wrong = row[~(row.isfinite() & (row >= 0))]
    if key == WEIGHT and len(wrong):
        raise RecipeError(f"`{key}` of an example is {wrong[0]:g}: it must be a finite number, 0 or above.")
    return row.expand(size)


class TokenColumns:
    """`objective_weight` and `is_special` of a batch's tokens, where the data or the objective have them.

    Takes the columns out of `inputs`. `special_ids`: (number,) ids of the tokens that are special wherever they stand, None if
    the objective has no `special_tokens`.
    """

    def __init__(self, inputs: dict[str, Any], special_ids: Tensor | None):
        self.columns = {key: inputs.pop(key) for key in FILLS if key in inputs}
        self.special_ids = special_ids

    def at(self, labels: Tensor, align: Callable[[Tensor, float], Tensor]) -> dict[str, Tensor]:
        """Return both at tokens with these `labels`; `align(column, fill)` takes a column's values there."""
        aligned = {key: align(value, FILLS[key]) for key, value in self.columns.items()}
        names = {WEIGHT: WEIGHT, REFERENCE: "ref_logp"}
        found = {names[key]: value for key, value in aligned.items() if key in names}
        if self.special_ids is not None:
            special = torch.isin(labels, self.special_ids.to(labels.device))
            found["is_special"] = special | (aligned[TEMPLATE] == 1) if TEMPLATE in aligned else special
        return found
