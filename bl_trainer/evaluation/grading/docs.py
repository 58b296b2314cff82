"""Rows of a task's data: the question, and the gold answer as a text."""

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from ...errors import RecipeError
from ..choices import COLUMNS, PLACES, right_place

QUESTIONS = ("question", "problem", "Problem", "Question")


def read_docs(docs: Any, columns: tuple[str, ...], row: Callable[[dict[str, Any], Any], dict[str, Any]]) -> Any:
    """Return `docs` with what `row` makes of each row and its gold answer, which stands in the first of `columns` there is."""
    has = docs.column_names
    column = next((name for name in columns if name in has), None)
    asked = next((name for name in ("prompt", *QUESTIONS) if name in has), None)
    if column is None or asked is None:
        needed = f"one of {', '.join(columns)} with the gold answer" if asked else f"one of prompt, {', '.join(QUESTIONS[:2])}"
        raise RecipeError(f"it has the columns {', '.join(sorted(has))}. Needed: {needed}.")

    def read(doc: dict[str, Any], i: int) -> dict[str, Any]:
        question = next((str(doc[name]).strip() for name in ("prompt", *QUESTIONS) if doc.get(name)), "")
        if not question:
            raise RecipeError(f"row {i + 1} has no question.")
        try:
            return {"question": question, **row({**doc, "question": question}, _right(doc, column))}
        except ValueError as error:
            raise RecipeError(f"row {i + 1}: {error}") from error

    return docs.map(read, with_indices=True)


def _right(doc: dict[str, Any], column: str) -> str | int:
    """Return the gold answer: a text, or the place of the right option where a column says it by its letter or number."""
    right = gold_text(doc[column])
    if column not in PLACES or not right:
        return right
    others = {name: doc[name] for name in (*PLACES, "answer") if name != column and name in doc}
    said = {name: gold_text(value) for name, value in others.items() if type(value) in (str, int)}  # others settle nothing
    place = right_place(column, right, {name: text for name, text in said.items() if text}, _options(doc))
    return right if place is None else place


def _options(doc: dict[str, Any]) -> Any:
    return next((doc[name] for name in COLUMNS if doc.get(name) is not None), None)


def gold_text(value: Any) -> str:
    """Return a gold answer as a text, of messages the last one's; empty if there is none.

    Raises ValueError if it is neither a text, a finite number, a list of these, nor messages.
    """
    if value is None:
        return ""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        text = value[-1].get("content")
        if not isinstance(text, str):
            raise ValueError(f"the gold answer is messages, the last with the content {text!r}. Write a text there.")
        return text
    return ", ".join(map(_plain, value)) if isinstance(value, list) else _plain(value).strip()


def _plain(value: Any) -> str:
    """Return a text, or a number without a fraction of zero, as a text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)) or not math.isfinite(value):
        raise ValueError(
            f"the gold answer is or holds {str(value)[:40]}, of type {type(value).__name__}. Write a text, a finite number, or "
            "a list of these."
        )
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
