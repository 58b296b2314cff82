r"""Mathematics: the final answer of a text, and whether it equals the gold answer."""

import re
from typing import Any

from .docs import read_docs
from .latex import compact, spelled
from .prose import stated, unexplained
from .reasoning import FINAL, STATED, own_turn, without_reasoning
from .structure import NAME, ORDER, as_intervals, bounded, split, structure
from .units import are_same_units, counted_in, measured, number_of, unit_of, without_letter
from .values import is_same_value, math_verify, parsed, verified

MATH_GOLD = ("final_answer", "answer", "Answer", "solution", "completion")
MOST_PARTS = 30  # of a list, a set or a matrix
MOST_TRIED = 8  # parts of a list that are compared by value, in any order

BASED = re.compile(r"\(?(\d[0-9A-F]*)\)?_\{(\d+)\}")  # a number with its base
BRACE = re.compile(r"\\\\|\\[{}]|\\(?:boxed|fbox)(?![A-Za-z])\s{0,8}\{|[{}]")
HEADING = re.compile(r"####[ \t]{0,9}(?!(?:\d{1,9}[.):][ \t]{1,9})?[A-Za-z]{2})(\S[^\n]*)")
JOINED = re.compile(r"[\s$,;]{0,20}(?:and|or|\\text\{ ?(?:and|or) ?\}|\\q?quad)?[\s$,;]{0,20}")
SEPARATED = re.compile(r"[,;]|and|or")  # of boxes that are answers of their own, not one answer that is boxed again
NOT = re.compile(r"(?:\bnot|n['\u2019]t)(?: (?:be|equal to))?[\s$*]{0,4}\Z", re.IGNORECASE)
WITHDRAWN = re.compile(
    r"\b(?:wait|oops|sorry|hold on|actually|correction)\b[^.?\n]{0,40}?\b(?<!not )(?<!no )"
    r"(?:wrong|incorrect|not (?:right|correct)|mistake|error)\b(?!\s?\?)"
    r"|\bI(?: have|['\u2019]ve)? made an? (?:\w{1,20} ){0,2}(?:mistake|error)\b|\bwait,? no\b|\bno,? wait\b",
    re.IGNORECASE,
)
# An equation in one unknown, which is no name of its other side: 2x = 5, but not f(2) = 5 or x + y = 5
OPERATION = re.compile(r"[-+*/^]|\\(?:frac|sqrt|cdot|times|div)(?![a-z])|\d *[A-Za-z\\]")
GREEK = r"\\(?:alpha|beta|gamma|delta|theta|lambda|phi|omega)(?![a-z])"
UNKNOWN = re.compile(rf"(?:{GREEK} ?|[A-Za-z])(?:_\{{[^{{}}]*\}})?")
WORDS = re.compile(r"\\text\{|\\angle|\|")
FUNCTION = re.compile(rf"(?!{GREEK})\\[A-Za-z]+(?:_\{{[^{{}}]*\}})?")
PLAIN = re.compile(r"-?\d[\d.]*")
ROUNDED = re.compile(r"(.+)\\approx(?![a-z])[^=]+")  # an exact value, and a rounded one
RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|in|equiv)(?![a-z])")
WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
LETTERS = re.compile(r"[A-Za-z]{2,}")
VERDICTS = ("yes", "no", "true", "false")
EQUALS = r"(?<![<>!\\])="
NAMES = rf"\(? *{NAME}(?: *, *{NAME})* *\)?"
PERCENT = unit_of("%")
MOST_NAMED = 4  # capital letters that name points or sides; more of them are a word
OPTION = re.compile(r"(?:\\text\{)?\(([A-J])\)\}?\s*((?:-?[\d.]|\\(?:frac|sqrt|text|pi)(?![a-z])).*)")  # as in (C) 5
# For which names an expression holds: all of them
CONDITION = re.compile(
    r"(.+?),? *(?:\\text\{ ?\(?(?:for (?:all|any|every|each|some)|where)\b[^{}]*\}.*"
    r"|[,(] *[A-Za-z] *\\in *\\mathbb\{[ZNQR]\}[^,]{0,12})"
)
BUILT = re.compile(r"\\\{ *[A-Za-z] *(?:\\in *\\mathbb\{R\} *)?(?:\\mid(?![a-z])|[|:]) *(.*?) *\\\}")  # {x | x > 2}
REALS = re.compile(r"(?:[A-Za-z] *\\in *)?\\mathbb\{R\}|(?:\\text\{)? ?all real numbers ?\}?", re.IGNORECASE)
EMPTY = re.compile(r"(?:\\text\{)? ?(?:the )?(?:empty|null) set ?\}?", re.IGNORECASE)
MINUS = re.compile(r"^(?:\\text\{ ?(?:negative|minus) ?\}|negative|minus) *(?=[\d.(\\])", re.IGNORECASE)
ORDINAL = re.compile(r"(\d+) ?(?:\^\{)?(?:\\text\{)?(?:st|nd|rd|th)\}{0,2}")
LEADING = re.compile(
    r"^\\text\{(?![^{}]*\b(?:not|no|least|most|than)\b)[^{}]*(?:\b(?:is|equals|about|approximately|roughly)|:) *\} *(?=\S)"
)
MODULO = re.compile(r"(.+?) *(?:\\pmod|\( *(?:\\text\{ ?)?mod(?: ?\})?|\\text\{ ?\(mod ?\}) *(\w+) *\)?")


def math_docs(docs: Any) -> Any:
    """Return rows with `question` and `gold`. Raises RecipeError where they lack these, or math-verify is missing."""
    math_verify()
    is_worked = not {*MATH_GOLD[:-2]} & {*docs.column_names}
    return read_docs(docs, MATH_GOLD, lambda doc, right: {"gold": _worked_gold(right) if is_worked else _math_gold(right)})


def _math_gold(right: str) -> str:
    found = final_answer(right)
    return right if found is None else found


def _worked_gold(right: str) -> str:
    r"""Return the final answer of a worked solution. Raises ValueError where it marks none and isn't one itself."""
    found = final_answer(right)
    if found is not None:
        return found
    said = [right] if right and not WORD.search(right) else stated(right) if STATED.search(right) else []
    if not said:
        columns = ", ".join(MATH_GOLD[:-2])
        raise ValueError(
            rf"its {' or '.join(MATH_GOLD[-2:])} {right[:40]!r} marks no final answer. "
            rf"Write the gold answer in \boxed{{}} or after ####, or in one of {columns}."
        )
    return said[0]


def boxes(text: str) -> list[tuple[int, int, int]]:
    r"""Return begin, begin of the content and end of the content of each closed \boxed{} or \fbox{}, in order of begin."""
    found: list[tuple[int, int, int]] = []
    opened: list[tuple[int, int]] = []
    for brace in BRACE.finditer(text):
        if brace[0] == "}" and opened:
            begin, content = opened.pop()
            if content > begin + 1:
                found.append((begin, content, brace.start()))
        elif brace[0][-1] == "{" and brace[0] != "\\{":
            opened.append((brace.start(), brace.end()))
    return sorted(found)


def final_answer(text: str) -> str | None:
    r"""Return what is in the last closed \boxed{} or \fbox{} of `text`, else what follows its last ####, else None.

    A heading, whose #### words follow, or a number and words ("1. First"), is no such mark. A box behind "not" is none either.
    """
    found = _final_boxes(text)
    if found:
        return text[found[-1][1] : found[-1][2]].strip()
    marks = HEADING.findall(text)
    return unexplained(marks[-1].strip()) if marks else None


def _final_boxes(text: str) -> list[tuple[int, int, int]]:
    return [box for box in boxes(text) if not is_denied(text, box[0])]


def is_denied(text: str, begin: int) -> bool:
    """Whether "not" stands before what begins there."""
    return NOT.search(text[max(0, begin - 30) : begin]) is not None


def grade_math(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    r"""Tell whether the final answer equals `gold`: the last \boxed{}, else what follows ####, else what is stated last.

    Boxes with "and", "or" or a comma between them are one answer, a list. An answer that the text withdraws doesn't count.
    """
    gold, said = doc["gold"], _settled(own_turn(without_reasoning(results[0])))
    for word in counted_in(str(doc.get("question") or "")):
        one = re.compile(rf"\b{re.escape(word.lower().removesuffix('s'))}s?\b", re.IGNORECASE)
        gold, said = one.sub("units", gold), one.sub("units", said)
    listed, is_list = _listed(said)
    if len(listed) > 1 and (is_same_math(gold, ", ".join(listed)) or (is_list and _differ(listed))):
        return {"accuracy": float(is_same_math(gold, ", ".join(listed)))}
    found = final_answer(said)
    return {"accuracy": float(is_same_math(gold, said if found is None else found, found is not None))}


def _settled(said: str) -> str:
    """Return the text behind the last words that withdraw a final answer."""
    withdrawn = list(WITHDRAWN.finditer(said))
    return said[withdrawn[-1].end() :] if withdrawn and FINAL.search(said[: withdrawn[-1].start()]) else said


def _listed(said: str) -> tuple[list[str], bool]:
    """Return the last boxes with next to nothing between them, and whether a comma, "and" or "or" is."""
    found = _final_boxes(said)[-MOST_PARTS:]
    joined, is_list = 1, False
    while joined < len(found):
        between = said[found[-joined - 1][2] + 1 : found[-joined][0]]
        if not JOINED.fullmatch(between):
            break
        is_list = is_list or SEPARATED.search(between) is not None
        joined += 1
    return [said[content:end] for _, content, end in found[-joined:]], is_list


def _differ(parts: list[str]) -> bool:
    return not all(is_same_math(parts[-1], part) for part in parts[:-1])


def is_same_math(gold: str, answer: str, is_bare: bool = True) -> bool:
    """Whether an answer is mathematically what `gold` is; unless `is_bare`, the answer is looked for in a text."""
    if not is_bare:
        return any(is_same_math(gold, said) for said in stated(answer))
    if not answer.strip():
        return False
    one, other = spelled(gold), spelled(answer)
    if one is None or other is None:
        return gold.split() == answer.split()
    return _is_same(one, other)


def _is_same(one: str, other: str) -> bool:
    one, other = _bare(one), _bare(other)
    if not one or not other:
        return False
    if compact(one) == compact(other):
        return True
    bases = [BASED.fullmatch(compact(text)) for text in (one, other)]
    if any(bases):  # math-verify passes over the base
        return bool(bases[0] and bases[1] and bases[0].groups() == bases[1].groups())
    if (_is_phrase(one) or _is_phrase(other)) and all(LETTERS.fullmatch(compact(text)) for text in (one, other)):
        return _said(one) == _said(other)
    rests = _without_marks(one, other)
    if rests != (one, other):
        return _is_same(*rests)
    return _is_same_structure(one, other)


def _is_phrase(text: str) -> bool:
    """Whether an expression is words or a name such as ABC, not a product such as ab."""
    plain = compact(text)
    if not LETTERS.fullmatch(plain):
        return False
    is_short = len(plain) <= len("abc") and plain.islower() and plain not in VERDICTS
    return not is_short or r"\text" in text


def _said(text: str) -> str:
    """Return words in lower case and the singular, but a name of a few capital letters as it is."""
    plain = compact(text)
    if plain.isupper() and len(plain) <= MOST_NAMED and plain.lower() not in VERDICTS:
        return plain
    return plain.casefold().removesuffix("s")


def _without_marks(one: str, other: str) -> tuple[str, str]:
    """Take away what only one of two expressions has: an option's letter, or its text, a modulus, and for what it holds."""
    held = CONDITION.fullmatch(one), CONDITION.fullmatch(other)
    if bool(held[0]) != bool(held[1]):
        return held[0][1] if held[0] else one, held[1][1] if held[1] else other
    options = OPTION.fullmatch(one), OPTION.fullmatch(other)
    if bool(options[0]) != bool(options[1]):
        bare = other if options[0] else one
        pick = 1 if re.fullmatch("[A-J]", compact(bare)) else 2
        return options[0][pick] if options[0] else one, options[1][pick] if options[1] else other
    moduli = MODULO.fullmatch(one), MODULO.fullmatch(other)
    if moduli[0] and moduli[1] and moduli[0][2] != moduli[1][2]:
        return one, other
    return tuple(_residue(found[1]) if found else text for found, text in zip(moduli, (one, other), strict=True))  # type: ignore[return-value]


def _residue(text: str) -> str:
    return re.sub(rf"^{NAME} *\\equiv *", "", text)


def _is_same_structure(one: str, other: str) -> bool:
    if bool(ORDER.search(one)) != bool(ORDER.search(other)):
        one, other = as_intervals(one), as_intervals(other)
    elif ORDER.search(one):
        bounds = bounded(one), bounded(other)
        if bounds[0] and bounds[1] and compact(bounds[0][0]) == compact(bounds[1][0]):
            one, other = bounds[0][1], bounds[1][1]
    (kind, parts), (other_kind, others) = structure(one), structure(other)
    if kind == other_kind == "":
        return _is_same_scalar(one, other)
    if kind == other_kind == r"\{\}":
        return _are_same_sets(parts, others)
    if kind == other_kind:
        return _are_same(parts, others, kind in ("list", r"\cup") and not _are_named_apart(parts, others))
    sides = [split(text, EQUALS) if each == "" else [text] for text, each in ((one, kind), (other, other_kind))]
    if max(map(len, sides)) > 1 and (len(sides[0]) == 1 or re.fullmatch(NAMES, sides[0][0])):
        return _is_same(sides[0][-1], sides[1][-1])
    if {kind, other_kind} <= {"list", r"\{\}", ""} or {kind, other_kind} == {"list", "()"}:
        return _are_same(parts, others, "()" not in (kind, other_kind))
    if any(RELATION.search(text) for text in (one, other)):
        return _verify(one, other)
    return any(each.startswith("matrix") for each in (kind, other_kind)) and is_same_value(one, other)


def _bare(text: str) -> str:
    r"""Return an expression without a full stop, stars around it, and parentheses around a single number, letter or word.

    The empty braces are \emptyset, "negative" is a sign, all real numbers an interval, {x | x > 2} its condition, 5th and a
    number in words a number, and what introduces a value, such as \text{The area is }, is no part of it.
    """
    text = re.sub(r"^[\s*]+|[\s*]+$|[\s*]*[.,;:][\s*]*$", "", text)
    text = re.sub(r"^(?:\\text\{)?\((\w+)\)\}?$", r"\1", text)
    text = re.sub(r"^\\\{ *\\\}$", r"\\emptyset ", LEADING.sub("", text))
    text = r"(-\infty ,\infty )" if REALS.fullmatch(text) else text
    text = r"\emptyset " if EMPTY.fullmatch(text) else MINUS.sub("-", text)
    marked = BUILT.fullmatch(text) or ORDINAL.fullmatch(text)
    text = marked[1] if marked else text
    number = number_of(re.sub(r"^\\text\{([^{}]*)\}$", r"\1", text))
    return text if number is None else str(number)


def _are_same_sets(one: list[str], other: list[str]) -> bool:
    r"""Whether the elements of two sets are the same: \{2\} alone is 2, but as an element it isn't."""
    inner, others = ([part for part in parts if structure(_bare(part))[0] == r"\{\}"] for parts in (one, other))
    plain, rest = ([part for part in parts if part not in sets] for parts, sets in ((one, inner), (other, others)))
    return _are_same(plain, rest, True) and _are_same(inner, others, True)


def _are_named_apart(one: list[str], other: list[str]) -> bool:
    """Whether one of two lists has different names, as in a=1, b=2, and the other one none, so that their order tells."""
    names = [{split(part, EQUALS)[0] for part in parts if len(split(part, EQUALS)) > 1} for parts in (one, other)]
    return max(map(len, names)) > 1 and min(map(len, names)) == 0


def _are_same(one: list[str], other: list[str], is_unordered: bool) -> bool:
    if len(one) != len(other) or len(one) > MOST_PARTS:
        return False
    if not is_unordered:
        return all(map(_is_same, one, other))
    left = list(other)
    texts = [compact(_bare(part)) for part in left]
    kept = []
    for part in one:
        if compact(_bare(part)) in texts:
            i = texts.index(compact(_bare(part)))
            texts.pop(i)
            left.pop(i)
        else:
            kept.append(part)
    return len(kept) <= MOST_TRIED and _are_matched(kept, left)


def _are_matched(one: list[str], other: list[str]) -> bool:
    """Whether each part has one of its own among others, in any order."""
    left = list(other)
    for part in one:
        found = next((i for i, each in enumerate(left) if _is_same(part, each)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _is_same_scalar(one: str, other: str) -> bool:
    for text, rounded in ((one, ROUNDED.fullmatch(one)), (other, ROUNDED.fullmatch(other))):
        if rounded and _is_same(*(rounded[1] if each is text else each for each in (one, other))):
            return True
    left, right = split(one, rf"{EQUALS}|\\approx"), split(other, rf"{EQUALS}|\\approx")
    if len(left) > 1 and len(right) > 1:
        is_same = compact(left[0]) == compact(right[0]) and _is_same(left[-1], right[-1])
        return is_same or _verify(one, other)
    if len(left) == 1 and len(right) == 2 and _is_equation(right[0]):
        return False
    if len(right) > 1 or (len(left) > 1 and re.fullmatch(NAME, left[0])):
        return _is_same(left[-1], right[-1])
    left, right = split(one, r"\\in(?![a-z])"), split(other, r"\\in(?![a-z])")
    if len(left) != len(right) or (len(left) > 1 and compact(left[0]) == compact(right[0])):
        return _is_same(left[-1], right[-1])
    other = without_letter(other) if PLAIN.fullmatch(one) else other
    (value, unit), (other_value, other_unit) = measured(one), measured(other)
    if not are_same_units(unit, other_unit):
        return False
    if any(structure(text)[0] for text in (value, other_value)):
        return _is_same(value, other_value)
    if compact(value) == compact(other_value) or is_same_value(value, other_value):
        return True
    return unit == PERCENT and not other_unit and is_same_value(rf"\frac{{{value}}}{{100}}", other_value)


def _is_equation(side: str) -> bool:
    """Whether a side of an equation computes something of one unknown, instead of naming it."""
    side = re.sub(r"\^\{-1\}(?= *\()", "", side)  # of an inverse function
    if WORDS.search(side) or re.fullmatch(NAME, side) or not OPERATION.search(side):
        return False
    unknown = {*UNKNOWN.findall(FUNCTION.sub(" ", side))} - {"i", "e"}
    return len(unknown) == 1


def _verify(one: str, other: str) -> bool:
    left, right = parsed(one), parsed(other)
    return left is not None and right is not None and verified(left, right)
