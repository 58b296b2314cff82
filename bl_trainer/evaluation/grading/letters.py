"""Options, by the letter that an answer settles on."""

import json
import re
from string import ascii_uppercase
from typing import Any

from ...data.format import USER
from .docs import read_docs
from .math import boxes, final_answer
from .reasoning import without_reasoning

LETTER_GOLD = ("answer_idx", "answer_letter", "answer", "completion")


def letter_docs(docs: Any) -> Any:
    """Rows with `question`, the options below it, `choices` in the order of their letters, and `gold`, a letter."""
    return read_docs(docs, LETTER_GOLD, _letter_row)


def _letter_row(doc: dict[str, Any], right: str) -> dict[str, Any]:
    choices = _choices(doc.get("options"))
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    letters, gold = ascii_uppercase[: len(choices) or 10], right
    is_number = not isinstance(next(doc[name] for name in LETTER_GOLD if name in doc), str)
    if right in choices and not is_number:  # a number is an index, a text of digits may be an option
        gold = ascii_uppercase[choices.index(right)]
    elif right.isdigit() and choices:
        gold = ascii_uppercase[int(right)] if int(right) < len(choices) else right
    if gold.isdigit() or (len(gold) == 1 and gold.isalpha() and gold.upper() not in letters):
        lacks = "" if choices else ", and there is no column `options` that it could be one of"
        raise ValueError(f"the gold answer {right!r} is none of the options {letters[0]} to {letters[-1]}{lacks}.")
    question = f"{doc['question']}\n{listed}" if listed else doc["question"]
    return {"question": question, "choices": choices, "gold": letter(gold, choices) or ""}


def _choices(options: Any) -> list[str]:
    """The options' texts, of a list, or of a mapping from letters, which may be written as JSON."""
    if isinstance(options, str):
        options = json.loads(options)
    if isinstance(options, dict):  # Arrow gives each row the letters of all rows
        options = [options[key] for key in sorted(options) if options[key] is not None]
    return [str(option) for option in options or []]


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


