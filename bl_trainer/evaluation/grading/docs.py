"""Rows of a task's data: the question, and the gold answer as a text."""

from collections.abc import Callable
from typing import Any

from ...errors import RecipeError

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
            return {"question": question, **row({**doc, "question": question}, gold_text(doc[column]))}
        except ValueError as error:
            raise RecipeError(f"row {i + 1}: {error}") from error

    return docs.map(read, with_indices=True)


def gold_text(value: Any) -> str:
    """Return a gold answer as a text, of messages the last one's."""
    if isinstance(value, list):
        parts = [each["content"] if isinstance(each, dict) else str(each) for each in value]
        return parts[-1] if value and isinstance(value[0], dict) else ", ".join(parts)
    whole = isinstance(value, float) and value.is_integer()
    return "" if value is None else str(int(value) if whole else value).strip()
