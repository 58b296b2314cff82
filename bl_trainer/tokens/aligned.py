"""Tokenised rows, a thousand at a time: whether their columns fit each other, by their Arrow arrays alone."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .names import WEIGHT

MASKS = ("completion_mask", "assistant_masks")
LENGTHS = "seq_lengths"  # of the examples that a row holds
IDS, NUMBERS = ("input_ids", "labels"), (*MASKS, "attention_mask")


def is_aligned(table: pa.Table, columns: list[str]) -> bool:
    """Whether nothing in a table needs a look, row by row: much faster than that look."""
    read = {column: table[column] for column in (*IDS, *NUMBERS) if column in table.column_names}
    if not all(_are_numbers(values, column in IDS) for column, values in read.items()):
        return False
    sizes = _sizes(table["input_ids"])
    sized = [column for column in columns if column != WEIGHT or pa.types.is_nested(table[column].type)]
    if LENGTHS in sized:
        sized.remove(LENGTHS)
        if not _are_whole(table[LENGTHS], sizes.to_numpy()):
            return False
    aligned = all(pc.all(pc.fill_null(pc.equal(_sizes(table[column]), sizes), False)).as_py() for column in sized)
    return aligned and ("attention_mask" not in columns or pc.min(pc.list_flatten(table["attention_mask"])).as_py() != 0)


def _are_numbers(lists: pa.ChunkedArray, are_ids: bool) -> bool:
    """Whether a column holds lists of numbers, all of them there; of whole ones if they are ids."""
    if not is_list(lists.type):
        return False
    kind = lists.type.value_type
    fits = pa.types.is_integer(kind) or (not are_ids and (pa.types.is_boolean(kind) or pa.types.is_floating(kind)))
    return fits and not lists.null_count and not pc.list_flatten(lists).null_count


def _are_whole(lengths: pa.ChunkedArray, sizes: np.ndarray) -> bool:
    """Whether the lengths of the examples of each row make up its tokens."""
    if not _are_numbers(lengths, True) or not pc.all(pc.greater(pc.list_flatten(lengths), 0)).as_py():
        return False
    ends = np.append(0, np.cumsum(pc.list_flatten(lengths).to_numpy()))[np.cumsum(pc.list_value_length(lengths).to_numpy())]
    return bool((ends == np.cumsum(sizes)).all())


def is_list(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _sizes(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.list_value_length(lists) if is_list(lists.type) else pa.nulls(len(lists), pa.int32())
