"""Which tokens of a data set train: its labels and masks, and the keys and columns that would have no say in it."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from numbers import Integral, Real
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from .._util.logs import warn_once
from ..errors import RecipeError
from ..head.targets import IGNORED, are_shifted
from .aligned import IDS, LENGTHS, MASKS, NUMBERS, is_aligned
from .messages import short
from .names import REFERENCE, TOKEN_WEIGHT, WEIGHT

OF_TOKENS = ("labels", *MASKS)  # one number for each of `input_ids`
SIZED = (*OF_TOKENS, TOKEN_WEIGHT)
# What a stream's rows are read by: each has what its first row has, and no more
IN_ALL_ROWS = ("input_ids", *SIZED, WEIGHT, REFERENCE, LENGTHS)
IN_NO_LATER_ROW = (*IN_ALL_ROWS, "attention_mask", "position_ids", "prompt", "completion", "image", "images")


_first_rows: WeakKeyDictionary[IterableDataset, Any] = WeakKeyDictionary()  # a stream is costly to start


def columns_of(dataset: Any) -> list[str]:
    """Return the names of the columns that a data set's rows have, also a stream's."""
    if not isinstance(dataset, Dataset):
        return list(dataset.column_names or first_row(dataset) or {})
    return list(dataset.column_names if dataset.format["output_all_columns"] else dataset.format["columns"])


def plain(dataset: Any) -> Any:
    """Return a data set that gives lists and numbers, not tensors or arrays; a `with_transform` is left to the user."""
    if not isinstance(dataset, Dataset):
        return handed_on(dataset, dataset.with_format(None)) if isinstance(dataset, IterableDataset) else dataset
    kind, shown = dataset.format["type"], columns_of(dataset)
    if kind == "custom" or (kind is None and shown == dataset.column_names):
        return dataset
    return dataset.select_columns(shown).with_format(None)


def first_row(dataset: Any) -> Any:
    """Return the first row, None if there is none. A stream is read once."""
    if not isinstance(dataset, IterableDataset):
        return next(iter(plain(dataset)), None)
    if dataset not in _first_rows:
        _first_rows[dataset] = next(iter(dataset.with_format(None)), None)
    return _first_rows[dataset]


def handed_on(dataset: IterableDataset, made: IterableDataset) -> IterableDataset:
    """Return the stream `made` of `dataset` with the same rows, whose first is known if the other's is."""
    if dataset in _first_rows:
        _first_rows[made] = _first_rows[dataset]
    return made


def check_rows(dataset: Any, name: str) -> Any:
    """Return a data set, its ids, labels and masks checked; a stream's are checked as it is read.

    Raises RecipeError with the number of the first row that is wrong, in a stream also of one with other columns than the
    first.
    """
    if isinstance(dataset, IterableDataset):
        first = frozenset(first_row(dataset) or ())
        return handed_on(dataset, dataset.map(_check_streamed, with_indices=True, fn_kwargs={"name": name, "first": first}))
    present = columns_of(dataset)
    columns = [column for column in (*SIZED, WEIGHT, "attention_mask", LENGTHS) if column in present]
    if "input_ids" in present and dataset.format["type"] != "custom":
        start = 0
        for table in plain(dataset).select_columns(["input_ids", *columns]).with_format("arrow").iter(1000):
            if not is_aligned(table, columns):
                for row, example in enumerate(table.to_pylist(), start):
                    check_row(example, row, name)
            start += len(table)
    return dataset


def _check_streamed(example: dict[str, Any], row: int, name: str, first: frozenset[str]) -> dict[str, Any]:
    more = [column for column in IN_NO_LATER_ROW if example.get(column) is not None and column not in first]
    less = [column for column in IN_ALL_ROWS if column in first and column not in example]
    if more or less:
        found, instead = ("has", "lacks") if more else ("lacks", "has")
        raise RecipeError(
            f"Cannot train on row {row} of the {name} set, counted from 0: it {found} the column `{[*more, *less][0]}`, which "
            f"the first row of the stream {instead}. Give all rows the same columns."
        )
    return check_row(example, row, name) if "input_ids" in first else {}


def check_row(example: dict[str, Any], row: int | None, name: str) -> dict[str, Any]:
    """Raise RecipeError on a tokenised row whose ids, labels or masks can't be trained on. Returns no column."""
    which = f"row {row} of the {name} set, counted from 0" if row is not None else f"an example of the {name} set"
    _refuse_no_numbers(example, "input_ids", which)
    size = len(example["input_ids"])
    sized = (*SIZED, WEIGHT) if isinstance(example.get(WEIGHT), list) else SIZED
    for column in sized:
        if column in example and (not hasattr(example[column], "__len__") or len(example[column]) != size):
            value = example[column]
            count = f"{len(value)} numbers" if hasattr(value, "__len__") else repr(value)
            raise RecipeError(
                f"Cannot train on {which}: `{column}` has {count} for {size} tokens. Give one number for each of `input_ids`."
            )
    for column in ("labels", *NUMBERS):
        _refuse_no_numbers(example, column, which)
    lengths = example.get(LENGTHS)
    if lengths is not None:
        _refuse_no_numbers(example, LENGTHS, which)
        if sum(lengths) != size or min(lengths, default=0) < 1:
            raise RecipeError(
                f"Cannot train on {which}: its `{LENGTHS}`, {short([*lengths])}, are not those of {size} tokens. Give the "
                "length of each example in the row."
            )
    mask = example.get("attention_mask")
    mask = () if mask is None else list(mask)
    targets = [not hidden and label != IGNORED for hidden, label in zip(mask, _labels_of(example), strict=False)]
    if any(targets) or 0 in mask[: sum(map(bool, mask))]:
        raise RecipeError(
            f"Cannot train on {which}: its `attention_mask` hides tokens and is not read. Leave the padding out; the trainer "
            "pads."
        )
    return {}


def _refuse_no_numbers(example: dict[str, Any], column: str, which: str) -> None:
    """Raise RecipeError unless a column, if it is there, is a list of numbers, of whole ones if these are ids."""
    if column not in example or (column == "attention_mask" and example[column] is None):
        return
    value = example[column].tolist() if hasattr(example[column], "tolist") else example[column]
    kind, what = (Integral, "a token id") if column in IDS else (Real, "a number")
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"Cannot train on {which}: `{column}` is {short(value)}, not a list. Give {what} for each token.")
    if not all(issubclass(each, kind) for each in {*map(type, value)}):
        wrong = next(each for each in value if not isinstance(each, kind))
        raise RecipeError(f"Cannot train on {which}: `{column}` has {short(wrong)}, which is not {what}. Correct the row.")


def check_example(example: dict[str, Any]) -> None:
    """Raise RecipeError on an example for the collator whose labels are not as many as its tokens."""
    check_row({key: example[key] for key in ("input_ids", "labels") if key in example}, None, "train or evaluation")


def refuse_shifted(ids: Any, labels: Any, which: str = "these rows") -> None:
    """Raise RecipeError if labels, (rows, length) as the ids, stand a place before their tokens."""
    if are_shifted(ids, labels):
        raise RecipeError(
            f"Cannot train on {which}: `labels` are shifted already, each a place before its token, and the loss shifts them. "
            "Give each label at its own token."
        )


def refuse_misaligned(batch: Mapping[str, Any]) -> None:
    """Raise RecipeError on a batch, of whatever collator, that has not one label for each token."""
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if labels is not None and ids is not None and labels.shape != ids.shape:
        raise RecipeError(
            f"Cannot train: the `data_collator` gives labels of shape {(*labels.shape,)} for tokens of shape {(*ids.shape,)}. "
            "Give one label for each token, -100 where none is to train."
        )


def _labels_of(example: dict[str, Any]) -> list[int]:
    return example.get("labels", example["input_ids"])


def targets_of(example: dict[str, Any]) -> list[int]:
    """Return the positions of a prepared example's targets: labels of tokens that others stand before."""
    starts = {0, *accumulate(example.get("seq_lengths") or ())}
    return [i for i, label in enumerate(_labels_of(example)) if label != IGNORED and i not in starts]


def refuse_without_target(
    rows: Iterable[dict[str, Any]], name: str, args: Any, uncut: Callable[[], Iterable[dict[str, Any]]] = tuple
) -> None:
    """Raise RecipeError if no row has a target. `uncut`: gives the same rows before they are cut to length."""
    if any(map(targets_of, rows)):
        return
    firsts = [found[0] for example in uncut() if (found := targets_of(example))]
    if firsts:
        starts = args.packing or args.truncation_mode == "keep_start"
        how = f" to at least {min(firsts) + 1}" if starts else ", or write `truncation_mode: keep_start`"
        raise RecipeError(
            f"Cannot use the {name} set: `max_length: {args.max_length}` cuts every target off, in all rows. Raise it{how}."
        )
    raise RecipeError(
        f"Cannot use the {name} set: no row has a target. Every label is -100, has the weight 0, or is that of a row's first "
        "token, which nothing predicts. Check `labels`, the masks, the weights and the chat template."
    )


def why_untrained(max_length: int | None, masks: bool) -> str:
    """Return why rows may not train. `masks`: whether weights of 0 do."""
    causes = {"their weights are 0": masks, f"`max_length: {max_length}` cuts their targets off": max_length is not None}
    return ", or ".join([*(cause for cause, holds in causes.items() if holds), "they have none"])


def warn_of_untrained(dataset: Any, prepared: Any, name: str, args: Any, masks: Callable[[], bool]) -> None:
    """Warn with the number of rows of a prepared set without a target, or dropped for that; a stream's `StreamCount` counts.

    `dataset`: the same rows before they are prepared. Rows that packing cuts into several are not counted. `masks`: tells
    whether weights of 0 mask.
    """
    if not (isinstance(dataset, Dataset) and isinstance(prepared, Dataset)):
        return
    total, (examples, blank) = len(dataset), _count_blank(prepared)
    wraps = "seq_lengths" not in columns_of(prepared) and args.packing_strategy == "wrapped"
    if examples > total or (examples < total and wraps):
        return
    blank += total - examples
    own = min(blank, _count_blank(dataset)[1] if "input_ids" in dataset.column_names else 0)
    if blank > own:
        warn_once(
            f"{blank - own} of {total} rows of the {name} set do not train: {why_untrained(args.max_length, masks())}. Raise "
            "`max_length`, or correct the rows."
        )
    if own:
        warn_once(f"{own} of {total} rows of the {name} set do not train: all their labels are -100. Correct or remove them.")


def _count_blank(dataset: Dataset) -> tuple[int, int]:
    """Count the examples, which are rows or packed into rows, and those of them whose labels are all -100."""
    present = columns_of(dataset)
    if "labels" not in present or dataset.format["type"] == "custom":
        return len(dataset), 0
    columns = [column for column in ("labels", "seq_lengths") if column in present]
    tables = plain(dataset).select_columns(columns).with_format("arrow").iter(1000)
    counts = [_blank(table.combine_chunks()) for table in tables]
    return sum(examples for examples, _ in counts), sum(blank for _, blank in counts)


def _blank(table: pa.Table) -> tuple[int, int]:
    labels = table["labels"]
    sizes = pc.list_flatten(table["seq_lengths"]) if "seq_lengths" in table.column_names else pc.list_value_length(labels)
    sizes, targets = sizes.to_numpy(), np.append(pc.list_flatten(labels).to_numpy() != IGNORED, False)
    counts = np.add.reduceat(targets, np.cumsum(sizes) - sizes, dtype=int)  # of an empty one the next target
    return len(sizes), int(((counts == 0) | (sizes == 0)).sum())


def check_ids(dataset: Any, name: str, size: int | None) -> Any:
    """Return a data set whose token ids and labels are below `size`, the number of a model's embeddings, or None.

    A stream is checked as it is read. Raises RecipeError with the first row of others.
    """
    columns = [column for column in columns_of(dataset) if column in ("input_ids", "labels")]
    if size is None or "input_ids" not in columns:
        return dataset
    check = partial(_check_ids, columns=columns, name=name, size=size)
    if isinstance(dataset, IterableDataset):
        return handed_on(dataset, dataset.map(check, with_indices=True))
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        start = 0
        for table in plain(dataset).select_columns(columns).with_format("arrow").iter(1000):
            if not all(_are_ids(pc.list_flatten(table[column]), column, size) for column in columns):
                for row, example in enumerate(table.to_pylist(), start):
                    check(example, row)
            start += len(table)
    return dataset


def _are_ids(values: pa.ChunkedArray, column: str, size: int) -> bool:
    if column == "labels":
        values = pc.filter(values, pc.not_equal(values, IGNORED))
    bounds = pc.min_max(values).as_py()
    return bounds["max"] is None or (bounds["min"] >= 0 and bounds["max"] < size)


def _check_ids(example: dict[str, Any], row: int, columns: list[str], name: str, size: int) -> dict[str, Any]:
    for column in columns:
        wrong = next((each for each in example[column] if not 0 <= each < size and (column, each) != ("labels", IGNORED)), None)
        if wrong is not None:
            raise RecipeError(
                f"Cannot train on row {row} of the {name} set, counted from 0: `{column}` has {wrong}, and the model has "
                f"embeddings for 0 to {size - 1}. Use the model's own tokenizer, or correct the row."
            )
    return {}
