"""Options, by the letter that an answer settles on."""

import re
from string import ascii_uppercase
from typing import Any

from ..choices import COLUMNS as CHOICES
from ..choices import read_choices, right_index
from .docs import read_docs
from .exam import MOST_APART, Exam, spaced
from .math import JOINED, SEPARATED, boxes, is_denied
from .reasoning import own_turn, without_reasoning

WIDE = dict(zip(map(ord, "\uff1a\u3002\uff0c\uff0e\uff08\uff09\uff1b\u3001"), ":.,.();,", strict=True))  # punctuation

LETTER_GOLD = ("answer_idx", "answer_letter", "answer", "completion")


def letter_docs(docs: Any) -> Any:
    """Rows with `question`, the options below it, `choices` in the order of their letters, and `gold`, a letter."""
    return read_docs(docs, LETTER_GOLD, _letter_row)


def _letter_row(doc: dict[str, Any], right: str | int) -> dict[str, Any]:
    choices, labels = read_choices(next((doc[name] for name in CHOICES if doc.get(name) is not None), None))
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    letters, gold = ascii_uppercase[: len(choices) or 10], str(right)
    is_number = not isinstance(next(doc[name] for name in LETTER_GOLD if name in doc), str)
    index = right_index(right, is_number, choices, labels)
    if index is not None:
        gold = ascii_uppercase[index]
    elif gold.isdigit() or not (_are_letters(labels, letters) and _may_be_letter(gold, letters)):
        among = f"{letters[0]} to {letters[-1]}" if labels is None else ", ".join(labels)
        lacks = "" if choices else ", and there is no column `options` that it could be one of"
        raise ValueError(f"the gold answer {right!r} is none of the options {among}{lacks}.")
    question = f"{doc['question']}\n{listed}" if listed else doc["question"]
    return {"question": question, "choices": choices, "gold": letter(gold, choices) or ""}


def _are_letters(labels: list[str] | None, letters: str) -> bool:
    """Whether the options are labelled as they are shown: A, B and so on."""
    return labels is None or [label.upper() for label in labels] == [*letters]


def _may_be_letter(gold: str, letters: str) -> bool:
    """Whether `gold` may hold one of `letters`, such as `(B)`."""
    return len(gold) != 1 or not gold.isalpha() or gold.upper() in letters


def grade_letter(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the letter `gold`."""
    return {"accuracy": float(letter(results[0], doc["choices"]) == doc["gold"])}


def letter(text: str, choices: list[str]) -> str | None:
    r"""Return the letter of the option that an answer settles on, or None.

    The first of these that is there, in the answer without its reasoning, up to a next turn of its own making:

    1. the last closed \boxed{} about the options, if it is a letter, one with its option, or an option; other boxes count as
       not there;
    2. the last statement, of a letter or of an option's words: "the answer is C", "answer: C", "I choose C", "C is correct",
       "it's C", "thus C", "no wait, C";
    3. a last line that is a letter alone, or the only letter that begins a line;
    4. the only letter in bold or in parentheses;
    5. the only one named as "option C", "choice C" or "answer C" in a clause of its own;
    6. the only option whose words are in the text, outside reasons, unless the text denies or doubts anything.

    An option after "not", or one said to be wrong, counts nowhere. Nor do options that are listed in their order, that others
    may hold, that are only supposed, or in a truncated analysis. "B or C" is no answer. Nothing is
    guessed: neither a letter in prose nor the nearest option. All patterns are bounded, so that the work grows with the length
    of an answer and no faster.
    """
    exam, said = Exam(choices), _tidy(own_turn(without_reasoning(text)))
    spans = boxes(said)
    later, begun = None, len(said)
    for begin, content, end in reversed(spans):
        if is_denied(said, begin):
            continue
        found = exam.boxed(said[content:end].strip()) if end - content <= MOST_APART else None
        if later:
            return later if found in (None, "", later) or not _are_joined(said[end + 1 : begun]) else None
        later, begun = found, begin
        if found == "":
            return exam.stated(exam.without_denied(exam.without_texts(said[end + 1 :]))) or None
    if later:
        return later
    plain = _without(said, spans)
    said = exam.without_denied(exam.without_texts(plain))
    found = exam.stated(said)
    if found is not None:
        return found or None
    is_plain, said = said == plain, exam.without_analysis(said)
    if is_plain:
        return exam.alone(said) or exam.meant(said)
    return exam.alone(said) or exam.left_over(said) or exam.meant(exam.without_analysis(plain))


def _are_joined(between: str) -> bool:
    """Whether a comma, "and" or "or" is all there is between two boxes."""
    return JOINED.fullmatch(between) is not None and SEPARATED.search(between) is not None


def _without(text: str, spans: list[tuple[int, int, int]]) -> str:
    """Return `text` without its boxes."""
    parts, at = [], 0
    for begin, _, end in spans:
        if begin >= at:
            parts.append(text[at:begin])
            at = end + 1
    return " ".join([*parts, text[at:]])


def _tidy(text: str) -> str:
    """Return an answer without commands of style, with Latin punctuation, and with runs of spaces and signs shortened."""
    text = re.sub(r"\\(?:text|math)[a-z]{0,12}(?![a-z])|\\boldsymbol", "", text.translate(WIDE))
    text = re.sub(r"\\[()\[\]]|[^\S\n]", " ", spaced(text).replace("\u2212", "-"))
    text = re.sub(r" +", " ", text)
    text = re.sub(r"\n+", "\n", re.sub(r" ?\n ?", "\n", text))
    return re.sub(r"([^\w\s{}\\])\1{2,}", r"\1\1", text)
