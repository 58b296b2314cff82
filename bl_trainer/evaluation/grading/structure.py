r"""The structure of an expression: lists, sets, tuples, intervals, unions and matrices, and what bounds say as intervals."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from .values import number

NAME = r"(?:\\?[A-Za-z]+'*(?:_\{[^{}]*\})?'*(?: *\([^()]*\))?)"
CONNECTIVE = r"(?: +| *\\text\{ *)(?:and|or)(?: *\} *| +)"
OR = rf",? *(?:{CONNECTIVE.replace('and|', '')}|\\(?:lor|vee)(?![a-z]))"
AND = rf"{CONNECTIVE.replace('|or', '')}|\\wedge(?![a-z])"
ORDER = re.compile(r"(<|>|\\le(?![a-z])|\\ge(?![a-z]))")
TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


class Interval(NamedTuple):
    opening: str
    low: str
    high: str
    closing: str

    def __str__(self) -> str:
        return f"{self.opening}{self.low},{self.high}{self.closing}"


def as_intervals(text: str) -> str:
    r"""Write bounds of one name, such as x \le 3, as intervals; other expressions stay as they are."""
    found = bounded(text)
    return found[1] if found else text


def bounded(text: str) -> tuple[str, str] | None:
    r"""Return the name that an expression bounds, and its values as intervals; None of any other expression.

    "or" joins the intervals; "and" and a comma keep what they have in common. By a comma between bounds that have nothing in
    common, "or" is meant.
    """
    names, joined = set(), []
    for either in split(text, OR):
        parts = [_as_interval(part) for part in split(either, rf",|;|{AND}")]
        found = [part for part in parts if part]
        common = _in_common([interval for _, interval in found]) if found and len(found) == len(parts) else None
        if common is None:
            return None
        names |= {name for name, _ in found}
        is_either = common == r"\emptyset " and len(split(either, AND)) == 1
        joined += [str(interval) for _, interval in found] if is_either else [common]
    return (names.pop(), r"\cup ".join(joined)) if len(names) == 1 else None


def _in_common(intervals: list[Interval]) -> str | None:
    """Return what intervals have in common; None where that isn't known, since their ends aren't numbers."""
    lows = [(end, each.opening == "(") for each in intervals if (end := each.low.strip()) != r"-\infty"]
    highs = [(end, each.closing == "]") for each in intervals if (end := each.high.strip()) != r"\infty"]
    if len(intervals) == 1 or (len(lows) <= 1 and not highs) or (len(highs) <= 1 and not lows):
        return str(intervals[0])
    ends = {end: number(end) for end, _ in (*lows, *highs)}
    if None in ends.values():
        is_known = len(lows) == len(highs) == 1
        return f"{'[('[lows[0][1]]}{lows[0][0]},{highs[0][0]}{')]'[highs[0][1]]}" if is_known else None

    def size(end: tuple[str, bool]) -> tuple[Any, bool]:
        return ends[end[0]], end[1]

    low, high = max(lows, key=size, default=("-\\infty ", True)), min(highs, key=size, default=("\\infty ", False))
    if lows and highs and (ends[low[0]] > ends[high[0]] or (ends[low[0]] == ends[high[0]] and (low[1] or not high[1]))):
        return r"\emptyset "
    return f"{'[('[low[1]]}{low[0]},{high[0]}{')]'[high[1]]}"


def _as_interval(text: str) -> tuple[str, Interval] | None:
    """Return the name and the interval that an expression such as `1 < x < 2` describes; None for any other expression."""
    terms = [term.strip() for term in ORDER.split(text)]
    if len(terms) == 3 and not re.fullmatch(NAME, terms[0]):
        terms = terms[::-1]
        terms[1] = TURNED[terms[1]]
    if len(terms) == 5 and terms[1] in (">", r"\ge"):
        terms = [TURNED.get(term, term) for term in terms[::-1]]
    signs = terms[1::2]
    if len(terms) == 3 and re.fullmatch(NAME, terms[0]):
        is_upper, is_open = signs[0] in ("<", r"\le"), signs[0] in "<>"
        upper = Interval("(", "-\\infty ", terms[2], "])"[is_open])
        return terms[0], upper if is_upper else Interval("[("[is_open], terms[2], "\\infty ", ")")
    if len(terms) == 5 and re.fullmatch(NAME, terms[2]) and {*signs} <= {"<", r"\le"}:
        return terms[2], Interval("[("[signs[0] == "<"], terms[0], terms[4], "])"[signs[1] == "<"])
    return None


def structure(text: str) -> tuple[str, list[str]]:
    """Return the kind and the parts of a list, a set, a tuple, an interval, a union or a matrix; "" and itself of others."""
    parts = split(text, rf",|;|{CONNECTIVE}")
    if len(parts) > 1:
        return "list", _each_sign(parts)
    parts = split(text, r"\\cup(?![a-z])")
    if len(parts) > 1:
        return r"\cup", parts
    matrix = re.fullmatch(r"[(\[]?\\begin\{([a-zA-Z]*matrix|array)\}(.*)\\end\{\1\}[)\]]?", text, re.DOTALL)
    if matrix and matrix[1] not in ("vmatrix", "Vmatrix"):
        rows = [split(row, "&") for row in split(matrix[2], r"\\\\") if row.strip()]
        return f"matrix {[len(row) for row in rows]}", [cell for row in rows for cell in row]
    around = re.fullmatch(r"(\\\{|[(\[]|\\langle )(.*)(\\\}|[)\]]|\\rangle ?)", text, re.DOTALL)
    if around and len(split(text, ",")) == 1 and _is_closed(around[2]):
        parts = split(around[2], ",|;")
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


def split(text: str, separator: str) -> list[str]:
    """Split an expression at what matches `separator` outside all brackets."""
    parts, begin = [], 0
    for depth, token in _tokens(text, separator):
        if depth == 0 and not token["open"] and not token["close"]:
            parts.append(text[begin : token.start()])
            begin = token.end()
    parts = [part.strip() for part in (*parts, text[begin:])]
    return [part for part in parts if part] if separator[0] in ",|;" else parts
