"""Answers in prose: the expression that a text without a box states last."""

import re
from itertools import pairwise

from .reasoning import own_turn
from .units import changes, is_unit

MOST_STATED = 300  # characters of a statement that is searched for an expression

STATED = re.compile(
    r"(?:\b(?:final_)?answers?\b[^.\n]{0,60}?(?:\b(?:is|are|be)\b|[:=\uff1a])"
    r"|\b(?:respuesta|resposta|risposta|r[e\u00e9]ponse|antwort)\b[^.\n]{0,60}?(?:\b(?:es|est|\u00e9|\u00e8|ist|lautet)\b|[:=])"
    r"|\b\u043e\u0442\u0432\u0435\u0442\b\s?[:=\u2013\u2014]"
    r"|(?:\u7b54\u6848|\u7b54\u3048|\u6b63\u89e3)\s?(?:\u662f|\u4e3a|\u70ba|\u306f|[:=\uff1a])"
    r"|(?:\uc815\ub2f5|\ub2f5)(?:\uc740|\s?[:=]))[\s:*_\uff1a]{0,8}",
    re.IGNORECASE,
)
# A field of JSON, the element of a prompt's format, and a line in a fence of its own
FIELD = re.compile(r"answers?[\"'*]{1,3}\s?:\s*\Z", re.IGNORECASE)
JSON = re.compile(r"\"((?:[^\"\\\n]|\\.){1,300})\"|\[([^]\n]{1,300})\]|([^\",}\n]{1,300})(?=[,}\n])")
TAGGED = re.compile(r"<answer>(.{1,300}?)</answer>", re.IGNORECASE | re.DOTALL)
FENCED = re.compile(r"```(?:text|txt|plaintext|math|latex|output)?[ \t]{0,9}\n([^\n`]{1,300})\n[ \t]{0,9}```")
# Chinese, Japanese and Korean words behind a value, unless they change it, as in 18\u4e07
BEHIND_CJK = re.compile(
    r"(?<=[\d)}%$])\s?(?![\u767e\u5343\u4e07\u842c\u4ebf\u5104\u5206\ubc31\ucc9c\ub9cc\uc5b5])"
    r"[\u3002\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3].*",
    re.DOTALL,
)
# How a truncated line ends
UNFINISHED = re.compile(
    r"(?::[\s*_]{0,4}|[+=\u00d7\u00b7\u00f7/]|\s[-*\u2212]|\\(?:times|cdot|div|pm)"
    r"|(?<![\w\\])(?:and|or|of|plus|minus|times|divided|by|the|an|with|to|from|for|than|because|since|is|are|equals))\s*\Z",
    re.IGNORECASE,
)
HANGING = re.compile(r"(?<![*\s])\*\Z")  # a truncated product, unless emphasis began before
EMPHASIS = re.compile(r"(?<!\w)\*(?=[^\s*])")
ENUMERATOR = re.compile(r"[\s#*>(]{0,9}(\d{1,3})[.):]")
LABEL = re.compile(
    r"(?:(?<!\beach )(?<!\bevery )(?<!\bper )\b[Ss]tep|\b(?:Case|Part|Problem|Question|Option|Equation|Example|Exercise))"
    r" (?:#|No\. ?)?\d{1,3}\b(?![.,]\d| ?[-+*/^=%])[.):]?"
)
DENIES = re.compile(
    r"\b(?:cannot|not|never)\b|n['\u2019]t\b|\b(?:respuesta|resposta|risposta)\b.{0,60}?\b(?:no|non|n\u00e3o)\b", re.IGNORECASE
)
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
LISTS = re.compile(
    r"(?<!\bthere )\bare(?: (?:all|both|either|exactly|just|simply))?:? "
    r"|\b(?:roots|solutions|zeros|zeroes|values|numbers|factors): ",
    re.IGNORECASE,
)
ASSIGNED = re.compile(r"(?<![\w\\^_])([A-Za-z]) ?= ?(?=[-+\d.\\(])")
JOINT = re.compile(r",? (?:and|or) |, |,(?!\d{3}(?!\d))")
TO = re.compile(r"(?: [A-Za-z]+| ?%)? to ")
TURNS = re.compile(r"\b(?:simplif|round|reduc|convert|approximat)[a-z]*\b", re.IGNORECASE)


def stated(text: str) -> list[str]:
    """Return the expression that a text without a box states last, as a list of one, or none."""
    text = FENCED.sub(r"\1", own_turn(text))
    tagged = TAGGED.findall(text)
    text = tagged[-1] if tagged else text
    found = [
        match
        for match in STATED.finditer(text)
        if not DENIES.search(match[0]) and not DENIED.search(text[max(0, match.start() - 60) : match.start()])
    ]
    if found:
        end = found[-1].end()
        field = FIELD.search(found[-1][0]) and JSON.match(text, end)
        if field:
            return _expression(_inside(field).replace("\\\\", "\\"), 0)
        said = text[end : end + MOST_STATED]
        adverbs = ADVERBS.match(said)
        return _expression(_sentence(said[adverbs.end() :] if adverbs else said), 0)
    lines = DISPLAYED.sub(r"\1\2\3", text[-4 * MOST_STATED :]).strip().split("\n")
    line = re.sub(r"^(?:[-*\u2022]|[-=]>|[\u2192\u21d2]) ", "", lines[-1].strip())[-MOST_STATED:].strip()
    if _is_cut(line) or _is_enumerator(lines):
        return []
    last = re.split(r"(?<=[.!?])\s+", LABEL.sub(" ", line).strip())[-1]
    return [] if STATED.search(last) else _expression(last, -1)  # else the answer that it denies


def _is_cut(line: str) -> bool:
    """Whether a line ends where it cannot: in an operator, unless that is of a price (18/-), a colon, or a word that joins."""
    if line.endswith("/-"):
        return False
    return bool(UNFINISHED.search(line) or (HANGING.search(line) and not EMPHASIS.search(line)))


def _is_enumerator(lines: list[str]) -> bool:
    """Whether the last line is but the number of a step, behind one with the number before."""
    last = ENUMERATOR.fullmatch(lines[-1].strip().rstrip("*"))
    before = [ENUMERATOR.match(line) for line in lines[:-1]]
    return bool(last) and any(each and int(each[1]) + 1 == int(last[1]) for each in before)  # type: ignore[index]


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
        if between and between[-1].strip() == "to" and not TURNS.search(text):
            return [_range(text, _inside(found[-2]), _inside(found[-1]))]
        is_one = all(re.fullmatch(r"\s*(?:,|(?:,?\s*\w*\s*)(?:and|or))\s*", words) for words in between)
        return [MATH.sub(_inside, text[found[0].start() :])] if is_one and between else [_inside(found[which])]
    text = OUT_OF.sub(r"\1/\2", re.sub(r"\u2212 (?=\d)", "-", BEHIND_CJK.sub("", text)).translate(MINUS))
    listed = _listed(re.sub(r"\*\*", "", text).strip(" .")) if which < 0 else []
    if listed:
        return [", ".join(listed)]
    if which < 0:
        text = LED.sub("", text.rpartition("=")[2].strip(), count=1)
    said = PROSE.split(re.sub(r"\*\*|(?<!\w)\*|\*(?!\w)", "", text).strip(), maxsplit=1)[0].strip(" .:")
    runs = [run for run in RUN.finditer(said) if VALUE.search(run[0])]
    is_prose = bool(re.search(r"(?<![A-Za-z\\{])[A-Za-z]{2}", said))
    if runs and is_prose and (which < 0 or (len(runs) == 1 and re.match(r"[A-Za-z]{2,} [A-Za-z]", said))):
        return [_measure(said, runs)]
    return [said]


def _listed(said: str) -> list[str]:
    """Return the expressions of a list that ends a sentence and is announced by a plural, or assigned to one name."""
    begins = [found.end() for found in LISTS.finditer(said)] + [found.start() for found in ASSIGNED.finditer(said)]
    for begin in begins:
        parts = JOINT.split(said[begin:])
        names = {found[1] for found in map(ASSIGNED.match, parts) if found}
        if len(parts) > 1 and len(names) <= 1 and all(map(_is_item, parts)) and not (names and _is_respelled(parts)):
            return parts
    return []


def _is_respelled(parts: list[str]) -> bool:
    """Whether the parts behind a name may be one value in several spellings, as in x = 1/2 or 0.5."""
    return not all(map(ASSIGNED.match, parts)) and len({re.sub(r"[^./%]", "", part) for part in parts}) > 1


def _is_item(part: str) -> bool:
    """Whether a part of a list is one expression, with its name and unit."""
    name = ASSIGNED.match(part)
    said = part[name.end() :] if name else part
    run = RUN.match(said)
    if not run or not VALUE.search(run[0]):
        return False
    behind = said[run.end() :].strip()
    return not behind or is_unit(behind)


def _range(said: str, one: str, other: str) -> str:
    """Return "2 to 3" as the ratio that it is called, or else as the words that it stands in, which are no value."""
    return f"{one}:{other}" if re.search(r"\bratio\b", said, re.IGNORECASE) else said


def _inside(match: re.Match[str]) -> str:
    return next(filter(None, match.groups()))


def _measure(said: str, runs: list[re.Match[str]]) -> str:
    """Return the last of the expressions in prose with its unit, and with a larger one before it, as in 7 hours 30 minutes.

    A bound, such as "at most 5", is returned with the words around it, which are no value.
    """
    begin, end = runs[-1].span()
    if len(runs) > 1 and TO.fullmatch(said[runs[-2].end() : begin]) and not TURNS.search(said):
        return _range(said, runs[-2][0], runs[-1][0])
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
