r"""Mathematics: the final answer of a text, and whether it equals the gold answer."""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from .docs import read_docs
from .latex import compact, spelled
from .reasoning import without_reasoning
from .units import measured
from .values import SECONDS, is_same_value, math_verify, parsed

MATH_GOLD = ("final_answer", "answer", "Answer", "solution", "completion")
MOST_PARTS = 30  # of a list, a set or a matrix
MOST_TRIED = 8  # parts of a list that are compared by value, in any order
MOST_STATED = 300  # characters of a statement that is searched for an expression

BASED = re.compile(r"\(?(\d[0-9A-F]*)\)?_\{(\d+)\}")  # a number with its base
BRACE = re.compile(r"\\\\|\\[{}]|\\(?:boxed|fbox)(?![A-Za-z])\s{0,8}\{|[{}]")
HEADING = re.compile(r"####[ \t]{0,9}(?!(?:\d{1,9}[.):][ \t]{1,9})?[A-Za-z]{2})(\S[^\n]*)")
NAME = r"(?:\\?[A-Za-z]+'*(?:_\{[^{}]*\})?'*(?: *\([^()]*\))?)"
CONNECTIVE = r"(?: +| *\\text\{ *)(?:and|or)(?: *\} *| +)"
JOINED = re.compile(r"[\s$,;]{0,20}(?:and|or|\\text\{ ?(?:and|or) ?\}|\\q?quad)?[\s$,;]{0,20}")
RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|in|equiv)(?![a-z])")


def math_docs(docs: Any) -> Any:
    """Return rows with `question` and `gold`. Raises RecipeError where they lack these, or math-verify is missing."""
    math_verify()
    return read_docs(docs, MATH_GOLD, lambda doc, right: {"gold": _math_gold(right)})


def _math_gold(right: str) -> str:
    found = final_answer(right)
    return right if found is None else found


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

    A heading, whose #### words follow, or a number and words ("1. First"), is no such mark.
    """
    found = boxes(text)
    if found:
        return text[found[-1][1] : found[-1][2]].strip()
    marks = HEADING.findall(text)
    return marks[-1].strip() if marks else None


def grade_math(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    r"""Tell whether the final answer equals `gold`: the last \boxed{}, else what follows ####, else what is stated last."""
    said = without_reasoning(results[0])
    found = final_answer(said)
    is_right = is_same_math(doc["gold"], said if found is None else found, found is not None)
    return {"accuracy": float(is_right or _is_same_list(doc["gold"], said))}


def _is_same_list(gold: str, said: str) -> bool:
    """Whether the last boxes, with nothing but a comma, "and" or "or" between them, are together what `gold` lists."""
    found = boxes(said)[-MOST_PARTS:]
    joined = 1
    while joined < len(found) and JOINED.fullmatch(said[found[-joined - 1][2] + 1 : found[-joined][0]]):
        joined += 1
    parts = [said[content:end] for _, content, end in found[-joined:]]
    return len(parts) > 1 and is_same_math(gold, ", ".join(parts))


def is_same_math(gold: str, answer: str, is_bare: bool = True) -> bool:
    """Whether an answer is mathematically what `gold` is; unless `is_bare`, the answer is looked for in a text."""
    if not is_bare:
        return any(is_same_math(gold, stated) for stated in _stated(answer))
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
    if all(re.fullmatch(r"[A-Za-z]{2,}", compact(text)) for text in (one, other)) and len(one) > len("abc"):
        return compact(one).casefold() == compact(other).casefold()  # words, not products
    (kind, parts), (other_kind, others) = _structure(one), _structure(other)
    if kind == other_kind == "":
        return _is_same_scalar(one, other)
    if kind == other_kind:
        return _are_same(parts, others, kind in ("list", r"\{\}", r"\cup"))
    if {kind, other_kind} <= {"list", r"\{\}", ""} or {kind, other_kind} == {"list", "()"}:
        return _are_same(parts, others, "()" not in (kind, other_kind))
    if any(RELATION.search(text) for text in (one, other)):
        return _verify(one, other)
    return False


def _bare(text: str) -> str:
    """Return an expression without a full stop, stars around it, and parentheses around a single number, letter or word."""
    text = re.sub(r"^[\s*]+|[\s*]+$|[\s*]*[.,;:][\s*]*$", "", text)
    return re.sub(r"^(?:\\text\{)?\((\w+)\)\}?$", r"\1", text)


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


def _structure(text: str) -> tuple[str, list[str]]:
    """Return the kind and the parts of a list, a set, a tuple, an interval, a union or a matrix; "" and itself of others."""
    parts = _split(text, rf",|;|{CONNECTIVE}")
    if len(parts) > 1:
        return "list", _each_sign(parts)
    parts = _split(text, r"\\cup(?![a-z])")
    if len(parts) > 1:
        return r"\cup", parts
    matrix = re.fullmatch(r"[(\[]?\\begin\{([a-zA-Z]*matrix|array)\}(.*)\\end\{\1\}[)\]]?", text, re.DOTALL)
    if matrix and matrix[1] not in ("vmatrix", "Vmatrix"):
        rows = [_split(row, "&") for row in _split(matrix[2], r"\\\\") if row.strip()]
        return f"matrix {[len(row) for row in rows]}", [cell for row in rows for cell in row]
    around = re.fullmatch(r"(\\\{|[(\[]|\\langle )(.*)(\\\}|[)\]]|\\rangle ?)", text, re.DOTALL)
    if around and len(_split(text, ",")) == 1 and _is_closed(around[2]):
        parts = _split(around[2], ",|;")
        kind = "()" if "langle" in around[1] else around[1] + around[3]
        if len(parts) > 1 or kind == r"\{\}":
            return kind, _each_sign(parts) if kind == r"\{\}" else parts
    signed = _each_sign([text])
    return ("list", signed) if len(signed) > 1 else ("", [text])


def _each_sign(parts: list[str]) -> list[str]:
    r"""Return `parts`, with a - b and a + b in place of a \pm b."""
    return [
        part.replace("\\pm ", sign, 1) if part.count("\\pm ") == 1 else part
        for part in parts
        for sign in (("+", "-") if part.count("\\pm ") == 1 else ("",))
    ]


def _tokens(text: str, separator: str) -> Iterator[tuple[int, re.Match[str]]]:
    """Yield each bracket and separator with the depth at which it stands."""
    depth = 0
    for token in re.finditer(
        rf"(?P<open>\\\{{|[{{(\[]|\\langle |\\begin)|(?P<close>\\\}}|[}})\]]|\\rangle|\\end)|{separator}", text
    ):
        depth -= bool(token["close"])
        yield depth, token
        depth += bool(token["open"])


def _is_closed(text: str) -> bool:
    return all(depth >= 0 for depth, _ in _tokens(text, r"(?!)"))


def _split(text: str, separator: str) -> list[str]:
    """Split an expression at what matches `separator` outside all brackets."""
    parts, begin = [], 0
    for depth, token in _tokens(text, separator):
        if depth == 0 and not token["open"] and not token["close"]:
            parts.append(text[begin : token.start()])
            begin = token.end()
    parts = [part.strip() for part in (*parts, text[begin:])]
    return [part for part in parts if part] if separator[0] in ",|;" else parts


def _is_same_scalar(one: str, other: str) -> bool:
    left, right = _split(one, r"(?<![<>!\\])=|\\approx"), _split(other, r"(?<![<>!\\])=|\\approx")
    if len(left) > 1 and len(right) > 1:
        is_same = compact(left[0]) == compact(right[0]) and _is_same(left[-1], right[-1])
        return is_same or _verify(one, other)
    if len(right) > 1 or (len(left) > 1 and re.fullmatch(NAME, left[0])):
        return _is_same(left[-1], right[-1])
    left, right = _split(one, r"\\in(?![a-z])"), _split(other, r"\\in(?![a-z])")
    if len(left) != len(right) or (len(left) > 1 and compact(left[0]) == compact(right[0])):
        return _is_same(left[-1], right[-1])
    (value, unit), (other_value, other_unit) = measured(one), measured(other)
    if unit and other_unit and unit != other_unit:
        return False
    if any(_structure(text)[0] for text in (value, other_value)):
        return _is_same(value, other_value)
    return compact(value) == compact(other_value) or is_same_value(value, other_value)


def _verify(one: str, other: str) -> bool:
    left, right = parsed(one), parsed(other)
    if left is None or right is None:
        return False
    return bool(math_verify().verify(left, right, timeout_seconds=SECONDS))


# Answers in prose

STATED = re.compile(r"\banswers?\b[^.\n]{0,60}?(?:\b(?:is|are|be)\b|[:=])[\s:*_]{0,8}", re.IGNORECASE)
MATH = re.compile(r"\$\$?([^$]{1,300})\$\$?|\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]", re.DOTALL)
PROSE = re.compile(
    r"[,;]?\s+(?:because|since|as|so|which|where|when|after|if|for|by|in total|altogether|not)\b|[,;]\s+[A-Za-z]{2}|\s-\s"
)
NUMBERS = re.compile(r"-?(?<![\w.])\d[\d,]*(?:\.\d+)?(?:/\d+)?%?|(?<=[$€£])\d[\d,]*(?:\.\d+)?")


def _stated(text: str) -> list[str]:
    """Return the expression that a text without a box states last, as a list of one, or none."""
    ends = [match.end() for match in STATED.finditer(text)]
    if ends:
        return _expression(_sentence(text[ends[-1] : ends[-1] + MOST_STATED]), 0)
    lines = text[-4 * MOST_STATED :].strip().split("\n")
    return _expression(re.split(r"(?<=[.!?])\s+", lines[-1][-MOST_STATED:].strip())[-1], -1)


def _sentence(text: str) -> str:
    """Return the first sentence or line of `text`."""
    return re.split(r"(?<=[.!?*])\s+(?=[A-Z(])|\n|[.!?]\s*$", text.strip())[0]


def _expression(text: str, which: int) -> list[str]:
    """Return the first or last expression of a sentence."""
    found = list(MATH.finditer(text))
    if found:
        between = [text[one.end() : other.start()] for one, other in pairwise(found)]
        is_one = all(re.fullmatch(r"\s*(?:,|(?:,?\s*\w*\s*)(?:and|or))\s*", words) for words in between)
        return (
            [MATH.sub(lambda m: next(filter(None, m.groups())), text[found[0].start() :])]
            if is_one and between
            else [next(filter(None, found[which].groups()))]
        )
    if which < 0:
        text = text.rpartition("=")[2]
    said = PROSE.split(text.replace("*", "").strip(), maxsplit=1)[0].strip(" .:")
    numbers = NUMBERS.findall(text)
    is_prose = re.match(r"[A-Za-z]{2,} [A-Za-z]", said) and len(numbers) == 1
    if is_prose or (which < 0 and not re.search(r"\\[A-Za-z]", said)):
        return numbers[-1:]
    return [said]
