"""Reading what a recipe gives: numbers that reach us as text, and names that are nearly right."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import RecipeError

SECRETS = ("hub_token", "push_to_hub_token")  # keys whose values are neither shown nor recorded


def nearest(name: Any, allowed: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` if one of `allowed` looks like `name`, or nothing.

    A number is no name: YAML reads `{alpha: 0,5}` as the two keys `alpha` and `5`.
    """
    if type(name) in (int, float):
        return " A decimal comma must be a point: write e.g. `0.5`, not `0,5`."
    match = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def listed(faults: Sequence[str], where: str) -> str:
    """Return several mistakes in `where` as a list, a line each; a single one as it is."""
    if len(faults) == 1:
        return faults[0]
    return "\n".join([f"There are {len(faults)} mistakes in {where}:", *(f"  - {fault}" for fault in faults)])


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def to_exponent(value: Any) -> Any:
    """Read `1e-3`, which YAML takes for text; other text may be meant as such. torch has no whole numbers beyond 64 bits."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return float(value) if abs(value) < 10**300 else math.copysign(math.inf, value)
    is_exponent = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if is_exponent else value


def to_number(value: Any) -> Any:
    """Read a number that reaches us as text, from the command line or as `1e-3` from YAML."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def from_json(key: str, value: Any, example: str) -> Any:
    """Return the mapping that JSON text for `key` spells, and anything else as it is. Raises RecipeError on broken JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RecipeError(f"`{key}` is not valid JSON ({error}): {value}. Write e.g. --{key} '{example}'.") from error


def sentence(error: BaseException) -> str:
    """Return an exception's message on one line; that of `datasets` names its cause besides."""
    is_of_datasets = any(kind.__name__ == "DatasetsError" for kind in type(error).__mro__)  # by name: importing it is slow
    cause = f": {error.__cause__}" if is_of_datasets and error.__cause__ else ""
    return " ".join(f"{error}{cause}".split()) or type(error).__name__


def without_secrets(given: dict[str, Any]) -> dict[str, Any]:
    """Return recipe keys with the values of `env` and of tokens left out."""
    hidden: dict[str, Any] = {key: "<redacted>" for key in SECRETS if key in given}
    if "env" in given:
        hidden["env"] = dict.fromkeys(given["env"], "<redacted>")
    return {**given, **hidden}
