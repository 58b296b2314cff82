"""The options of a multiple-choice row, in any of the layouts in which data sets give them."""

import json
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

COLUMNS = ("options", "choices")
LAYOUTS = (("key", "value"), ("label", "text"), ("id", "text"))  # what data sets call an option's label and its text


def read_choices(options: Any) -> tuple[list[str], list[str] | None]:
    """Return the texts of the options, and their labels, or None where their order alone tells them apart.

    Args:
        options: a list of texts; a mapping from label to text; a list of mappings `{"key": ..., "value": ...}`; a mapping
            `{"label": [...], "text": [...]}`; or any of these as JSON text. None means no options.

    Raises ValueError on anything else.
    """
    if isinstance(options, str):
        options = _parsed(options)
    labels, texts = _taken_apart(options)
    labels = None if labels is None else [label.strip(" ().:") for label in labels]
    texts = [_text(text) for text in texts]
    if len(texts) > len(ascii_uppercase):
        raise ValueError(f"it has {len(texts)} options. At most {len(ascii_uppercase)} have a letter.")
    if labels is not None and len({label.casefold() for label in labels}) < len(labels):
        raise ValueError(f"two options have the same label: {', '.join(labels)}.")
    return texts, labels


def _parsed(options: str) -> Any:
    try:
        return json.loads(options)
    except json.JSONDecodeError as error:
        raise ValueError(f"its options are a text that is not JSON: {error.msg}. Write a list of texts.") from error


def _taken_apart(options: Any) -> tuple[list[str] | None, list[Any]]:
    if options is None:
        return None, []
    if isinstance(options, Mapping):
        return _of_mapping(options)
    if isinstance(options, list) and any(isinstance(option, Mapping) for option in options):
        pairs = [_pair(option) for option in options]
        return [label for label, _ in pairs], [text for _, text in pairs]
    if isinstance(options, list):
        return None, options
    raise ValueError(f"its options are {options!r}. Write a list of texts, or a mapping from letters to texts.")


def _of_mapping(options: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    for label, text in LAYOUTS:
        if {label, text} <= options.keys() and isinstance(options[text], list):
            labels = options[label]
            if not isinstance(labels, list) or len(labels) != len(options[text]):
                raise ValueError(f"its options have {len(options[text])} texts, and other labels: {labels!r}.")
            return [*map(str, labels)], options[text]
    given = {key: text for key, text in options.items() if text is not None}  # Arrow gives each row the keys of all rows
    labels = _ordered([*given])
    return labels, [given[label] for label in labels]


def _ordered(labels: list[str]) -> list[str]:
    """Return letters or numbers in their order, and other labels in the order in which they are given."""
    if all(label.isdecimal() for label in labels):
        return sorted(labels, key=int)
    return sorted(labels, key=str.casefold) if all(len(label) == 1 for label in labels) else labels


def _pair(option: Any) -> tuple[str, Any]:
    for label, text in LAYOUTS:
        if isinstance(option, Mapping) and {label, text} <= option.keys():
            return str(option[label]), option[text]
    named = " or ".join(f"{label} and {text}" for label, text in LAYOUTS)
    raise ValueError(f"one of its options is {option!r}. Write texts, or mappings with {named}.")


def _text(text: Any) -> str:
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise ValueError(f"one of its options is {text!r}, not a text.")
    return str(text)


def right_index(right: str, is_number: bool, texts: list[str], labels: list[str] | None) -> int | None:
    """Return the place of the right answer among the options, None if it is given in another way, such as `(B)`.

    A label comes first, then an option's text. A number counts from 0, unless the labels are numbers themselves.
    """
    if labels is not None and right.casefold() in (folded := [label.casefold() for label in labels]):
        return folded.index(right.casefold())
    if right in texts and not is_number:
        return texts.index(right)
    counts = right.isdigit() and not any(label.isdigit() for label in labels or ())
    return int(right) if counts and int(right) < len(texts) else None
