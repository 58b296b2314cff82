"""Units: what stands behind a value, whether two of them are the same, and the words that change a value."""

import re
from collections import Counter
from fractions import Fraction

SAME = (
    ("%", "percent", "percentage", "pct"),
    ("degree", "deg"),
    ("C", "celsius", "centigrade"),
    ("F", "fahrenheit"),
    ("mm", "millimeter", "millimetre"),
    ("cm", "centimeter", "centimetre"),
    ("m", "meter", "metre"),
    ("km", "kilometer", "kilometre"),
    ("nm", "nanometer", "nanometre"),
    ("inch", "inches", "in"),
    ("foot", "feet", "ft"),
    ("yard", "yd"),
    ("mile", "mi"),
    ("mg", "milligram"),
    ("g", "gram"),
    ("kg", "kilogram"),
    ("lb", "pound", "£"),
    ("ounce", "oz"),
    ("ml", "mL", "milliliter", "millilitre"),
    ("l", "L", "liter", "litre"),
    ("ms", "millisecond"),
    ("second", "sec", "s"),
    ("minute", "min"),
    ("hour", "hr", "h"),
    ("day",),
    ("week",),
    ("month",),
    ("year", "yr"),
    ("cent",),
    ("dollar", "usd", "$"),
    ("euro", "eur", "€"),
    ("yen", "yuan", "rmb", "¥", "元"),  # one sign may be either
    ("rupee", "rs", "inr", "₹"),
    ("radian", "rad"),
    ("J", "joule"),
    ("kJ", "kilojoule"),
    ("W", "watt"),
    ("kW", "kilowatt"),
    ("MW", "megawatt"),
    ("N", "newton"),
    ("V", "volt"),
    ("A", "amp", "ampere"),
    ("mA", "milliampere"),
    ("Hz", "hertz"),
    ("kHz", "kilohertz"),
    ("MHz", "megahertz"),
    ("K", "kelvin"),
    ("Pa", "pascal"),
    ("kPa", "kilopascal"),
    ("mol", "mole"),
    ("am",),
    ("pm",),
    ("person", "people"),
    ("child", "children"),
    ("man", "men"),
    ("woman", "women"),
)
KNOWN = {name: row[0] for row in SAME for name in row}
SPEEDS = {"mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour", "kmph": "km/hour"}
TIMES = {"hundred": 100, "dozen": 12, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
TIMES["dozens"] = 12
TIMES |= {"百": 100, "千": 10**3, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
MONEY = ("cent", "dollar", "euro", "yen", "rupee", "lb")
PARTS = ("halves", "thirds", "quarters", "fourths", "fifths", "sixths", "sevenths", "eighths", "ninths", "tenths")
PART = dict(zip(PARTS, (2, 3, 4, 4, 5, 6, 7, 8, 9, 10), strict=True)) | {"hundredths": 100, "thousandths": 1000}
PART |= {"half": 2} | {name.removesuffix("s"): bottom for name, bottom in PART.items() if name != "halves"}
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
)
ONES += " nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBERS = {word: i for i, word in enumerate(ONES.split())} | {word: 10 * i for i, word in enumerate(TENS.split(), 2)}
OPERATORS = {"squared": "^{2}", "cubed": "^{3}", "factorial": "!"}
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
NO_UNIT = re.compile(
    r"\b(?:not|no|never|none|nor|neither|without|except|if|unless|or|plus|minus|(?<!left )over|least|most|zero|(?-i:[nxyz]))\b",
    re.IGNORECASE,
)
BELOW = re.compile(r"(.*?) ?\b(?:below|under) zero")
RATHER = re.compile(r"(?:(?<=\w) |^)(?:of|for|from|on|with|in total|altogether)\b.*")  # what a quantity is of

GLUED = "|".join(
    sorted((name for name in (*KNOWN, *SPEEDS, *TIMES) if len(name) > 1 and name.isalpha()), key=len, reverse=True)
)
POWER = r"(?:\^\{-?\d\})?"
STYLED = rf"\\text\{{[^{{}}]*\}}{POWER}"
WORD = rf"(?:[A-Za-z]{{2,}}|(?<=[ /])[mgshlLNJWVK])\.?{POWER}"
BEHIND = re.compile(
    rf"(.*?[\d)}}!]|.*?\\(?:pi|infty) |.*? ?[a-z])(?<!\\text\{{) *((?:{STYLED})(?:[ /]*{STYLED}|[ /]+{WORD})*)"
    rf"|(.*?(?<![A-Za-z])[\d)}}!]) ((?:{WORD})(?:(?: an? |[ /]+)(?:{WORD}|{STYLED}))*)"
    rf"|(-?[\d.]+)((?:{GLUED})s?{POWER}(?:/{WORD})?)"
    rf"|(.*?(?<![A-Za-z])[\d)}}!]) ?(/ ?(?:{GLUED})s?{POWER}(?![A-Za-z]))"
)
LETTER = re.compile(r"(-?\d+(?:\.\d+)?)[mgshlLNJWV]")  # a unit, unless a name in the other expression
RATIO = re.compile(rf"\\frac\{{ *({STYLED}) *\}}\{{ *({STYLED}) *\}}")
DEGREES = re.compile(r"((?:(?!\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])).)+?) *\^\{\\circ *\} *(?:([CF])|\\text\{ ?([CF]) ?\})?")
PERCENT = re.compile(r"(.+?) *%")
CURRENCY = r"(?:[$€£¥₹]|(?<![A-Za-z])(?:Rs|USD|EUR|INR|CNY)(?![a-z])\.?)"
BEFORE = re.compile(rf"({CURRENCY}) *(?=-? *[\d(])")
SIGNED = re.compile(rf"-? *({CURRENCY}) *-? *[\d(].*")
BEHIND_SIGN = re.compile(r"(.*?[\d)}!]) *([€£¥₹])")
# Words in scripts other than Latin and Greek, but for those that say more than a unit: half, or, not, more than
FOREIGN = re.compile(r"(.*?[\d)}!]) *((?:(?![\x00-\u024f\u0370-\u03ff半多余餘以至到或不无無])[^\W\d_])+)")
COUNTED = re.compile(r"\b(?:how many|number of|(?:answer|give it|expressed?) in) (?:whole )?([a-z]+)", re.IGNORECASE)
DECIMAL = re.compile(r"-?\d+(?:\.\d+)?")
SCALE = re.compile(r"\b(?:degrees? )?(celsius|fahrenheit)\b", re.IGNORECASE)
PIECE = re.compile(r"(/|\bper\b)|([%$€£¥₹]|[^\W\d_]+)(?:\^?(-?\d))?")

Unit = frozenset[tuple[str, int]]  # each name with its power


def measured(text: str) -> tuple[str, Unit]:
    """Return the value of an expression in the one spelling, and its unit, which is empty without one.

    Words that change a value do so: 7 million is 7000000, 7 tenths 7/10, 7 squared 7^2. Words such as "if" or "at most" are no
    unit: they stay with the value.
    """
    text = RATIO.sub(r"\1/\2", text.strip())
    sign = SIGNED.fullmatch(text)
    if sign:
        value, unit = measured(BEFORE.sub("", text))
        money = unit_of(sign[1].rstrip("."))
        return value, unit if money <= unit else money | unit
    text = BEFORE.sub("", text)
    found = BEHIND_SIGN.fullmatch(text)
    if found:
        return found[1], unit_of(found[2])
    found = FOREIGN.fullmatch(text)
    if found:
        value, words = _changed(found[1], re.sub(r"([百千万萬亿億])", r"\1 ", found[2]).strip())
        return value, unit_of(words)
    found = DEGREES.fullmatch(text)
    if found:
        return found[1], unit_of(f"degree {found[2] or found[3] or ''}")
    found = PERCENT.fullmatch(text)
    if found:
        return found[1], unit_of("%")
    found = BEHIND.fullmatch(text)
    if not found:
        return text, frozenset()
    value, behind = next((found[i], found[i + 1]) for i in (1, 3, 5, 7) if found[i])
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1 ", behind).replace(" ^", "^")
    words = re.sub(r"(?<=\w) an? (?=\w)", " per ", " ".join(re.sub("[{}]", "", plain).split()))
    value, words = _changed(value.strip(), words)
    return (text, frozenset()) if NO_UNIT.search(words) else (value, unit_of(words))


def without_letter(text: str) -> str:
    """Return the number in a text such as 60g, whose letter is a unit beside a plain number; other texts as they are."""
    found = LETTER.fullmatch(text)
    return found[1] if found else text


def counted_in(question: str) -> list[str]:
    """Return the words that change a number but are what a question counts, as in "How many dozens"."""
    return [word for word in COUNTED.findall(question) if changes(word) or changes(word.removesuffix("s"))]


def _changed(value: str, words: str) -> tuple[str, str]:
    """Return a value as the words behind it change it, and the words that are left, its unit."""
    below = BELOW.fullmatch(words)
    if below:
        value, words = f"-({value})", below[1]
    first, _, rest = words.partition(" ")
    if first.lower() in OPERATORS and not rest:
        return f"({value}){OPERATORS[first.lower()]}", ""
    while first.lower() in TIMES or (first == "k" and DECIMAL.fullmatch(value)):
        value = _product(value, Fraction(TIMES.get(first.lower(), 1000)))
        words = rest
        first, _, rest = words.partition(" ")
    if first.lower() in PART and (first.endswith("s") or value == "1"):
        return _product(value, Fraction(1, PART[first.lower()])), rest
    return value, words


def _product(value: str, factor: Fraction) -> str:
    """Return a value times a factor: the number where it is a decimal, else the product as an expression."""
    if DECIMAL.fullmatch(value):
        number = Fraction(value) * factor
        sign = "-" if number < 0 else ""
        return f"{number}" if number.denominator == 1 else rf"{sign}\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"
    return rf"({value})\cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}"


def unit_of(words: str) -> Unit:
    """Return each name of a unit with its power: those of m/s^2, m s^-2 and meters per second squared are the same."""
    powers: Counter[str] = Counter()
    sign, ahead, last = 1, 1, ""
    words = re.sub(r"(?<=[A-Za-z])\.(?=[A-Za-z]|$|\W)", "", SCALE.sub(r"degree \1", RATHER.sub("", words)))
    for per, word, exponent in PIECE.findall(" ".join(SPEEDS.get(word.lower(), word) for word in words.split())):
        power = POWERS.get(word.lower())
        if per:
            sign = -1
        elif power and last and word.lower().endswith("ed"):
            powers[last] *= power
        elif power:
            ahead = power
        else:
            last = _name(word)
            powers[last] += sign * ahead * int(exponent or 1)
            ahead = 1
    return frozenset((name, power) for name, power in powers.items() if (name, power) != ("unit", 1))


def _name(word: str) -> str:
    """Return the one name of a unit: the known one, a symbol as it is, another word in lower case and the singular."""
    lower = word.lower()
    lowers = [lower, lower.removesuffix("s")] if len(word) > 2 or word[0] != "M" else []
    known = next((KNOWN[name] for name in (word, *lowers) if name in KNOWN), None)
    if known or (len(word) <= 3 and not word.istitle()):
        return known or word
    return re.sub(r"(?<=[^su])s$", "", re.sub(r"(?<=ch|sh)es$|(?<=[sx])es$", "", re.sub(r"ies$", "y", lower)))


def are_same_units(one: Unit, other: Unit) -> bool:
    """Whether two units are the same; one that isn't given may be any, and so may the scale of a degree.

    Money needn't say what it is paid for: $5 per hour is $5.
    """
    common = one & other
    is_part = common in (one, other) and (common == unit_of("degree") or common in (unit_of(name) for name in MONEY))
    return not one or not other or one == other or is_part


def is_unit(word: str) -> bool:
    """Whether a word is a known unit, in the singular or the plural."""
    lower = word.lower()
    return len(word) > 1 and any(name in KNOWN or name in SPEEDS for name in (word, lower, lower.removesuffix("s")))


def changes(word: str) -> bool:
    """Whether a word behind a number changes it, as in 7 million."""
    return any(word.lower() in names for names in (TIMES, PART, OPERATORS))


def number_of(words: str) -> int | None:
    """Return the number below 100 that a text is in words, as "five" or "twenty-five", and None of any other text."""
    tens, _, ones = words.strip().lower().replace("-", " ").partition(" ")
    if not ones:
        return NUMBERS.get(tens)
    is_compound = tens in TENS.split() and 1 <= NUMBERS.get(ones, 0) <= 9
    return NUMBERS[tens] + NUMBERS[ones] if is_compound else None
