"""Whether two expressions have the same value: exactly where they are rational, else to many digits, in bounded work."""

import logging
import math
import re
import signal
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial, reduce
from typing import Any

from ...errors import RecipeError

MOST_BITS = 1 << 17  # of a number that is computed; what is larger is compared as it is written
MOST_SUMMED = 32  # of the limits of a sum, likewise
MOST_TERMS = 100  # of a sum that is written out
DIGITS = 40  # of numbers that aren't rational
MOST_DIGITS = 10_000  # of large ones, which would else hide what is added to them
MOST_READ = 600  # characters of an expression that math-verify reads
MOST_BRACKETS = 8  # within each other, and bars; math-verify's time doubles with each
SECONDS = 3  # of CPU time, of reading, of comparing, and of math-verify, which no expression of this size is meant to reach
POINTS = (
    ("1.7", "2.3", "0.6"),
    ("0.37", "3.1", "1.9"),
    ("-1.3", "0.8", "2.7"),
    ("2.9", "-0.7", "-1.6"),
    ("-2.2", "-1.1", "0.9"),
)
COMPUTED = re.compile(r"\\(?:lfloor|lceil|bmod|pmod|mod)(?![a-z])|gcd|lcm|max|min")  # as math-verify reads them
NAME = re.compile(r"\\(?:text|mathbb)\{[^{}]*\}|\\[A-Za-z]+|([A-Za-z])(?:_\{([^{}A-Z']*)\})?('*)")
DOUBLE = re.compile(r"(?<![\d.!])(\d{1,2})!!(?!!)")  # a double factorial, which sympy reads as two
ANGLE = re.compile(r"(\d+(?:\.\d+)?) *\^\{\\circ *\}")  # in degrees, within a trigonometric function
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
TOWER = re.compile(r"!|\^\{[^{}]*(?:\d{3}|\^)|\binom")

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once where its own time limit is off


class TooLarge(ValueError):
    """A number that would take too much time or memory."""


class OutOfTime(BaseException):
    """A computation that reached the time limit; no Exception, since sympy and math-verify catch most of these."""


def math_verify() -> Any:
    """Import math-verify. Raises RecipeError where it isn't installed."""
    try:
        import math_verify
    except ImportError as error:
        raise RecipeError(f"grading it needs math-verify ({error}). Run `pip install '.[evaluation]'`.") from error
    return math_verify


def parsed(text: str) -> Any:
    """Return an expression in the one spelling as sympy's, None if it isn't one or takes too long."""
    try:
        return _parsed(text)
    except OutOfTime:
        return None


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    """Return an expression as sympy's, None if it isn't one. Raises OutOfTime, which is not kept as a result."""
    if not _is_readable(text):
        return None
    from latex2sympy2_extended import NormalizationConfig

    plain = NormalizationConfig(
        basic_latex=False, units=False, malformed_operators=False, nits=False, boxed="last", equations=False
    )
    config = math_verify().LatexExtractionConfig(normalization_config=plain)
    found = _timed(
        math_verify().parse,
        rf"\boxed{{{_with_products(text)}}}",
        [config],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return _with_imaginary_unit(found[0]) if found else None


def _timed(compute: Callable[..., Any], *values: Any, **options: Any) -> Any:
    """Return what is computed. Raises OutOfTime after `SECONDS` of this thread's CPU time, which no other work uses up.

    Off the main thread, and on Windows, there are no such alarms, and sizes alone bound the work.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return compute(*values, **options)
    end = time.thread_time() + SECONDS

    def stop(number: int, frame: Any) -> None:
        left = end - time.thread_time()
        if left <= 0:
            raise OutOfTime
        signal.setitimer(signal.ITIMER_VIRTUAL, left)  # the alarm counts the time of all threads

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        return compute(*values, **options)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


def _is_readable(text: str) -> bool:
    """Whether an expression is small, and has no numbers side by side, which sympy would add, and no marks that it drops."""
    depth = most = 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        most = max(most, depth)
    if not text.strip() or len(text) > MOST_READ or max(most, text.count("|")) > MOST_BRACKETS:
        return False
    lost = re.search(r"\d \d|\d *\\text|\\text\{[^{}]*\} *\d|!!", DOUBLE.sub("", text))
    return not lost and "'" not in NAME.sub("", text) and _are_small(text)


def _are_small(text: str) -> bool:
    """Whether what math-verify computes as it reads is small: binomials of numbers below 10,000, no rounding of towers."""
    if COMPUTED.search(text) and TOWER.search(text):
        return False
    pairs = re.findall(r"\\binom\{([^{}!^]*)\}\{([^{}!^]*)\}", text)
    digits = [len(re.sub(r"\D", "", part)) for pair in pairs for part in pair]
    return len(pairs) == text.count(r"\binom") and max(digits, default=0) <= 4


def _with_products(text: str) -> str:
    """Write the signs that math-verify needs: 2(3) is a product, and i stands alone."""
    text = ANGLE.sub(r"(\1\\cdot \\frac{\\pi }{180})", text) if TRIGONOMETRIC.search(text) else text
    text = DOUBLE.sub(lambda match: f"({math.prod(range(int(match[1]), 0, -2))})", text)
    text = re.sub(r"(?<=[\d)]) *(?=\()|(?<=\)) *(?=\d)|(?<=\d) *(?=\\frac)", r"\\cdot ", text)
    return NAME.sub(_name, re.sub(r"(?<![A-Za-z\\])i(?![A-Za-z'])", " i ", text))


def _name(match: re.Match[str]) -> str:
    """Mark a capital letter and primes, since math-verify reads all letters in lower case and drops primes."""
    letter, index, primes = match.groups()
    marks = ("00" if letter.isupper() else "") + "09" * len(primes) if letter else ""
    return f" {letter.lower()}_{{{marks}{index or ''}}}" if marks else match[0]


def _with_imaginary_unit(value: Any) -> Any:
    from sympy import I, Symbol

    try:
        symbols = getattr(value, "free_symbols", ())
        renamed = {symbol: I if symbol.name == "i" else Symbol(symbol.name, real=True) for symbol in symbols}
        return value if all(symbol == other for symbol, other in renamed.items()) else value.xreplace(renamed)
    except Exception:  # as in _tried; also of a matrix, or of a relation between complex numbers
        return value


def is_same_value(one: str, other: str) -> bool:
    """Whether two expressions in the one spelling have the same value."""
    left, right = parsed(one), parsed(other)
    if left is None or right is None:
        return False
    is_same = _tried(_compare_or_match, left, right, otherwise=False)
    return verified(left, right) if is_same is None else bool(is_same)


def number(text: str) -> Any:
    """Return the real number that an expression in the one spelling is, to many digits; None if it isn't one."""
    value = parsed(text)
    return None if value is None else _tried(_real, value, otherwise=None)


def _real(value: Any) -> Any:
    _bits(value)
    found = value.evalf(DIGITS) if not value.free_symbols and _ends(value) else None
    return found if getattr(found, "is_Float", False) or getattr(found, "is_Rational", False) else None


def _tried(compute: Callable[..., Any], *values: Any, otherwise: bool | None) -> Any:
    """Return what is computed of sympy's values, and `otherwise` where that fails or takes too long.

    What a model writes may be any expression, and sympy raises nearly any error on one that has no value or that it can't
    work with, RecursionError included. This must not end the evaluation of all other answers.
    """
    try:
        return _timed(compute, *values)
    except (Exception, OutOfTime):
        return otherwise


def verified(left: Any, right: Any) -> bool:
    """Whether math-verify takes two expressions of sympy's as the same."""
    return bool(_tried(partial(math_verify().verify, timeout_seconds=None), left, right, otherwise=False))


def _compare_or_match(left: Any, right: Any) -> bool | None:
    """Compare two values, but as they are written where they are too large."""
    try:
        return _compare(left, right)
    except TooLarge:
        return bool(left == right)


def _compare(left: Any, right: Any) -> bool | None:
    """Whether two values are equal; None where that isn't decided by computing them."""
    from sympy import Expr, Float

    for value in (left, right):
        _bits(value)
    cells = _cells(left), _cells(right)
    if any(cells):
        return cells[0] is not None and cells[1] is not None and _are_same_cells(cells[0], cells[1])
    if not (isinstance(left, Expr) and isinstance(right, Expr)):
        return None
    is_rounded = left.has(Float) or right.has(Float)
    one, other = _rational(left), _rational(right)
    if one is not None and other is not None:
        return one == other or (is_rounded and _is_near(abs(one - other), abs(one), abs(other)))
    if not left.free_symbols and not right.free_symbols:
        return _agree(left, right, is_rounded)
    return _agree_everywhere(left, right, is_rounded)


def _cells(value: Any) -> list[list[Any]] | None:
    """Return the rows of a matrix, or of what is computed of matrices; None of anything else."""
    from sympy import MatrixBase, MatrixExpr

    if getattr(value, "has", None) and not isinstance(value, MatrixBase) and value.has(MatrixBase, MatrixExpr):
        value = value.doit()
        value = value.as_explicit() if isinstance(value, MatrixExpr) else value
    return value.tolist() if isinstance(value, MatrixBase) else None


def _are_same_cells(one: list[list[Any]], other: list[list[Any]]) -> bool:
    if [*map(len, one)] != [*map(len, other)]:
        return False
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return all(left == right or _compare(left, right) for left, right in pairs)


def _is_near(gap: Fraction, one: Fraction, other: Fraction) -> bool:
    """Whether a rounded number is within 6 decimals of another one, and of its size."""
    return gap <= Fraction(5, 10**7) and gap <= max(one, other) / 10**5


def _agree(left: Any, right: Any, is_rounded: bool) -> bool | None:
    """Compare two numbers to many digits; None if one can't be computed.

    Numbers that agree are compared again to as many digits more as they may be large.
    """
    left, right = _written_out(left), _written_out(right)
    if not (_ends(left) and _ends(right)):
        return bool(left == right)
    found = _agree_to(DIGITS, left, right, is_rounded)
    more = int(min(max(_bits(left), _bits(right)) * math.log10(2), MOST_DIGITS))
    if not found or is_rounded or more <= DIGITS / 4:
        return found
    return _agree_to(DIGITS + more, left, right, is_rounded) is not False


def _agree_to(digits: int, left: Any, right: Any, is_rounded: bool) -> bool | None:
    from sympy import nan, oo, zoo

    one, other = (value.evalf(digits, maxn=2 * digits + 60) for value in (left, right))
    if any(value.has(nan, oo, zoo) for value in (one, other)):
        return bool(one == other) if not one.has(nan) else None
    if not (one.is_number and other.is_number and _is_computed(one) and _is_computed(other)):
        return None
    gap, size = abs(one - other), max(abs(one), abs(other))
    if is_rounded and size < 1e300:
        return _is_near(*(Fraction(float(value)) for value in (gap, abs(one), abs(other))))
    return bool(gap * 10 ** (digits - 5) <= size) if size else True


def _limits(value: Any) -> list[Any]:
    """Return the limits of all sums and products in a value, those of inner ones at 1 for the outer ones' names."""
    from sympy import Product, Sum

    limits = [limit for part in value.atoms(Sum, Product) for limit in part.limits]
    names = {name: 1 for name, *_ in limits}
    return [end.subs(names) for _, *ends in limits for end in ends]


def _ends(value: Any) -> bool:
    """Whether all sums and products run between integers: with another limit evalf never ends."""
    return all(end.is_Integer or end.is_infinite for end in _limits(value))


def _written_out(value: Any) -> Any:
    """Return a value with the terms of each short sum or product, which evalf doesn't compute within each other."""
    from sympy import Product, Sum

    def is_short(part: Any) -> bool:
        ends = _limits(part) if isinstance(part, (Sum, Product)) else []
        return bool(ends) and all(
            first.is_Integer and last.is_Integer and last - first < MOST_TERMS
            for first, last in zip(ends[::2], ends[1::2], strict=True)
        )

    return value.replace(is_short, lambda part: part.doit())


def _is_computed(value: Any) -> bool:
    from sympy import Float, Integer, Rational

    return all(part.is_zero or isinstance(part, (Float, Integer, Rational)) for part in value.as_real_imag())


def _agree_everywhere(left: Any, right: Any, is_rounded: bool) -> bool | None:
    """Compare two expressions at a few points; None if too few of these are in their domain."""
    symbols = sorted(left.free_symbols | right.free_symbols, key=lambda symbol: symbol.name)
    if left.free_symbols != right.free_symbols and len(symbols) > len(POINTS[0]):
        return None
    from sympy import Integer, Rational

    whole = {name for value in (left, right) for limit in _limits(value) for name in limit.free_symbols}
    tried = []
    for number, point in enumerate(POINTS):
        at = {symbol: Rational(point[i % 3]) + Rational(i, 7) for i, symbol in enumerate(symbols)}
        at |= {symbol: Integer(3 + number + i) for i, symbol in enumerate(symbols) if symbol in whole}
        tried.append(_at(left, right, at, is_rounded))
        if tried[-1] is False:
            return False
    return True if tried.count(True) >= 3 else None


def _at(left: Any, right: Any, at: dict[Any, Any], is_rounded: bool) -> bool | None:
    one, other = left.subs(at), right.subs(at)
    for value in (one, other):
        _bits(value)
    return _agree(one, other, is_rounded)


def _bits(value: Any) -> float:
    """Return a bound of the base-2 logarithm of a value's size. Raises TooLarge where it would take too much to compute."""
    from sympy import MatPow, MatrixBase, Number, NumberSymbol, Pow, Product, Sum, exp, factorial

    args = [_bits(arg) for arg in (value.flat() if isinstance(value, MatrixBase) else getattr(value, "args", ()))]
    if isinstance(value, Number):
        found = _length(value)
    elif isinstance(value, NumberSymbol):
        found = 2.0
    elif isinstance(value, (Pow, MatPow, exp)):
        base = 1.5 if isinstance(value, exp) else args[0]
        found = max(base, 1.0) * 2.0 ** min(args[-1], 60)
    elif isinstance(value, factorial):
        found = 2.0 ** min(args[0], 60) * max(args[0], 1.0)
    else:
        found = sum(args) + len(args)
    if found > (MOST_SUMMED if isinstance(value, (Sum, Product)) else MOST_BITS):
        raise TooLarge
    return found


def _length(value: Any) -> float:
    if not value.is_finite:
        return 1.0
    if value.is_Rational:
        return float(max(abs(value.p), value.q).bit_length()) if value.q != 1 else math.log2(max(abs(value.p), 1) + 1)
    return max(1.0, abs(float(value._mpf_[2] + value._mpf_[3])))


def _rational(value: Any) -> Fraction | None:
    """Return the exact value of a rational expression, whose decimals are as they are written; None if it isn't one."""
    from sympy import Add, Float, Mul, Pow, Rational, factorial

    if isinstance(value, Rational):
        return Fraction(value.p, value.q) if value.is_finite else None
    if isinstance(value, Float):
        return Fraction(str(value))
    if not isinstance(value, (Add, Mul, Pow, factorial)):
        return None
    args = [_rational(arg) for arg in value.args]
    if any(arg is None for arg in args):
        return None
    numbers = [arg for arg in args if arg is not None]
    if isinstance(value, (Add, Mul)):
        return reduce(lambda one, other: one + other if isinstance(value, Add) else one * other, numbers)
    return _power(*numbers) if isinstance(value, Pow) else _factorial(numbers[0])


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    is_defined = exponent.denominator == 1 and (base or exponent > 0)
    return base**exponent.numerator if is_defined else None


def _factorial(of: Fraction) -> Fraction | None:
    return Fraction(math.factorial(of.numerator)) if of.denominator == 1 and of >= 0 else None
