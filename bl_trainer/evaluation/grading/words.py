"""Words, compared by exact match and Jaro-Winkler."""

from typing import Any

from ...errors import RecipeError
from .docs import read_docs
from .reasoning import without_reasoning

WORD_GOLD = ("answer", "completion")


def word_docs(docs: Any) -> Any:
    """Rows with `question` and `gold`."""
    _rapidfuzz()
    return read_docs(docs, WORD_GOLD, lambda doc, right: {"gold": right})


def _rapidfuzz() -> Any:
    try:
        from rapidfuzz.distance import JaroWinkler
    except ImportError as error:
        raise RecipeError(f"grading it needs rapidfuzz ({error}). Run `pip install '.[evaluation]'`.") from error
    return JaroWinkler


def grade_word(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Compare an answer with `gold`: as it is; in lower case without whitespace at the ends; and so by Jaro-Winkler (0 to 1).

    Jaro-Winkler has the prefix weight 0.1, over at most 4 characters, above a Jaro similarity of 0.7.
    """
    said = without_reasoning(results[0])
    answer, right = (text.strip().lower() for text in (said, doc["gold"]))
    return {
        "exact_match": float(said == doc["gold"]),
        "normalised_match": float(answer == right),
        "jaro_winkler": _rapidfuzz().similarity(answer, right) if answer else 0.0,
    }
