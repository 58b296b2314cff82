r"""The structure of an expression: lists, sets, tuples, intervals, unions and matrices, and what bounds say as intervals."""

import re
from collections.abc import Iterator

NAME = r"(?:\\?[A-Za-z]+'*(?:_\{[^{}]*\})?'*(?: *\([^()]*\))?)"
CONNECTIVE = r"(?: +| *\\text\{ *)(?:and|or)(?: *\} *| +)"
ORDER = re.compile(r"(<|>|\\le(?![a-z])|\\ge(?![a-z]))")
TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def as_intervals(text: str) -> str:
    r"""Write x \le 3 as (-\infty,3], and "or" between such as a union; other expressions stay as they are."""
    parts = [_as_interval(part) for part in split(text, rf",|;|{CONNECTIVE}")]
    return r"\cup ".join(part for part in parts if part) if all(parts) else text


def _as_interval(text: str) -> str | None:
    """Return the interval that an expression such as `1 < x < 2` describes; None for any other expression."""
    terms = [term.strip() for term in ORDER.split(text)]
    if len(terms) == 3 and not re.fullmatch(NAME, terms[0]):
        terms = terms[::-1]
        terms[1] = TURNED[terms[1]]
    if len(terms) == 5 and terms[1] in (">", r"\ge"):
        terms = [TURNED.get(term, term) for term in terms[::-1]]
    signs = terms[1::2]
    if len(terms) == 3 and re.fullmatch(NAME, terms[0]):
        is_upper, closed = signs[0] in ("<", r"\le"), signs[0].startswith("\\")
        return f"(-\\infty ,{terms[2]}{'])'[not closed]}" if is_upper else f"{'[('[not closed]}{terms[2]},\\infty )"
    if len(terms) == 5 and re.fullmatch(NAME, terms[2]) and {*signs} <= {"<", r"\le"}:
        return f"{'[('[signs[0] == '<']}{terms[0]},{terms[4]}{'])'[signs[1] == '<']}"
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
