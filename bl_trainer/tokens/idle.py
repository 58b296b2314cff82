"""Keys and columns that would choose which tokens train, without effect: each is refused by name."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from .._util.logs import warn_once
from .._util.text import is_number
from ..errors import RecipeError
from ..head.targets import IGNORED
from .aligned import MASKS
from .labels import OF_TOKENS, SIZED, check_row, check_rows, first_row, refuse_shifted
from .messages import trains_in_full
from .names import REFERENCE, TOKEN_WEIGHT, WEIGHT
from .spans import refuse_untrained

CHATS = ("prompt", "completion", "messages", "conversations")
OF_TOKENIZERS = ("attention_mask", "special_tokens_mask")  # which tokenizers add of themselves


def check_labels(sets: Mapping[str, Any], args: Any, owns_text: bool = False) -> None:
    """Raise RecipeError on labels and masks that are wrong, and on keys and columns that choose targets without effect.

    Args:
        sets: The training set, then the evaluation sets, by name.
        args: An `SFTConfig`, or None.
        owns_text: Whether a `formatting_func` renders the examples.
    """
    asks, trained = getattr(args, "completion_only_loss", None), next(iter(sets), "")
    for name, dataset in sets.items():
        first = first_row(dataset)
        if name == trained and first is not None:  # a key may have no effect on evaluation sets
            asks = True if asks is None and {"prompt", "completion"} <= first.keys() else asks
            _refuse_idle_keys(first, name, args, owns_text)
        check_labels_of(dataset, name, args, asks)


def check_labels_of(dataset: Any, name: str, args: Any, completion_only: bool | None) -> None:
    """Raise RecipeError on one set, as `check_labels`. `completion_only`: None where nobody has decided."""
    first = first_row(dataset)
    if first is None:
        raise RecipeError(f"The {name} set is empty.")
    if "input_ids" in first:
        if isinstance(dataset, IterableDataset) or not hasattr(first["input_ids"], "__len__"):
            check_row(first, 0, name)  # a stream's others are checked as they are read
        _refuse_idle_on_tokens(first, name, args, completion_only)
    else:
        _refuse_idle_on_text(first, name)
    _warn_of_weights(first, name)
    if isinstance(dataset, Dataset):
        check_rows(dataset, name)
        refuse_untrained(dataset, name, getattr(args, "assistant_only_loss", False), bool(completion_only))
    if {"input_ids", "labels"} <= first.keys():
        _refuse_shifted(first, name)


def _refuse_shifted(first: dict[str, Any], name: str) -> None:
    """Raise RecipeError if the first row's labels are shifted; a collator looks at every batch."""
    ids, labels = (torch.as_tensor(first[key])[None] for key in ("input_ids", "labels"))
    if ids.shape == labels.shape and (labels != IGNORED).sum() > 1:
        refuse_shifted(ids, labels, f"row 0 of the {name} set, counted from 0")


def _warn_of_weights(first: dict[str, Any], name: str) -> None:
    for column in () if WEIGHT in first else [key for key in first if key != TOKEN_WEIGHT]:
        lists = isinstance(first[column], list)
        value = first[column][0] if lists and first[column] else first[column]
        counts = is_number(value) or isinstance(value, bool)
        if counts and trains_in_full(column) is not None and not (lists and "mask" in column):  # which `_refuse_unread` knows
            warn_once(f"The column `{column}` of the {name} set has no effect. To weight rows, rename it to `{WEIGHT}`.")


def _refuse_idle_keys(first: dict[str, Any], name: str, args: Any, owns_text: bool) -> None:
    _refuse_idle_text_field(first, name, args)
    if "input_ids" in first:
        _refuse_idle_keys_on_tokens(first, name, args)
    elif not owns_text:
        _refuse_idle_keys_on_text(first, name, args)
    elif getattr(args, "assistant_only_loss", False):
        raise RecipeError(
            f"`assistant_only_loss: true` has no effect on the {name} set: `formatting_func` makes texts without roles. Remove "
            "one of the two."
        )


def _refuse_idle_text_field(first: dict[str, Any], name: str, args: Any) -> None:
    text, rules = getattr(args, "dataset_text_field", "text"), [key for key in ("input_ids", *CHATS) if key in first]
    if text != "text" and rules:
        raise RecipeError(
            f"`dataset_text_field: {text}` has no effect on the {name} set: its column `{rules[0]}` is trained. Remove the "
            "key, or that column."
        )


def _refuse_idle_on_text(first: dict[str, Any], name: str) -> None:
    for column in (*OF_TOKENS, "seq_lengths"):
        if column in first:
            raise RecipeError(
                f"Cannot use the column `{column}` of the {name} set: it has no `input_ids` to go with. Remove the column, or "
                "give `input_ids` as well."
            )


def _refuse_idle_keys_on_text(first: dict[str, Any], name: str, args: Any) -> None:
    is_chat = any(isinstance(first.get(key), list) for key in CHATS)
    if getattr(args, "completion_only_loss", None) and not {"prompt", "completion"} <= first.keys():
        instead = "Write `assistant_only_loss: true` instead" if is_chat else "Remove it"
        raise RecipeError(
            f"`completion_only_loss: true` has no effect on the {name} set: it has no prompt and completion. {instead}, or "
            "split each row into the columns `prompt` and `completion`."
        )
    if getattr(args, "assistant_only_loss", False) and not is_chat:
        instead = "Write `completion_only_loss: true` instead" if "completion" in first else "Remove it"
        raise RecipeError(
            f"`assistant_only_loss: true` has no effect on the {name} set: it has no messages. {instead}, or give messages "
            "with roles."
        )


def _refuse_idle_keys_on_tokens(first: dict[str, Any], name: str, args: Any) -> None:
    labelled = "labels" in first
    if getattr(args, "completion_only_loss", None) and (labelled or "completion_mask" not in first):
        why = "its `labels` choose the targets" if labelled else "it has `input_ids` without `completion_mask`"
        how = "Remove the key" if labelled else "Add the column `completion_mask`, or `labels` with -100 for each prompt token"
        raise RecipeError(f"`completion_only_loss: true` has no effect on the {name} set: {why}. {how}.")
    if getattr(args, "assistant_only_loss", False):
        raise RecipeError(
            f"`assistant_only_loss: true` has no effect on the {name} set: it has `input_ids`, not messages. Remove the key; "
            "a column `assistant_masks` works without it."
        )


def _refuse_idle_on_tokens(first: dict[str, Any], name: str, args: Any, completion_only: bool | None) -> None:
    """Raise RecipeError on what has no effect beside `input_ids`. `completion_only`: None where nobody has decided."""
    _refuse_unread(first, name)
    labelled, masked = "labels" in first, "completion_mask" in first
    ruled = [mask for mask in MASKS if mask in first and (mask != "completion_mask" or completion_only is not False)]
    if labelled and ruled:
        raise RecipeError(
            f"The column `{ruled[0]}` of the {name} set has no effect: its `labels` choose the targets. Remove one of the two."
        )
    if masked and completion_only is None:
        raise RecipeError(
            f"The column `completion_mask` of the {name} set has no effect without its key. Write `completion_only_loss: "
            "true`, or remove the column."
        )
    if ruled and _is_prepared(args):
        raise RecipeError(
            f"The column `{ruled[0]}` of the {name} set has no effect: `skip_prepare_dataset` makes no labels of it. "
            "Add `labels`, -100 where no token trains, or remove the key."
        )
    if "position_ids" in first:
        raise RecipeError(
            f"The column `position_ids` of the {name} set has no effect: the examples of a row would see each other. Give one "
            "example per row, or its `seq_lengths`, and remove the column."
        )
    if "seq_lengths" in first and not _keeps_apart(args):
        raise RecipeError(
            f"The column `seq_lengths` of the {name} set has no effect: packed examples would see each other. Write "
            "`padding_free: true` without `packing`, or give one example per row."
        )


def _keeps_apart(args: Any) -> bool:
    """Whether the column `seq_lengths` of rows that are packed already keeps their examples apart."""
    packs = getattr(args, "packing", False)
    flattens = getattr(args, "padding_free", False) or (packs and args.packing_strategy.startswith("bfd"))
    return flattens and (_is_prepared(args) or not packs)


def _is_prepared(args: Any) -> bool:
    return bool((getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset", False))


def _refuse_unread(first: dict[str, Any], name: str) -> None:
    """Raise RecipeError on a column of numbers for each token whose name is nearly right, or that of an unknown mask.

    Beside `labels`, which choose the targets, a mask may stay.
    """
    masks = () if "labels" in first else OF_TOKENS
    for column, value in first.items():
        known = column in (*SIZED, *OF_TOKENIZERS, REFERENCE)
        if known or not isinstance(value, list) or len(value) != len(first["input_ids"]):
            continue
        near = get_close_matches(column, {*masks, REFERENCE, TOKEN_WEIGHT} - first.keys(), 1, 0.85)
        if near or ("mask" in column and masks):
            instead = f"`{near[0]}`" if near else "`labels`, the token's id where it trains and -100 where not"
            raise RecipeError(f"The column {column!r} of the {name} set has no effect. Write {instead}, or remove it.")
