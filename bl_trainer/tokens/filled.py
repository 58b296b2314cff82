"""Nulls that Arrow puts into calls and tools, which have all keys of a column's rows."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .aligned import is_list

CALLS = "tool_calls"  # key of a message
TOOLS = "tools"  # column
CHATS = ("messages", "prompt", "completion")


def has_filled(dataset: Dataset) -> bool:
    """Whether calls or tools have keys that hold null in some rows and a value in others."""
    columns = {name: dataset.data.column(name) for name in (*CHATS, TOOLS) if name in dataset.column_names}
    return any(_has_filled(_of_calls(column) if name in CHATS else column) for name, column in columns.items())


def without_nulls(value: Any) -> Any:
    """Return calls or tools without the keys that hold null."""
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {key: without_nulls(each) for key, each in value.items() if each is not None}


def unfilled(messages: list[dict[str, Any]], example: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages and their example without nulls in calls and tools."""
    calls = [{**each, CALLS: without_nulls(each[CALLS])} if each.get(CALLS) else each for each in messages]
    tools = {TOOLS: without_nulls(example[TOOLS])} if isinstance(example.get(TOOLS), list) else {}
    return calls, {**example, **tools}


def _of_calls(chats: pa.ChunkedArray) -> pa.ChunkedArray | None:
    messages = pc.list_flatten(chats) if is_list(chats.type) else None
    if messages is None or not pa.types.is_struct(messages.type) or messages.type.get_field_index(CALLS) < 0:
        return None
    return pc.struct_field(messages, CALLS)


def _has_filled(values: pa.ChunkedArray | None) -> bool:
    if values is None or isinstance(values.type, pa.BaseExtensionType):  # JSON, which keeps the keys of each row
        return False
    if is_list(values.type):
        return _has_filled(pc.list_flatten(values))
    if not pa.types.is_struct(values.type):
        return False
    present = values.drop_null()
    parts = [pc.struct_field(present, [i]) for i in range(values.type.num_fields)]
    return any(0 < part.null_count < len(part) or _has_filled(part) for part in parts)
