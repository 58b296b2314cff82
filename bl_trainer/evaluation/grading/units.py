"""Units: what stands behind a value, and whether two of them are the same."""

import re

SAME = (
    ("%", "percent", "percentage", "pct"),
    ("degree", "deg"),
    ("mm", "millimeter", "millimetre"),
    ("cm", "centimeter", "centimetre"),
    ("m", "meter", "metre"),
    ("km", "kilometer", "kilometre"),
    ("inch", "inches", "in"),
    ("foot", "feet", "ft"),
    ("yard", "yd"),
    ("mile", "mi"),
    ("mg", "milligram"),
    ("g", "gram"),
    ("kg", "kilogram"),
    ("lb", "pound"),
    ("ounce", "oz"),
    ("ml", "milliliter", "millilitre"),
    ("l", "liter", "litre"),
    ("second", "sec", "s"),
    ("minute", "min"),
    ("hour", "hr", "h"),
    ("day",),
    ("week",),
    ("month",),
    ("year", "yr"),
    ("cent",),
    ("dollar", "usd"),
    ("mph", "miles per hour"),
    ("radian", "rad"),
)
KNOWN = {name: row[0] for row in SAME for name in row}
GLUED = "|".join(sorted((name for name in KNOWN if len(name) > 1 and name.isalpha()), key=len, reverse=True))
POWER = r"(?:\^\{-?\d\})?"
STYLED = rf"\\text\{{[^{{}}]*\}}{POWER}"
WORD = rf"(?:[A-Za-z]{{2,}}|(?<= )[mgshlLNJWVK])\.?{POWER}"
BEHIND = re.compile(
    rf"(.*?[\d)}}!]|.*?\\(?:pi|infty) |.*? ?[a-z])(?<!\\text\{{) *((?:{STYLED})(?:[ /]*{STYLED}|[ /]+{WORD})*)"
    rf"|(.*?(?<![A-Za-z])[\d)}}!]) ((?:{WORD})(?:[ /]+(?:{WORD}|{STYLED}))*)"
    rf"|(-?[\d.]+)((?:{GLUED})s?{POWER})"
)
DEGREES = re.compile(r"(.+?) *\^\{\\circ *\}(?: *(?:C|F|\\text\{[CF]\}))?")
PERCENT = re.compile(r"(.+?) *%")
BEFORE = re.compile(r"(?:[€£¥₹]|Rs\.?|USD) *(?=\d)")


def measured(text: str) -> tuple[str, str | None]:
    """Return the value of an expression in the one spelling, and its unit: None without one, or with one that isn't known."""
    text = BEFORE.sub("", text.strip())
    for pattern, unit in ((DEGREES, "degree"), (PERCENT, "%")):
        found = pattern.fullmatch(text)
        if found:
            return found[1], unit
    found = BEHIND.fullmatch(text)
    if not found:
        return text, None
    value, unit = next((found[i], found[i + 1]) for i in (1, 3, 5) if found[i])
    return value.strip(), _known(unit)


def _known(unit: str) -> str | None:
    power = re.search(r"\^\{(-?\d)\}$", unit)
    name = re.sub(rf"\\text\{{([^{{}}]*)\}}|{POWER}$", lambda match: match[1] or "", unit).strip(" .").lower()
    known = KNOWN.get(name) or KNOWN.get(name.removesuffix("s"))
    return f"{known}{power[0] if power else ''}" if known else None


def is_unit(word: str) -> bool:
    """Whether a word is a known unit, in the singular or the plural."""
    return len(word) > 1 and _known(word) is not None
