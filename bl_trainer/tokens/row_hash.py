"""A hash of a row's training text, by which its score is found again."""

import hashlib
import json
from typing import Any

from datasets import Dataset

from .aligned import LENGTHS
from .labels import SIZED, columns_of
from .layouts import find_layout
from .names import WEIGHT

SAMPLED = 64  # rows that stand for a set, spread evenly


def row_hash(row: dict[str, Any]) -> str:
    """Return a hash of a row's training text: blake2b, 8 bytes, of its JSON with sorted keys and without nulls."""
    text = json.dumps(_without_nulls(row), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def hashed_columns(dataset: Dataset, text_field: str) -> list[str]:
    """Return the columns of a training set that are hashed: those that make its text, and those that choose its targets."""
    texts = find_layout(dataset[0], "the training set", text_field)
    return [name for name in columns_of(dataset) if name in {*texts, *SIZED, LENGTHS, "tools", "chat_template_kwargs"}]


def hashes_of(dataset: Dataset, columns: list[str]) -> list[str]:
    """Return the hash of each row of a data set, by these columns."""
    return [row_hash(row) for row in dataset.select_columns(columns)]


def sample_of(dataset: Any) -> dict[str, Any] | None:
    """Return the number of a training set's rows, and hashes of the tokens and of the targets of 64 of them.

    `hash`: of the tokens. `targets`: of labels, masks, weights and `seq_lengths`. None where it has no tokens yet.
    """
    if not isinstance(dataset, Dataset) or not len(dataset) or "input_ids" not in dataset.column_names:
        return None
    last = len(dataset) - 1
    numbers = sorted({i * last // (SAMPLED - 1) for i in range(SAMPLED)})
    present = [name for name in (*SIZED, WEIGHT, LENGTHS) if name in dataset.column_names]
    rows = [*dataset.with_format(None).select_columns(["input_ids", *present]).select(numbers)]
    targets = row_hash({name: [row[name] for row in rows] for name in present})
    tokens = row_hash({"rows": [list(map(int, row["input_ids"])) for row in rows]})
    return {"count": len(dataset), "hash": tokens, "targets": targets}


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys that only other rows of the data set have, which loading fills with None."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
