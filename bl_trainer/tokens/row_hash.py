"""A hash of a row's training text, by which its score is found again."""

import hashlib
import json
from typing import Any

from datasets import Dataset

from .labels import OF_TOKENS, columns_of
from .layouts import find_layout


def row_hash(row: dict[str, Any]) -> str:
    """Return a hash of a row's training text: blake2b, 8 bytes, of its JSON with sorted keys and without nulls."""
    text = json.dumps(_without_nulls(row), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def hashed_columns(dataset: Dataset, text_field: str) -> list[str]:
    """Return the columns of a training set that are hashed: those that make its text."""
    texts = find_layout(dataset[0], "the training set", text_field)
    return [name for name in columns_of(dataset) if name in {*texts, *OF_TOKENS, "tools", "chat_template_kwargs"}]


def hashes_of(dataset: Dataset, columns: list[str]) -> list[str]:
    """Return the hash of each row of a data set, by these columns."""
    return [row_hash(row) for row in dataset.select_columns(columns)]


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys that only other rows of the data set have, which loading fills with None."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
