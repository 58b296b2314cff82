"""Answers in prose: the expression that a text without a box states last."""

import re
from itertools import pairwise

from .reasoning import STATED, own_turn
from .units import changes, is_unit

MOST_STATED = 300  # characters of a statement that is searched for an expression

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
    r"|(?<![\w\\])(?:and|or|of|plus|minus|(?<![\d)}%] )times|divided|by|the|an|with|to|from|for|than"
    r"|because|since|is|are|equals))\s*\Z",
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
# Where an explanation of a value begins
PROSE = re.compile(
    r"[,;]?\s+\(?(?:because|since|as|so|which|where|when|after|if|for(?! a (?:grand )?total of)|by|in total|altogether|not)\b"
    r"|[,;]\s+[A-Za-z]{2}|\s[-\u2014]\s(?=[A-Za-z]{2})"
    r"|\s\((?!(?:or|and|at|up|mod|base|in base|sin|cos|tan|log|ln|sqrt|pi)\b)(?=[^()]{0,80}?(?<![A-Za-z\\])[A-Za-z]{2})"
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
LEADING = re.compile(  # a clause before the one that says what is so
    r"\A(?:(?:so|thus|hence|therefore|then|and|but|now),? )?(?:after|in|since|if|when|for|by|with|because|as|at|during|on|of"
    r"|from|over|among|within|given|out of|while|once)\b.{1,120}?, "
    r"(?=(?!(?:which|because|since|as|so|where|when|after|if|for|by|not|and|or|but|plus|per|\w+ing)\b)[A-Za-z])",
    re.IGNORECASE,
)
IS = re.compile(
    r"(?<!which )(?<!that )\b(?:is|are|was|were|be|equals?)(?: (?:about|only|just|then|now|\w+ly))?[\s$:(*-]{1,4}$",
    re.IGNORECASE,
)
REASON = re.compile(r",? because (?:(?!(?<!there) is |, ).)*$")  # that ends a sentence
WORDED = re.compile(r"[A-Za-z]{2,} (?:[A-Za-z]|\$)")
# Between a value and a number of what it is in, of, from or to do: 12 apples in 3 baskets, $12 to buy 3 books
TRAILING = re.compile(
    r"[ $]?(?:\s?(?!(?:is|are|was|were|be|has|have|had|equals?|gives?|makes?|costs?|gets?|needs?|leaves?|ends?|comes?|and|or|he"
    r"|she|they|it|we|you|I)\b)[A-Za-z%$'\u2019-]+){0,3}?\s?"
    r"(?:\b(?:in|on|from|with|per|over|within|during|across|among|for|every|each|out of)"
    r"|(?<!total )(?<!sum )(?<!average )(?<!profit )(?<!cost )(?<!price )(?<!weight )\bof"
    r"|\bto (?!(?:get|obtain|find|give|make|yield|be|reach|equal|form)\b)[a-z]+)"
    r"(?: (?:the|all|these|those|her|his|their|its|my|our|about|just|only|each|every|first|next|last|remaining|other))*"
    r"[\s$(]{1,4}",
    re.IGNORECASE,
)
RATE = re.compile(r"[A-Za-z]{1,3}/[A-Za-z]{1,3}(?:\^\{?\d\}?)?")  # a unit behind a number, not letters
EITHER = re.compile(r"(?: ?[A-Za-z%]+)?,? or \$?")
SOUGHT = re.compile(
    r"\b(?:get|find|compute|calculate|determine|obtain|reach|verify|check) (?:the|our|your|an) (?:final |correct )?$",
    re.IGNORECASE,
)
SUPPOSED = re.compile(r"\blet (?:the|our) (?:final |correct )?$", re.IGNORECASE)
CONCLUDED = re.compile(r"=|\b(?:so|thus|hence|therefore|then|finally|in conclusion)\b", re.IGNORECASE)
LIST_MARK = re.compile(r"(?<=\n)[ \t]{0,9}[-*\u2022] (?=\S)")
BEHIND = re.compile(r" ?(?!in [\w$])([A-Za-z]+)(?:\^\{?\d\}?)?")
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
BETWEEN = re.compile(r" ?(?!in\b)([A-Za-z]+)(?:,| and|, and)? ")
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
    text = LIST_MARK.sub("", DISPLAYED.sub(r"\1\2\3", tagged[-1] if tagged else text))
    found = [match for match in STATED.finditer(text) if _states(text, match)]
    if found and not _is_superseded(text, found[-1]):
        end = found[-1].end()
        field = FIELD.search(found[-1][0]) and JSON.match(text, end)
        if field:
            return _expression(_inside(field).replace("\\\\", "\\"), 0)
        said = text[end : end + MOST_STATED]
        adverbs = ADVERBS.match(said)
        return _expression(_sentence(said[adverbs.end() :] if adverbs else said), 0)
    lines = text[-4 * MOST_STATED :].strip().split("\n")
    line = re.sub(r"^(?:[-*\u2022]|[-=]>|[\u2192\u21d2]) ", "", lines[-1].strip())[-MOST_STATED:].strip()
    if _is_cut(line) or _is_enumerator(lines):
        return []
    last = re.split(r"(?<=[.!?])\s+", LABEL.sub(" ", line).strip())[-1]
    return [] if STATED.search(last) else _expression(last, -1)  # else the answer that it denies


def _states(text: str, announced: re.Match[str]) -> bool:
    """Whether words that announce an answer are followed by one: not denied, supposed, or how it is looked for."""
    before = text[max(0, announced.start() - 60) : announced.start()]
    if DENIES.search(announced[0]) or DENIED.search(before) or SUPPOSED.search(before):
        return False
    return not (SOUGHT.search(before) and re.match("[A-Za-z]{2}", text[announced.end() :]))


def _is_superseded(text: str, announced: re.Match[str]) -> bool:
    """Whether what is announced has no value, such as "an integer", and the text concludes one later."""
    said = text[announced.end() : announced.end() + MOST_STATED]
    sentence = _sentence(said)
    if VALUE.search(sentence) or MATH.search(said):
        return False
    rest = text[text.find(sentence, announced.end()) + len(sentence) :].strip().rpartition("\n")[2][-MOST_STATED:]
    return bool(CONCLUDED.search(rest) and VALUE.search(rest))


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
    if found and which == 0 and WORDED.match(text):
        which = next((i for i, math in enumerate(found) if IS.search(text[: math.start()])), -1)
    if found and which < 0:
        which = _main(text, found)
    if found and _is_bound(text, *found[which].span()):
        return [text]
    if found:
        between = [text[one.end() : other.start()] for one, other in pairwise(found)]
        if between and between[-1].strip() == "to" and not TURNS.search(text):
            return [_range(text, _inside(found[-2]), _inside(found[-1]))]
        is_one = all(re.fullmatch(r"\s*(?:,|(?:,?\s*\w*\s*)(?:and|or))\s*", words) for words in between)
        return [MATH.sub(_inside, text[found[0].start() :])] if is_one and between else [_inside(found[which])]
    text = OUT_OF.sub(r"\1/\2", re.sub(r"\u2212 (?=\d)", "-", BEHIND_CJK.sub("", text)).translate(MINUS))
    text = re.sub(r"\*\*|(?<!\w)\*|\*(?!\w)", "", text).strip()
    is_told = which < 0 or WORDED.match(text) is not None
    listed = _listed(_trimmed(text)) if which < 0 else []
    if listed:
        return [", ".join(listed)]
    text = _main_clause(text) if is_told else text
    text = unexplained(text, False) if is_told and which == 0 else text
    said = _trimmed(unexplained(text.rpartition("=")[2].strip() if is_told else text, "=" in text))
    runs = _runs(said)
    if not (runs and is_told and re.search(r"(?<![A-Za-z\\{])[A-Za-z]{2}", said)):
        at = _main(said, runs) if runs else 0
        return [said[: _end(said, runs[at].end())] if at < len(runs) - 1 else said]
    at = _first(said, runs) if "=" in text else _main(said, runs)
    if at and EITHER.fullmatch(said[runs[at - 1].end() : runs[at].start()]):
        either = [runs[at - 1][0], runs[at][0]]
        if not _is_respelled(either):
            return [", ".join(either)]
    return [_measure(said, runs[: at + 1])]


def _trimmed(said: str) -> str:
    return re.sub(r"^(?:[ :]|\.(?!\d))+|[ .:]+$", "", said)


def _runs(said: str) -> list[re.Match[str]]:
    """Return the expressions with a value in a sentence."""
    found = [run for run in RUN.finditer(said) if VALUE.search(run[0])]
    return [run for run in found if not (RATE.fullmatch(run[0]) and re.search(r"[\d)}] $", said[: run.start()]))]


def _main_clause(said: str) -> str:
    """Return a sentence without what leads to its main clause, as in "After 5 days, he has 12", and without a reason."""
    said = LED.sub("", said, count=1)
    reason = REASON.search(said)
    said = said[: reason.start()] if reason and _runs(said[: reason.start()]) else said
    rest = LEADING.sub("", said, count=1)
    return rest if _runs(rest) else said


def unexplained(said: str, is_value: bool = True) -> str:
    """Return an expression without the explanation behind it; no explanation begins before the first value.

    Unless `is_value`, words may name other values before "is" and the one that they state.
    """
    runs = _runs(said)
    told = None if is_value else next((run for run in runs if IS.search(said[: run.start()])), None)
    first = told if told and re.match(r"\W*[A-Za-z]{2}", said) else runs[0] if runs else None
    cut = PROSE.search(said, first.end() if first else 0)
    left = said[: cut.start()] if cut else ""
    is_open = left.count("{") != left.count("}") or len(re.findall(r"\$(?!\d)", left)) % 2  # in mathematics, no words explain
    return left if left and not is_open else said


def _first(said: str, runs: list[re.Match[str]]) -> int:
    """Return which expression is the first behind "=", or the second where both are one, as in 7 hours 30 minutes."""
    if len(runs) == 1:
        return 0
    between = said[runs[0].end() : runs[1].start()]
    measure, word = BETWEEN.fullmatch(between), BEHIND.match(said, runs[1].end())
    is_one = measure and word and is_unit(measure[1]) and is_unit(word[1])
    return int(bool(is_one or TO.fullmatch(between) or EITHER.fullmatch(between)))


def _main(said: str, found: list[re.Match[str]]) -> int:
    """Return which expression of a sentence is the last that isn't but a number of what it is in, of or from."""
    at = len(found) - 1
    while at and TRAILING.fullmatch(said[found[at - 1].end() : found[at].start()]):
        at -= 1
    return at


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
    end, word = _end(said, end), BEHIND.match(said, _end(said, end, False))
    if word and is_unit(word[1]):
        between = BETWEEN.fullmatch(said[runs[-2].end() : begin]) if len(runs) > 1 else None
        if between and is_unit(between[1]) and between[1] != word[1]:
            begin = runs[-2].start()
    below = BELOW.match(said, end)
    end = below.end() if below else end
    return said if _is_bound(said, begin, end) else said[begin:end]


def _end(said: str, end: int, with_unit: bool = True) -> int:
    """Return where an expression that ends there ends with the words that change it, and its unit."""
    word = BEHIND.match(said, end)
    while word and changes(word[1]):
        end = word.end()
        word = BEHIND.match(said, end)
    return word.end() if with_unit and word and is_unit(word[1]) else end


def _is_bound(said: str, begin: int, end: int) -> bool:
    """Whether the words around an expression make it a bound, or deny it."""
    return bool(BOUND.search(said[:begin]) or BOUND_BEHIND.match(said, end))
