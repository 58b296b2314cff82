r"""One spelling for each expression: Unicode, spaces, styles, missing braces and numbers, as TeX would show them."""

import re
import unicodedata
from functools import lru_cache

MOST_CHARACTERS = 2000  # of an expression that is read; longer ones are compared as they are
MOST_NESTED = 40  # arguments and braces within each other, of an expression that is read

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
SIGNS = {
    **dict.fromkeys("✓✔✅", " "),
    **dict.fromkeys("−–‒﹣－", "-"),
    **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "∓": r"\mp "},
    **{"∞": r"\infty ", "°": r"^\circ ", "º": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∖": r"\setminus ", "⁄": "/", "∕": "/"},
    **{"∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "√": r"\sqrt", "′": "'", "’": "'", "⟨": r"\langle ", "⟩": r"\rangle "},
    **{"∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}"},
    **{"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta "},
    **{"λ": r"\lambda ", "μ": r"\mu ", "µ": r"\mu ", "π": r"\pi ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau "},
    **{"φ": r"\phi ", "ϕ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ", "Ω": r"\Omega ", "ℯ": "e", "ⅈ": "i", "ⅇ": "e"},
}
ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\u2061\u2062\u2063\ufeff"), "")
PRIMES = re.compile(r"\^\s*(?:\{\s*(?:\\prime\s*)+\}|\\prime(?![A-Za-z]))")
DEGREE = re.compile(
    r"\^\s*\{\s*\\degree\s*\}|\^?\s*\\degree(?![A-Za-z])|(?<=[\d)}])\s*\\deg(?![A-Za-z])"
    r"|(?<=\d)\s*\^\s*(?:o(?![A-Za-z])|\{\s*o\s*\}|(?P<braced>\{\s*)?\\(?:text|mathrm)\s*\{\s*o\s*\}(?(braced)\s*\}))"
)
TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|\s+|.", re.DOTALL)

SYNONYMS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **{"leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "lbrace": "{", "rbrace": "}"},
    **{"degree": "circ", "lvert": "vert", "rvert": "vert", "infin": "infty", "varnothing": "emptyset", "imath": "i"},
    **{"ast": "cdot", "land": "wedge", "varepsilon": "epsilon", "varphi": "phi", "gets": "leftarrow"},
}
ARGUMENTS = {"frac": 2, "binom": 2, "sqrt": 1, "overline": 1, "bar": 1, "vec": 1, "hat": 1, "overrightarrow": 1, "mathbb": 1}
TEXTS = ("text", "textrm", "textnormal", "mathrm", "mbox", "hbox", "operatorname", "textup", "mathsf", "texttt", "textsf")
STYLES = (
    "textbf",
    "textit",
    "mathbf",
    "mathit",
    "boldsymbol",
    "bm",
    "emph",
    "boxed",
    "fbox",
    "underline",
    "mathcal",
    "ensuremath",
)
DELIMITED = {f"{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")} | {"left", "right"}
UNSEEN = {"displaystyle", "textstyle", "limits", "nolimits", "rm", "bf", "it", "strut", "mathstrut", "bold", *DELIMITED}
SIZES = ("tiny", "scriptsize", "footnotesize", "small", "normalsize", "large", "Large", "LARGE", "huge", "Huge")
SPACES = (*SIZES, "checkmark", "quad", "qquad", "enspace", "thinspace", "medspace", "thickspace", "space", "nobreakspace")


class Unreadable(ValueError):
    """Braces that don't match, or an expression that is too large."""


class _Reader:
    """Reads TeX does: an argument without braces is one token. Exponents are whole numbers, as people write them."""

    def __init__(self, text: str):
        self.tokens, self.at, self.depth = TOKEN.findall(text), 0, 0

    def read(self, closing: str = "") -> str:
        said: list[str] = []
        while self.at < len(self.tokens):
            token = self._take()
            if token == closing:
                return "".join(said)
            said.append(self._one(token))
        if closing:
            raise Unreadable
        return "".join(said)

    def _take(self) -> str:
        if self.at == len(self.tokens):
            raise Unreadable
        self.at += 1
        return self.tokens[self.at - 1]

    def _next(self) -> str:
        """Skip spaces, and return the next token without taking it."""
        while self.at < len(self.tokens) and self.tokens[self.at].isspace():
            self.at += 1
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _one(self, token: str) -> str:
        self.depth += 1
        if self.depth > MOST_NESTED:
            raise Unreadable
        said = self._read_one(token)
        self.depth -= 1
        return said

    def _read_one(self, token: str) -> str:
        if token == "{":
            return self.read("}")
        if token == "}":
            raise Unreadable
        if token in "^_":
            return f"{token}{{{self._script()}}}"
        if token.startswith("\\") and token[1:2].isalpha():
            return self._command(token[1:].rstrip("*"))
        return _sign(token)

    def _command(self, name: str) -> str:
        name = SYNONYMS.get(name, name)
        if name in UNSEEN:
            if name in DELIMITED and self._next() == ".":  # of \left. and \right.
                self._take()
            return ""
        if name in SPACES:
            return " "
        if name in ("color", "textcolor"):
            self._argument()  # which one
            return "" if name == "color" else self._argument()
        if name in TEXTS:
            return self._text()
        if name in STYLES:
            return self._argument()
        if name in ("begin", "end"):
            return self._environment(name)
        root = self._option() if name == "sqrt" else ""
        arguments = "".join(f"{{{self._argument()}}}" for _ in range(ARGUMENTS.get(name, 0)))
        if name in ("{", "}", "i"):
            return name if name == "i" else f"\\{name}"
        return f"\\{name}{root}{arguments}" if arguments else f"\\{name} "

    def _environment(self, name: str) -> str:
        kind = self._argument().strip()
        if (name, kind) == ("begin", "array"):
            self._argument()  # its columns
        return f"\\{name}{{{kind}}}"

    def _argument(self) -> str:
        return self._one(self._take()) if self._next() else self._take()

    def _option(self) -> str:
        if self._next() != "[":
            return ""
        self._take()
        return f"[{self.read(']')}]"

    def _script(self) -> str:
        sign = self._take() if self._next() in ("+", "-") else ""
        return sign + self._script_of(self._next())

    def _script_of(self, begin: str) -> str:
        if begin == "(" and ")" in self.tokens[self.at :]:
            self._take()
            return f"{self._within('(', ')')}"
        if not begin.isdigit():
            return self._argument()
        digits = ""
        while self.at < len(self.tokens) and self.tokens[self.at].isdigit():
            digits += self._take()
        return digits

    def _within(self, opening: str, closing: str) -> str:
        """Read to the `closing` that matches an `opening` already taken."""
        said: list[str] = []
        depth = 1
        while True:
            token = self._take()
            depth += (token == opening) - (token == closing)
            if not depth:
                return "".join(said)
            said.append(self._one(token))

    def _text(self) -> str:
        if self._next() != "{":
            return self._argument()
        inner = self._argument()
        words = re.sub("[{}]", "", " ".join(inner.split()))
        if words in ("i", "e", "d") or not re.search(r"[A-Za-z]", words) or "\\" in words:
            return inner
        measure = re.fullmatch(r"(\$? ?-?\d[\d.,/: ]*) ([A-Za-z][^\d]*)", words)
        if measure:
            return rf"{measure[1]}\text{{{measure[2]}}}"
        return rf"{' ' if inner[:1].isspace() else ''}\text{{{words}}}{' ' if inner[-1:].isspace() else ''}"


def _sign(token: str) -> str:
    if token in ("\\,", "\\;", "\\:", "\\ ", "~", "\\>") or token.isspace():
        return " "
    return {"\\$": "$", "\\%": "%", "\\|": "|", "\\#": "#", "\\&": "and", "\\_": "_"}.get(token, token)


@lru_cache(maxsize=4096)
def spelled(text: str) -> str | None:
    """Return an expression in the one spelling; None if its braces don't match, or it is too large."""
    if len(text) > MOST_CHARACTERS:
        return None
    try:
        return _numbers(re.sub(r"\s+", " ", _priced(_Reader(_ascii(text)).read())).strip())
    except Unreadable:
        return None


def _priced(text: str) -> str:
    """Keep the dollar sign of a price, and no other one: no number within an expression has a unit of its own."""
    return text if re.fullmatch(r"[-\s]*\$[^$]*", text) else text.replace("$", " ")


def _ascii(text: str) -> str:
    text = text.strip().strip("*_` ")
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+", lambda match: f"^{{{match[0].translate(SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+", lambda match: f"_{{{match[0].translate(SUBSCRIPTS)}}}", text)
    text = re.sub(
        r"[¼½¾⅐-⅞]", lambda match: " \\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", match[0]).split("⁄")), text
    )
    text = re.sub(r"([√∛∜])\s*(\d+(?:\.\d+)?|[A-Za-zπ])", r"\1{\2}", text)
    text = re.sub(r"([√∛∜])\s*\(([^()]*)\)", r"\1{\2}", text)
    text = re.sub(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = text.replace("″", "''").replace("‴", "'''")
    text = "".join(SIGNS.get(sign, sign) for sign in text.translate(ZERO_WIDTH))
    text = unicodedata.normalize("NFKC", text)
    text = DEGREE.sub(r"^\\circ ", text)
    text = PRIMES.sub(lambda match: "'" * match[0].count(r"\prime"), text)
    text = re.sub(r"\\!\s*", "", text)
    text = re.sub(r"\\[hv]space\*?\s*\{[^{}]*\}", " ", text)
    text = re.sub(r"\\phantom\s*\{[^{}]*\}", " ", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\{[.,]\}(?=\d)", ".", text)
    text = re.sub(r"^([^\w\\$]*)\$(?=[^$]*$)", r"\1\\$", text)  # the only one is a currency, not the begin of mathematics
    text = re.sub(r"\\\$(?! ?-?\d)|(?<!\\)\$|\\[()]|\\\[|\\\](?!\w)", " ", text)
    text = text.replace("**", "^")
    text = re.sub(r"(?<![\\A-Za-z])(?:infinity|infty|inf)(?![A-Za-z])", r"\\infty ", text)
    return re.sub(r"(?<![\\A-Za-z])(pi|theta)(?![A-Za-z])", r"\\\1 ", text)


NUMBER = r"(?:\d+(?:\.\d+)?)"
GROUPED = re.compile(
    r"(?P<open>_?\{|\\\{|[(\[]|\\langle)|(?P<close>\\\}|[})\]]|\\rangle)"
    r"|(?<![\d.,^_\\])(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+)(?![\d,]|\.\d* \d)"
)
MIXED = re.compile(r"(?<![\w.^_{})\]!])(?<![\d)}] )(\d+) ?\\frac\{(\d+)\}\{(\d+)\}(?!\w)")
SLASHED = re.compile(r"(?<![\w.^_{})\]!/])(?<![\d)}] )(\d+) (\d+)/(\d+)(?![\w/.])")
SCIENTIFIC = re.compile(r"(?<![\w\\.])(\d+\.?\d*)[eE]([+-]?\d+)(?!\w)")
REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)(?:\\(?:overline|bar)\{(\d+)\}|\((\d+)\))")


def _numbers(text: str) -> str:
    text = re.sub(r"(?<![\w.}])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<=\d)\.(?![\d\\(])", "", text)
    text = _joined(text)
    text = SCIENTIFIC.sub(lambda match: rf"{match[1]}\times 10^{{{int(match[2])}}}", text)
    text = REPEATING.sub(_fraction, text)
    text = MIXED.sub(_mixed, text)
    return SLASHED.sub(_mixed, text)


def _joined(text: str) -> str:
    """Join the thousands of numbers; within brackets a comma sets numbers apart, unless a group begins with 0, as in 1,000."""
    around: list[str] = []

    def join(match: re.Match[str]) -> str:
        if match["open"]:
            around.append(match["open"])
        elif match["close"]:
            around[-1:] = []
        elif "," not in match[0] or ",0" in match[0] or around[-1:] in ([], ["{"]):
            return re.sub("[, ]", "", match[0])
        return match[0]

    return GROUPED.sub(join, text)


def _mixed(match: re.Match[str]) -> str:
    whole, top, bottom = match.groups()
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})" if len(top) <= len(bottom) and int(top) < int(bottom) else match[0]


def _fraction(match: re.Match[str]) -> str:
    whole, fixed, again = match[1], match[2], match[3] or match[4]
    top = int(f"{whole}{fixed}{again}") - int(f"{whole}{fixed}" or 0)
    return rf"\frac{{{top}}}{{{'9' * len(again)}{'0' * len(fixed)}}}"


def compact(text: str) -> str:
    """Return `text` in the one spelling without the spaces that mean nothing: those but between two digits."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    return re.sub(r"(?<!\d) | (?!\d)", "", text).rstrip(".,;")
