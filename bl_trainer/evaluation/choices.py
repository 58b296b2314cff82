"""The options of a multiple-choice row, in any of the layouts in which data sets give them."""

import json
import re
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

COLUMNS = ("options", "choices")
PLACES = ("answer_idx", "answer_letter")  # columns of the right option's letter or number, never of its text
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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a mapping, for `json.loads`, which would keep the last of equal keys.

    Raises ValueError if a key is there twice.
    """
    keys = [key for key, _ in pairs]
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None) if len({*keys}) < len(keys) else None
    if twice is not None:
        values = " and ".join(repr(value)[:40] for key, value in pairs if key == twice)
        raise ValueError(f"the key {twice!r} is there more than once, with {values}. Keep one of them.")
    return dict(pairs)


def _parsed(options: str) -> Any:
    try:
        return json.loads(options, object_pairs_hook=unique_keys)
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


def right_index(right: str | int, is_number: bool, texts: list[str], labels: list[str] | None) -> int | None:
    """Return the place of the right answer among the options, None if it is given in another way, such as in a sentence.

    A label or a letter comes first, then an option's text. A number counts from 0, unless the labels are numbers themselves. An
    option's text comes before the number of another. An int is the place itself, as `right_place` has found it.

    Raises ValueError if a letter is another option's text, or stands with another option's text.
    """
    if isinstance(right, int):
        return right
    named = [] if is_number else _named(right, texts)
    place = _labelled(right, texts, labels)
    if place is not None and named and place not in named and not right.isdigit():  # a number that is a label is taken as one
        raise ValueError(
            f"the gold answer {right!r} is the letter of {texts[place]!r}, and the text of another option. Write the letter of "
            "the right one as `answer_idx`."
        )
    if place is None and named:
        return named[0]
    place = _with_its_text(right, texts, labels) if place is None else place
    return _counted(right, texts, labels) if place is None else place


def _with_its_text(right: str, texts: list[str], labels: list[str] | None) -> int | None:
    """Return the place that a letter and its option's text give; None for no letter, or more than that, which may be prose.

    Raises ValueError if the text is another one.
    """
    lettered = _lettered(right, labels, len(texts)) if texts else None
    if lettered is None:
        return None
    place, said = lettered
    begun = _begun(said, texts)
    if begun is None and "\n" in said:
        return None
    if begun != texts[place]:
        raise ValueError(
            f"the gold answer {right!r} has the letter of {texts[place]!r}, and another text. Correct it, or write the letter "
            "alone."
        )
    return place if _plain(said) == _plain(begun) else None


def right_place(column: str, right: str, others: Mapping[str, str], options: Any) -> int | None:
    """Return the place of the right option, which `column`, one of `PLACES`, gives; None if it gives none.

    `others`: what other columns give as the right answer. Raises ValueError if they give another option.
    """
    texts, labels = read_choices(options)
    if _named(right, texts) and not _places(right, texts, labels):
        raise ValueError(
            f"`{column}` is {right!r}, the text of an option. Write its letter or its number, or name it `answer`."
        )
    place = _labelled(right, texts, labels)
    place = _counted(right, texts, labels) if place is None else place
    place = _with_its_text(right, texts, labels) if place is None else place
    for name, other in others.items() if place is not None else ():
        found = {*_named(other, texts), *_places(other, texts, labels)}
        if found and place not in found:
            counted = " A number counts from 0." if right.isdigit() or other.isdigit() else ""
            raise ValueError(
                f"`{column}` is {right!r}, and `{name}` is {other!r}, another option.{counted} Correct one of them."
            )
    return place


def _places(right: str, texts: list[str], labels: list[str] | None) -> list[int]:
    """Return the places that an answer may give other than by an option's text alone; none for what may be prose."""
    found = [_labelled(right, texts, labels), _counted(right, texts, labels)]
    lettered = _lettered(right, labels, len(texts))
    same = [place for place, text in enumerate(texts) if lettered and _plain(text) == _plain(lettered[1])]
    found += [lettered[0], *same] if lettered and same else []
    return [place for place in found if place is not None]


def _named(right: str, texts: list[str]) -> list[int]:
    """Return the places of the options whose text is the right answer."""
    return [place for place, text in enumerate(texts) if text.strip() == right]


def _letters(texts: int, labels: list[str] | None) -> list[str]:
    """Return what tells the options apart, in lower case; where there are none, the prompt has them, and up to ten."""
    return [label.casefold() for label in (ascii_uppercase[: texts or 10] if labels is None else labels)]


def _labelled(right: str, texts: list[str], labels: list[str] | None) -> int | None:
    """Return the place of the option with a label, such as B, (B) or \\boxed{B}."""
    bare, letters = _unboxed(right).strip(" ().:*[]").casefold(), _letters(len(texts), labels)
    return letters.index(bare) if bare in letters else None


def _counted(right: str, texts: list[str], labels: list[str] | None) -> int | None:
    counts = right.isdecimal() and not any(label.isdigit() for label in labels or ())
    return int(right) if counts and int(right) < len(texts) else None


def _lettered(right: str, labels: list[str] | None, texts: int) -> tuple[int, str] | None:
    """Return the place that a label with a text gives, such as `B. work`, and the text; None for anything else."""
    letters = _letters(texts, labels)
    any_label = "|".join(sorted(map(re.escape, filter(None, letters)), key=len, reverse=True))
    apart = r"(?:[*.:]*[)\]][*.:]*\s*|[*.:]*[.:][*.:]*\s+|\s+[-\u2013\u2014]\s+)"
    found = re.fullmatch(rf"[*(\[]*({any_label}){apart}(\S.*)", _unboxed(right), re.DOTALL | re.IGNORECASE)
    return (letters.index(found[1].casefold()), found[2]) if found and found[1].casefold() in letters else None


def _begun(said: str, texts: list[str]) -> str | None:
    """Return the text of an option that begins `said`, the longest one of several."""
    said = _plain(said)
    begun = [text for text in texts if _plain(text) and re.match(rf"{re.escape(_plain(text))}(?=[\s.,;:)*]*(?:\s|$))", said)]
    return max(begun, key=len, default=None)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" *").rstrip(" .")


def _unboxed(right: str) -> str:
    return re.sub(r"^\\boxed\{([^{}]*)\}$", r"\1", right).strip()
