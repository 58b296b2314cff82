"""What an answer is worth: mathematics by math-verify, options by their letter, words by exact match and Jaro-Winkler."""

import logging
import math
import re
from collections.abc import Callable
from functools import lru_cache
from string import ascii_uppercase
from typing import Any

from ..data.format import USER
from ..parser import RecipeError
from .choices import COLUMNS as CHOICES
from .choices import read_choices, right_index

QUESTIONS = ("question", "problem", "Problem", "Question")
MATH_GOLD = ("final_answer", "answer", "Answer", "solution", "completion")
LETTER_GOLD = ("answer_idx", "answer_letter", "answer", "completion")
WORD_GOLD = ("answer", "completion")

STYLE = r"\\(?:textbf|textit|mathbf|boldsymbol)(?![A-Za-z])"
BASED = r"\(?(\d[0-9A-F]*)\)?_\(?(\d+)\)?"  # a number with its base, of an expression without braces

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once of its own time limit


def _docs(docs: Any, columns: tuple[str, ...], row: Callable[[dict[str, Any], Any], dict[str, Any]]) -> Any:
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
            return {"question": question, **row({**doc, "question": question}, _text(doc[column]))}
        except ValueError as error:
            raise RecipeError(f"row {i + 1}: {error}") from error

    return docs.map(read, with_indices=True)


def _text(value: Any) -> str:
    """Return a gold answer as a text, of messages the last one's."""
    if isinstance(value, list):
        parts = [each["content"] if isinstance(each, dict) else str(each) for each in value]
        return parts[-1] if value and isinstance(value[0], dict) else ", ".join(parts)
    whole = isinstance(value, float) and value.is_integer()
    return "" if value is None else str(int(value) if whole else value).strip()


# Mathematics


def math_docs(docs: Any) -> Any:
    """Rows with `question` and `gold`. Raises RecipeError where they lack these, or math-verify is missing."""
    _math_verify()
    return _docs(docs, MATH_GOLD, lambda doc, right: {"gold": _math_gold(right)})


def _math_gold(right: str) -> str:
    found = final_answer(right)
    return right if found is None else found


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise RecipeError(f"grading it needs math-verify ({error}). Run `pip install '.[evaluation]'`.") from error
    return math_verify


def final_answer(text: str) -> str | None:
    r"""Return what is in the last closed \boxed{} or \fbox{} of `text`, else what follows its last ####, else None.

    A heading, whose #### words follow, or a number and words ("1. First"), is no such mark.
    """
    for begin in reversed([match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for i in range(begin, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if not depth:
                return text[begin:i].strip()
    found = re.findall(r"####[ \t]*(?!(?:\d+[.):][ \t]+)?[A-Za-z]{2})(\S.*)", text)
    return found[-1].strip() if found else None


def grade_math(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    r"""Whether the final answer equals `gold`: the last \boxed{}, else what follows ####, else what math-verify finds."""
    found = final_answer(results[0])
    return {"accuracy": float(is_same_math(doc["gold"], results[0] if found is None else found, found is not None))}


def is_same_math(gold: str, answer: str, is_bare: bool = True) -> bool:
    """Whether an answer is mathematically what `gold` is; unless `is_bare`, the answer is looked for in a text."""
    if not answer.strip():
        return False
    gold, answer = _unstyled(gold), _unstyled(answer)
    digits = re.fullmatch(BASED, _plain(gold))
    said = [re.fullmatch(BASED, _plain(answer))] if is_bare else [None, *re.finditer(BASED, _plain(answer))]
    if digits or (is_bare and said[-1]):  # math-verify passes over the base
        return bool(digits and said[-1] and digits.groups() == said[-1].groups())
    if is_bare and _plain(gold) == _plain(answer):
        return True
    right, target = _parsed(gold), _parsed(answer) if is_bare else _math_verify().parse(answer)
    if not _math_verify().verify(right, target):
        return False
    one, other = _number(right), _number(target)
    # math-verify rounds to 6 decimals, so that it takes 1e-27 for 1e-19
    return one is None or other is None or max(abs(one), abs(other)) > 1 or math.isclose(one, other, rel_tol=1e-5)


def _unstyled(text: str) -> str:
    """Return `text` without commands that only style it, and a whole number without parentheses around it."""
    text = re.sub(rf"{STYLE}\s*\{{([^{{}}]*)\}}", r"\1", text)
    return re.sub(r"^\s*\((\d+)\)\s*$", r"\1", text)


def _number(parsed: list[Any]) -> float | None:
    value: Any = parsed[0] if parsed else None
    is_real = getattr(value, "is_number", False) and getattr(value, "is_real", False)
    return float(value) if is_real else None


def _plain(text: str) -> str:
    return re.sub(r"\\(?:left|right|text|mathrm|[,;! ])|[\s${}]", "", text).rstrip(".")


@lru_cache(maxsize=4096)
def _parsed(expression: str) -> list[Any]:
    bare = re.sub(r"\\?[$%]", "", expression)  # dollars, and per cent, whose number counts, as in MATH
    bare = re.sub(r"(?<![\w\\.])(\d+\.?\d*)[eE]([+-]?\d+)(?!\w)", r"\1\\times 10^{\2}", bare)  # as Minerva writes 4.5e33
    return _math_verify().parse(rf"\boxed{{{bare}}}")


# Options


def letter_docs(docs: Any) -> Any:
    """Rows with `question`, the options below it, `choices` in the order of their letters, and `gold`, a letter."""
    return _docs(docs, LETTER_GOLD, _letter_row)


def _letter_row(doc: dict[str, Any], right: str) -> dict[str, Any]:
    choices, labels = read_choices(next((doc[name] for name in CHOICES if doc.get(name) is not None), None))
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    letters, gold = ascii_uppercase[: len(choices) or 10], right
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


# What may stand between the words that announce a letter and the letter, of which "not" and the like are none
LEAD = (
    r"(?i:\b(?:the|is|are|be|was|as|but|rather|therefore|thus|most|either|answer|option|choice|letter|\w+ly)\b"
    r"|[\s:=*_`'\"$(\[{>-])*"
)
# "A" and "I" are words too: before a word in lower case other than these
GOES_ON = r"(?:because|since|as|due|for|given|which|but|not|or|and|is|was|would|in)\b"
ANNOUNCED = r"\b(?:answer|option|choice)\b[^.\n]{0,40}?(?:\b(?:is|be)\b|:)|\banswer\s*(?:>|-|=)|\b(?:choose|pick|select)\b"
RIGHT = r"(?:is|would be|must be|should be|seems)\s+(?:the\s+)?(?:most\s+|\w+ly\s+)?(?:correct|right|best|appropriate|answer)\b"
WRONG = r"(?:is|are|was|would be|can be|must be)\s+(?:\w+ly\s+)?(?:not|wrong|incorrect|false|excluded|ruled out|eliminated)\b"
NOT = r"(?:not|\w+n['\u2019]t|cannot|never|neither|nor|than|instead of|eliminate|exclude)"


def letter(text: str, choices: list[str]) -> str | None:
    r"""Return the letter of the option that an answer settles on, or None.

    The first of these that is there, in the answer up to a next turn of its own making:

    1. the last closed \boxed{}, if it is a letter, one with its option, or an option;
    2. the last statement: "the answer is C", "answer: C", "I choose C", "C is correct";
    3. a last line that is a letter alone, or the only letter that begins a line;
    4. the only letter in bold or in parentheses;
    5. the only one named as "option C", "choice C" or "answer C";
    6. the only option whose words are in the text.

    A letter after "not", or one said to be wrong, counts nowhere; "B or C" is no answer. Nothing is guessed: neither a letter
    in prose nor the nearest option.
    """
    letters = ascii_uppercase[: len(choices) or 10]
    texts = {_words(choice): name for name, choice in zip(letters, choices, strict=False)}
    one = rf"(?![AI]\s+(?!{GOES_ON})[a-z])[{letters}](?![\w'\u2019-])|[{letters.lower()}](?=\s*(?:[.)\]}},:;*_`\"$<]|$))"
    text = re.sub(r"\\(?:text|math)[a-z]*(?![a-z])|\\boldsymbol", "", text.split(f"\n{USER}")[0])
    boxed = re.findall(r"\\boxed\s*\{", text) and final_answer(text)
    if boxed:
        found = re.fullmatch(rf"{LEAD}([{letters}{letters.lower()}])\b(\W*)(.*)", boxed, re.DOTALL)
        if found and (not found[3] or re.match(r"\W*[.):-]\s", found[2]) or texts.get(_words(found[3])) == found[1].upper()):
            return found[1].upper()
        return texts.get(_words(boxed))
    text = re.sub(rf"\b(?i:(?:option|choice|answer)\s+)?[\s(*]*\b(?:{one})[\s)*]*(?i:{WRONG})", " ", text)
    text = re.sub(rf"(?i:\b{NOT}\b){LEAD}(?:{one})", " ", text)
    second = rf"\W*(?:or|and|/|&)\W*(?:{one})|,\s*(?:{one})(?!\s+[a-z])"  # but "A, I think" is one letter
    begin = r"(?:^|[.,;:\n]|\b(?i:option|choice|answer|letter|so|thus|hence|therefore|that|and|but)\b)"
    stated = re.finditer(
        rf"(?i:{ANNOUNCED}){LEAD}(?P<a>{one})(?P<second>{second})?|{begin}[\s(*]*(?P<b>{one})[\s)*]*(?i:{RIGHT})", text
    )
    last = max(stated, key=lambda match: match.start(), default=None)
    if last:
        return None if last["second"] else (last["a"] or last["b"]).upper()
    alone = re.fullmatch(rf"[\s*_`(\[]*([{letters}{letters.lower()}])[\s*_`)\].:]*", text.strip().split("\n")[-1])
    if alone:
        return alone[1].upper()
    for names in (
        re.findall(rf"^[\s*_`(\[]*({one})(?=\s*(?:[.):\]*_`]|$))", text, re.MULTILINE),
        re.findall(rf"(?:\*\*|\()([{letters}])(?:\*\*|\))", text),
        re.findall(rf"\b(?i:option|choice|answer)\b{LEAD}({one})(?!{second})", text),
    ):
        if len({name.upper() for name in names}) == 1:
            return names[0].upper()
    said = _words(text)
    named = {name for words, name in texts.items() if words and re.search(rf"\b{re.escape(words)}\b", said)}
    return named.pop() if len(named) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


# Words


def word_docs(docs: Any) -> Any:
    """Rows with `question` and `gold`."""
    _rapidfuzz()
    return _docs(docs, WORD_GOLD, lambda doc, right: {"gold": right})


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
    answer, right = (text.strip().lower() for text in (results[0], doc["gold"]))
    return {
        "exact_match": float(results[0] == doc["gold"]),
        "normalised_match": float(answer == right),
        "jaro_winkler": _rapidfuzz().similarity(answer, right) if answer else 0.0,
    }
