"""Answers in prose: the expression that a text without a box states last."""

import re
from itertools import pairwise

from .units import changes, is_unit

MOST_STATED = 300  # characters of a statement that is searched for an expression

STATED = re.compile(r"\banswers?\b[^.\n]{0,60}?(?:\b(?:is|are|be)\b|[:=])[\s:*_]{0,8}", re.IGNORECASE)
DENIES = re.compile(r"\b(?:cannot|not|never)\b|n['\u2019]t\b", re.IGNORECASE)
DENIED = re.compile(
    r"(?:n['\u2019]t|\bnot)(?: \w{1,12}){1,3}? (?:that )?(?:the )?(?:\w{1,12} )?$", re.IGNORECASE
)  # "I don't think the"
ADVERBS = re.compile(
    r",?\s?(?:(?:about|actually|approximately|around|exactly|hence|indeed|just|now|precisely|roughly|simply|then|therefore|thus)\b"
    r"[,:\s]{1,3}){1,2}",
    re.IGNORECASE,
)
# Between dollars, as Pandoc tells these from prices: nothing is $12 + $5
DOLLARS = r"\$\$([^$]{1,300})\$\$|\$(?!\s)([^$]{1,300})(?<!\s)\$(?!\d)|\$ ([^$]{1,300}) \$(?!\s?\d)"
DISPLAYED = re.compile(r"(\\\[|\$\$)\s{0,9}\n([^\n$]{1,300})\n\s{0,9}(\\\]|\$\$)")  # on a line between its marks
MATH = re.compile(rf"{DOLLARS}|\\\((.{{1,300}}?)\\\)|\\\[(.{{1,300}}?)\\\]", re.DOTALL)
PROSE = re.compile(
    r"[,;]?\s+\(?(?:because|since|as|so|which|where|when|after|if|for|by|in total|altogether|not)\b"
    r"|[,;]\s+[A-Za-z]{2}|\s[-\u2014]\s(?=[A-Za-z]{2})"
)
MINUS = {**dict.fromkeys(map(ord, "\u2212\u2013\u2012\ufe63\uff0d"), "-"), **dict.fromkeys(map(ord, "\u00a0\u2009\u202f"), " ")}

NUMBER = r"(?:(?:\d{1,3}(?:[ ,]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?!\w))?"
BRACES = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
COMMAND = rf"\\[A-Za-z]+(?:\[[^][]{{0,9}}\])?(?:{BRACES})*"
INSIDE = r"(?:(?!(?<![A-Za-z\\])[A-Za-z]{3})[^()\[\]]){1,80}"  # nothing but mathematics: no word
GROUP = rf"[(\[]{INSIDE}[)\]]"
LETTER = (
    r"(?:(?<=\d)(?!(?:st|nd|rd|th)\b)[A-Za-z]{1,3}|(?<![A-Za-z\\'\u2019])(?!(?:a|I) )[A-Za-z])(?![A-Za-z'\u2019])"
    r"|[\u03c0\u03b8\u221e\u221a]"
)
SCRIPT = rf"(?:[\^_](?:{BRACES}|-?\w+|\([^()]*\))|[\u2070\u00b9\u00b2\u00b3\u2074-\u207f])"
TERM = rf"(?:(?:{NUMBER}|{COMMAND}|{GROUP}|{LETTER}){SCRIPT}*)+(?:\s?%|\u00b0)?"
SIGN = r"(?:[-+\u00b1](?=[\d(.\\$\u03c0\u221a])|[-+](?=[A-Za-z](?![A-Za-z])))"
JOIN = (
    rf"(?: ?(?:\*\*|[-+*/\u00d7\u00b7\u22c5\u00f7\u00b1:]|\\(?:times|cdot|div|pm)(?![a-z])) ?[-$]?)(?={TERM})"
    r"|(?<=\d) (?=\d+/\d)|(?<=\d) (?=\\(?:frac|sqrt|pi))"
)
RUN = re.compile(rf"(?<![\w^.])(?:(?<![\w)\]}}.])(?<!^){SIGN}|^{SIGN})?{TERM}(?:(?:{JOIN}){TERM})*")
VALUE = re.compile(r"\d|\\[A-Za-z]|[\u03c0\u221e\u221a]|\w ?[-+*/^]")
CORRECTED = re.compile(r"\s*not\b[^.;]{1,60}?\bbut (?:rather |instead )?(?=[-\\$(\d])", re.IGNORECASE)
LED = re.compile(
    r"\A(?:therefore|thus|hence|so|then|finally|consequently|altogether|overall|in total|as a result|in conclusion),\s+(?=\w)",
    re.IGNORECASE,
)
BEHIND = re.compile(r" ?([A-Za-z]+)(?:\^\{?\d\}?)?")
NEGATIVE = re.compile(r"(?<!\w)(?:minus|negative) (\$|\\\(|)(?=\d)", re.IGNORECASE)
OUT_OF = re.compile(r"(?<![\w.,/])(\d+) out of (?:every )?(\d+)(?![\d.,]*\d)")
BELOW = re.compile(r"(?: degrees?)? (?:below|under) zero", re.IGNORECASE)
COMPARED = r"(?:more|less|fewer|greater|larger|bigger|higher|lower|smaller|other)"
BOUND = re.compile(
    r"\b(?:not(?: (?:actually|exactly|just|quite|really|simply))?|(?:\w{2,8}n['\u2019]t|cannot|never)(?: be)?"
    r"|at (?:most|least)|up to|under|over|above|below|exceed(?:s|ing)?|between\s[^.]{1,30}?\sand"
    rf"|{COMPARED} (?:than(?: or equal to)?|or equal to))[ ~$\\(*]{{0,4}}$",
    re.IGNORECASE,
)
BOUND_BEHIND = re.compile(
    rf"[ $\\)]{{0,3}}(?:[a-z]+ ){{0,2}}(?:(?:or|and) (?:{COMPARED}|above|below|up|over|under)|at (?:most|least))\b",
    re.IGNORECASE,
)
BETWEEN = re.compile(r" ?([A-Za-z]+)(?:,| and|, and)? ")


def stated(text: str) -> list[str]:
    """Return the expression that a text without a box states last, as a list of one, or none."""
    ends = [
        match.end()
        for match in STATED.finditer(text)
        if not DENIES.search(match[0]) and not DENIED.search(text[max(0, match.start() - 60) : match.start()])
    ]
    if ends:
        said = text[ends[-1] : ends[-1] + MOST_STATED]
        adverbs = ADVERBS.match(said)
        return _expression(_sentence(said[adverbs.end() :] if adverbs else said), 0)
    lines = DISPLAYED.sub(r"\1\2\3", text[-4 * MOST_STATED :]).strip().split("\n")
    line = re.sub(r"^[-*\u2022] ", "", lines[-1].strip())[-MOST_STATED:].strip()
    last = re.split(r"(?<=[.!?])\s+", line)[-1]
    return [] if STATED.search(last) else _expression(last, -1)  # else the answer that it denies


def _sentence(text: str) -> str:
    """Return the first sentence or line of `text`."""
    return re.split(r"(?<=[.!?*])\s+(?=[A-Z(])|\n|[.!?]\s*$", text.strip())[0]


def _expression(text: str, which: int) -> list[str]:
    """Return the first or last expression of a sentence."""
    corrected = CORRECTED.match(text)
    text = NEGATIVE.sub(r"\1-", text[corrected.end() :] if corrected else text)
    found = list(MATH.finditer(text))
    if found and _is_bound(text, *found[which].span()):
        return [text]
    if found:
        between = [text[one.end() : other.start()] for one, other in pairwise(found)]
        is_one = all(re.fullmatch(r"\s*(?:,|(?:,?\s*\w*\s*)(?:and|or))\s*", words) for words in between)
        return [MATH.sub(_inside, text[found[0].start() :])] if is_one and between else [_inside(found[which])]
    text = OUT_OF.sub(r"\1/\2", re.sub(r"\u2212 (?=\d)", "-", text).translate(MINUS))
    if which < 0:
        text = LED.sub("", text.rpartition("=")[2].strip(), count=1)
    said = PROSE.split(re.sub(r"\*\*|(?<!\w)\*|\*(?!\w)", "", text).strip(), maxsplit=1)[0].strip(" .:")
    runs = [run for run in RUN.finditer(said) if VALUE.search(run[0])]
    is_prose = bool(re.search(r"(?<![A-Za-z\\{])[A-Za-z]{2}", said))
    if runs and is_prose and (which < 0 or (len(runs) == 1 and re.match(r"[A-Za-z]{2,} [A-Za-z]", said))):
        return [_measure(said, runs)]
    return [said]


def _inside(match: re.Match[str]) -> str:
    return next(filter(None, match.groups()))


def _measure(said: str, runs: list[re.Match[str]]) -> str:
    """Return the last of the expressions in prose with its unit, and with a larger one before it, as in 7 hours 30 minutes.

    A bound, such as "at most 5", is returned with the words around it, which are no value.
    """
    begin, end = runs[-1].span()
    word = BEHIND.match(said, end)
    while word and changes(word[1]):
        end = word.end()
        word = BEHIND.match(said, end)
    if word and is_unit(word[1]):
        end = word.end()
        between = BETWEEN.fullmatch(said[runs[-2].end() : begin]) if len(runs) > 1 else None
        if between and is_unit(between[1]) and between[1] != word[1]:
            begin = runs[-2].start()
    below = BELOW.match(said, end)
    end = below.end() if below else end
    return said if _is_bound(said, begin, end) else said[begin:end]


def _is_bound(said: str, begin: int, end: int) -> bool:
    """Whether the words around an expression make it a bound, or deny it."""
    return bool(BOUND.search(said[:begin]) or BOUND_BEHIND.match(said, end))
