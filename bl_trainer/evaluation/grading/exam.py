"""How answers state, deny and list the options of a question: the patterns of `letters`."""

import re
from collections import Counter
from string import ascii_uppercase

# Words allowed between an announcement and its letter. "not" is not among them
LEAD = (
    r"(?i:\b(?:the|is|are|be|was|as|but|rather|therefore|thus|most|either|answer|option|choice|letter"
    r"|(?!(?:un|least )likely|hardly|scarcely|barely|rarely)\w{1,20}ly)\b"
    r"|[\s:=*_`'\"\u2018\u201c$(\[{>-]){0,14}"
)
# "A" and "I" are words too: before a word in lower case other than these
GOES_ON = r"(?:because|since|as|due|for|given|which|but|not|or|and|is|was|would|in)\b"
ANNOUNCED = (
    r"\b(?:final_)?(?:answer|option|choice)(?:_\w{1,9})?\b[^.\n]{0,40}?(?:\b(?:is|be)\b|:)|\banswer\s?(?:>|-|=|\u2013|\u2014)"
    r"|\bthe (?:best|right|correct)(?: one)? is\b|\b(?:choose|pick|select|say|guess|(?:go|going|opt|vote) (?:with|for))\b"
    r"|\blean(?:ing|s)? towards?\b|\banswer\s?[\u2192\u21d2]"
    r"|\b(?:respuesta|resposta|risposta|r[e\u00e9]ponse|antwort)\b(?:(?!\b(?:no|non|n\u00e3o)\b)[^.\n]){0,40}?"
    r"(?:\b(?:es|est|\u00e9|\u00e8|ist|lautet)\b|:)"
    r"|\b\u043e\u0442\u0432\u0435\u0442\b\s?[:\u2013\u2014]"
    r"|(?:\u7b54\u6848|\u7b54\u3048|\u6b63\u89e3)\s?(?:\u662f|\u4e3a|\u70ba|\u306f|:)|(?:\uc815\ub2f5|\ub2f5)(?:\uc740|\s?:)"
)
# Words that single an option out, which count where nothing announces an answer
LIKELY = r"(?:likely|probable|plausible|appropriate|suitable|accurate|consistent)(?! (?:not|wrong|incorrect|false)\b)"
SINGLED = rf"\bmost {LIKELY}\b[^.:\n]{{0,80}}?(?:\bis\b|:)"
# What announces one answer, not a list of the options
ONE = (
    r"(?i:\b(?:answer|(?:correct|right|best) (?:option|choice))\b"
    r"(?:(?!\b(?:choices|options|answers|of|among|between|from|are)\b)[^.\n]){0,40}?(?:\bis\b|:))"
)
# Words that settle on a letter only where it ends a clause: "it's B.", "thus B", and a self-correction, "no wait, B"
SETTLED = (
    r"\b(?:(?:it|that|this)(?:['\u2019]s| is| must be| has to be| should be| would be)"
    r"|so(?! is| are)|thus|hence|therefore|i['\u2019]d say|by (?:process of )?elimination|leav(?:es|ing)(?: us with| only)?)\b"
    r"|\b(?:wait|actually|sorry|correction|rather|reflection|second thoughts?|i meant?|scratch that|no|instead)\b"
    r"|\b(?:final|conclusion|verdict|decision|solution|result|response|ans|pick|vote|selection|correct)\b\s?(?=[:=\u2013\u2014-])"
    r"|\bans(?=[.\s])|\bi (?:think|believe|guess)\b"
    r"|(?:^|[.;:!?\n])[\s*]{0,3}(?:(?:(?:must|has to|got to) be|definitely|certainly|clearly|(?:most )?(?:probably|likely))\b"
    r"|[=-]>|[\u2192\u21d2])"
)
# A turn that a sentence takes, with the letter that ends its line: "A is best for pain, but this is diabetes: C."
TURNED = r"\b(?:but|however)\b[^.:;\n]{0,60}:"
# The other side of a comparison, below which an option is no answer
BELOW = (
    r"(?![^.;\n]{0,80}\b(?:but|yet|though|although) (?:(?:it['\u2019]s|it|is|also|still|much|far|slightly|somewhat) ){0,3}"
    rf"(?:(?:less|worse|inferior)(?: (?:so|good|effective|than|{LIKELY}))?\s*(?:[.,;\n]|$|to\b|than\b)|not (?:as|so) good\b))"
)
# Words behind a letter that settle on it: "D it is."
SETTLES = r"(?: it is|,? final answer)(?:,? then)?"
WITHDRAWN = (
    r"(?i:\b(?:that|this|it)(?:['\u2019]s| is| was) (?:wrong|incorrect|not right|not it|a mistake)\b"
    r"|\bwait,? no\W{0,9}$|\bno,? wait\W{0,9}$)"
)
# What others may hold, or what is only supposed, up to the end of its clause
SUPPOSED = (
    r"(?i:\bif\b[^.;\n]{0,80}?\b(?:were|had)\b[^.;\n]{0,120}?\bwould(?: have been| be)\b[^.,;\n]{0,40}|"
    r"(?:\b(?:if|unless|whether|were)\b|\b(?:some|many|most|everyone|others|people|students|one|you|we) "
    r"(?:(?:might|may|could|would|often) )?(?:be tempted to |want to |think|say|argue|believe|claim|guess|choose|pick)s?\b)"
    r"[^.,;\n]{0,80})"
)
REASON = r"(?i:\b(?:because|since|although|though|while|whereas|unlike|than)\b)[^.;\n]{0,300}"
IS = r"(?:is|are|was|would be|can be|must be|should be|has to be|needs to be|seems|looks|sounds)\s"
BEST = r"(?:the |my )?(?:final )?(?:most |\w{1,20}ly )?"
RIGHT_WORDS = ("correct", "right", "true", "yes")
RIGHT_MARKS, WRONG_MARKS = "[\u2713\u2714\u2705]", "[\u2717\u2718\u2716\u274c]"
WRONG_WORDS: tuple[str, ...] = (
    "wrong",
    "incorrect",
    "false",
    "no",
    "not correct",
    "not right",
    "excluded",
    "eliminated",
    "ruled out",
)
WRONG_WORDS += ("weak", "unlikely", "tempting", "doubtful", "impossible", "irrelevant", "contraindicated", "to be avoided")
RIGHT = rf"{IS}{BEST}(?:correct|right|best|better{BELOW}|appropriate|answer)\b"
WRONG = (
    rf"(?:{IS}(?:(?:all|both|also|too|\w{{1,20}}ly) )?(?:not|wrong|incorrect|false|excluded|ruled out|eliminated|out|avoided"
    rf"|unlikely|contraindicated|tempting|weak|le(?:ss|ast) {LIKELY})"
    r"|(?:\w{1,20}n['\u2019]t|cannot|can not|should not|must not)"
    r" (?:be|the|correct|right|it|an?|fit|work|apply|explain))\b"
)
NOT = (
    r"(?:(?:rather|other) than"
    r"|not|\w{1,20}n['\u2019]t|cannot|never|neither|nor|than|instead of|unlikely|hardly|unlike|avoid(?:ing)?|against"
    r"|(?:eliminat|exclud|dismiss|discard|reject)(?:e|es|ed|ing|s)?|rul(?:e|es|ed|ing) out)"
)
DENIED = (
    r"(?i:\b(?:the|is|are|be|was|as|to|that|it|it['\u2019]s|think|believe|say|have|been|an?|correct|right|best|answer|option|choice"
    r"|letter|both|either|\w{1,20}ly)\b|[\s:=*_`'\"$(\[{>-]){0,14}"
)
# What a clause says before "D it is" or "D is correct" that makes it no statement: "not sure that", "I doubt", "maybe"
UNSURE = (
    rf"(?i:\b(?:(?:{NOT}|far from|less)(?: [\w%]{{1,20}}){{0,3}} (?:sure|certain|convinced|confident|clear|true|case)"
    r"|(?:false|wrong|incorrect|untrue) that|unsure|uncertain|unclear|perhaps|maybe|possibly"
    r"|(?<!\bno )(?<!\bout )(?<!\ba )(?<!\bany )(?<!not )(?<!n['\u2019]t )doubt(?:s|ed|ful)?)\b)"
    r"(?:(?!\b(?i:but|so|yet|still)\b)[^.,;:!?\n]){0,60}?"
)
DOUBT = re.compile(
    rf"(?i:\b(?:{NOT}|no|none|wrong|incorrect|false|avoided|weak|tempting|contraindicated|ruled out|excluded|explanation"
    rf"|le(?:ss|ast) {LIKELY}|perhaps|maybe|might|could|everyone|would say|not sure)\b)|\?"
)
BEGIN = (
    rf"(?:^|[.,;:!?\n|-]|{WRONG_MARKS}"
    r"|\b(?i:option|choice|answer|letter|so|thus|hence|therefore|however|that|and|but|here|think|believe|feel|conclude)\b)"
)
APART = r"[\s)*\].:=|(\u2013\u2014-]{1,6}"  # between a letter and a verdict on it
BOTH = r"\W{0,6}(?:\b(?i:and|or|nor)\b|&|/)\W{0,6}$"  # between two letters that share a verdict
ENDS = r"(?=[\s*_)\]}]{0,4}(?:[.,;:!\n]|$|[-(\u2013\u2014] |(?:because|since|as)\b))(?!\W{0,4}\?)"
NAMED = (
    r"(?:^|(?<!\b[Ff]irst)(?<!\b[Nn]ext)(?<!\b[Ff]irstly)[.,;:!\n(*]|\b(?i:so|thus|hence|therefore|is|be|with|choose|pick))"
    r"[\s*]{0,3}\b(?i:option|choice|answer)\b"
)
END = r"(?=[\s*]{0,3}(?:[.,;!)\n|]|:(?!\s?\(?[A-J]\b)|$|(?:because|since|as)\b))"
MARK = re.compile(
    r"(?<![\w'\u2019\\])(?<!\bout )(?<!\bis )(?<!\bbe )(?<!\bnot )(?<!\bso )(?<!\bSo )(?:\(([A-J])\)|([A-J])[.):](?!\w))"
)  # as options are listed
UNSPACED = r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]"  # scripts that write a letter without spaces around it
# What goes through the options one by one: behind it, or as headings of a description, letters in their order are no answer
VERBS = r"(?:analy[sz]e|consider|evaluate|examine|review|assess|discuss|compare|check|go (?:through|over)|look at|break down)"
ANALYSIS = (
    r"(?i:(?:\b(?:let['\u2019]?s|let us|let me|(?:i|we)(?:['\u2019]ll| will))\b[^.:\n]{0,20}?"
    rf"\b{VERBS}\b|(?<!after )(?:analy[sz]|consider|evaluat|examin|review|assess|discuss|compar|check)ing (?:each|every|all)\b)"
    r"[^.:\n]{0,80}[.:]?[\s*]{1,9})"
)
LABEL = r"[ *_(#\u2022-]{0,6}(?:(?i:option|choice) )?([A-J])\)?(?:\*\*)?[.):]"
LABELLED = re.compile(rf"{ANALYSIS}[(]?A\)?(?:\*\*)?[.):] ?\w?$")
FIRST = LABEL.replace("([A-J])", "A")
PRAISE = r"\b(?:best|correct|right|answer|choice|first-line|most)\b"  # what no heading of a description is followed by
HEADING = (
    r"(?:^|(?<=\n))[ *_#\u2022-]{0,6}(?i:option|choice) (A)\)?(?:\*\*)?[:)]\*{0,2} ?"
    rf"(?![^\n]{{0,200}}{PRAISE})"
)
SIGNS = r"\^/<>=+#\u00b1\u00d7\u00f7\u221a\u2264\u2265"  # that make another expression of what they stand by
MOST_APART = 300  # characters between two options of a list


class Exam:
    """The patterns for the letters and texts of a question's options."""

    def __init__(self, choices: list[str]):
        self.letters = ascii_uppercase[: len(choices) or 10]
        counts = Counter(map(words_of, choices))  # of options that read alike none is known by its text
        self.texts = {
            words_of(each): name for name, each in zip(self.letters, choices, strict=False) if counts[words_of(each)] == 1
        }
        self.both = self.letters + self.letters.lower()
        self.one = (
            rf"(?:(?![AI]\s{{1,3}}(?!{GOES_ON})[a-z])[{self.letters}](?![\w#+-]|['\u2019]\w)"
            rf"|[{self.letters.lower()}](?=\s{{0,2}}(?:[.)\]}},:;*_`\"$<]|$)))"
        )
        words = (_pattern(words) for words in self.texts if words)
        self.text = rf"(?i:(?:{'|'.join(sorted(words, key=len, reverse=True)) or '(?!)'})(?!\w))"
        items = "|".join(rf"{name}\W{{1,6}}{_pattern(words)}" for words, name in self.texts.items() if words)
        self.item = rf"(?i:(?:\b(?:option|choice)\s)?(?<!\w)(?:{items or '(?!)'})(?!\w))"
        self.list = rf"{self.item}(?:\W{{0,6}}(?:\b(?i:and|or)\W{{1,3}})?{self.item}){{1,9}}"
        self.second = rf"\W{{0,6}}(?:\b(?:or|and)\b|/|&)\W{{0,6}}{self.one}|,\s?{self.one}(?!\s[a-z])"  # but "A, I think"
        self.right = rf"[\s)*]{{0,4}}(?i:{RIGHT})|{self._verdict(RIGHT_WORDS, RIGHT_MARKS)}|[)*]{{0,3}}(?i:{SETTLES}){ENDS}"
        self.wrong = rf"[\s)*]{{0,4}}(?i:{WRONG})|{self._verdict(WRONG_WORDS, WRONG_MARKS)}"

    def _verdict(self, words: tuple[str, ...], marks: str) -> str:
        """Match words and marks that say what an option is worth, unless the words are an option themselves."""
        said = "|".join(word for word in words if word not in self.texts) or "(?!)"
        return rf"{APART}(?:(?i:(?:is |was )?(?:{said})){END}|{marks})"

    def without_texts(self, said: str) -> str:
        """Take the text of an option away between its letter and a verdict on it."""
        verdict = rf"(?:(?:is |was )?(?:{'|'.join((*RIGHT_WORDS, *WRONG_WORDS))})\b|{RIGHT_MARKS}|{WRONG_MARKS})"
        for words, name in self.texts.items():
            said = re.sub(
                rf"\b({name})[).:*]{{1,3}} ?\*{{0,2}}{_pattern(words)}(?={APART}{verdict})", r"\1", said, flags=re.IGNORECASE
            )
        return said

    def without_denied(self, said: str) -> str:
        """Take away the letters that are said to be wrong, or not to be the answer."""
        said = re.sub(SUPPOSED, " ", said)
        either = rf"(?:{self.one}|{self.text})"
        more = rf"(?:(?:, ?{either}){{0,8}},? ?(?i:or|nor|and|&) {either})?"
        which = r"(?i:\b(?:options?|choices?|answers?)\s)?[\s(*]{0,4}"
        said = re.sub(rf"{which}\b{either}{more}(?:{self.wrong})", " ", said)
        said = re.sub(rf"{UNSURE}\b{either}{more}(?:{self.right})", " ", said)
        own = rf"(?: ?\((?i:(?:option|choice) )?{either}\))?"  # the letter behind a text
        return re.sub(rf"(?i:\b{NOT}\b){DENIED}\b{either}{own}{more}", " ", said)

    def without_analysis(self, said: str) -> str:
        """Take away lines that go through the options in their order, as a truncated answer leaves them."""
        begins = re.finditer(rf"{ANALYSIS}(?={FIRST})|{HEADING}(?!{self.text}?[\s*.]{{0,4}}(?:\n|$))", said)
        begin = next((found.start() if found[1] else found.end() for found in begins), None)
        if begin is None:
            return said
        lines, left = said[begin:].split("\n"), []
        expected = iter(self.letters)
        name = next(expected)
        for line in lines:
            label = re.match(LABEL, line)
            if label and label[1] == name:
                name = next(expected, "")
            else:
                left.append(line)
        return "\n".join([said[:begin], *left])

    def without_list(self, said: str) -> str:
        """Blank options that are listed: letters and texts next to each other, or marks of letters in their order."""
        text = re.compile(rf" ?\*{{0,2}} ?{self.text}")
        run: list[re.Match[str]] = []
        said = re.sub(self.list, self._without_items, said)
        blank = list(said)
        for mark in (*MARK.finditer(said), None):
            name = mark and (mark[1] or mark[2])
            if mark and run and name == ascii_uppercase[len(run)] and mark.start() - run[-1].end() <= MOST_APART:
                run.append(mark)
                continue
            if len(run) >= min(3, len(self.letters)):
                for each in run[_is_picked(said, run[0].start()) :]:
                    end = (text.match(said, each.end()) or each).end()
                    blank[each.start() : end] = " " * (end - each.start())
            run = [mark] if mark and name == "A" else []
        return "".join(blank)

    def _without_items(self, listed: re.Match[str]) -> str:
        """Blank the options of a list up to one that is there again, which is more than listed."""
        seen: dict[str, int] = {}
        for item in re.finditer(self.item, listed[0]):
            name = self.texts[max((words for words in self.texts if f" {words_of(item[0])}".endswith(f" {words}")), key=len)]
            if name in seen:
                break
            seen[name] = item.end()
        end = max(seen.values()) if len(seen) > 1 else 0
        first = min(seen.values())
        begin = first if re.match(r"\W*[.\n]", listed[0][first:]) and _is_picked(listed.string, listed.start()) else 0
        return listed[0][:begin] + " " * (end - begin) + listed[0][end:]

    def stated(self, said: str) -> str | None:
        """Return the letter of the last statement, "" if it names two, None if there is none.

        Where nothing announces an answer, what is singled out as the most likely option counts.
        """
        listless = self.without_list(said)
        name = rf"(?P<name>{self.one})(?P<second>{self.second})?"
        words = rf"{LEAD}(?:\ban? )?(?P<name>{self.text})(?P<second>\W{{0,6}}(?:or|and|/|&)\W{{0,6}}{self.text})?{ENDS}"
        begun = rf"{BEGIN}[\s(*]{{0,4}}(?P<name>{self.one})(?P<second>(?!))?"
        announced = [
            *re.finditer(rf"(?i:{ANNOUNCED}){LEAD}{name}(?!\W{{0,4}}\?)", listless),
            *re.finditer(rf"(?i:{SETTLED})[\s,:;.\u2014-]{{0,4}}(?i:no[\s,]{{1,2}})?{LEAD}\b{name}{ENDS}", listless),
            *re.finditer(rf"(?i:{TURNED}) {LEAD}\b{name}[\s*_)]{{0,4}}[.!]?(?=\n|$)", listless),
            *re.finditer(rf"{begun}(?:{self.right})", said),
            *re.finditer(rf"(?i:{ANNOUNCED}|{SETTLED}){words}", listless),
        ]
        singled = [
            *re.finditer(rf"(?i:{SINGLED}){LEAD}{name}(?!\W{{0,4}}\?)", listless),
            *re.finditer(
                rf"{begun}[\s)*]{{0,4}}(?i:{IS}(?:the |an? |far |much )?(?:more {LIKELY}{BELOW}|most {LIKELY}))", said
            ),
            *re.finditer(rf"(?i:{SINGLED}){words}", listless),
            *re.finditer(rf"(?P<name>{self.text})(?P<second>(?!))?[\s)*]{{0,4}}(?i:{IS}(?:the |an? )?most {LIKELY})", said),
        ]
        last = max(announced or singled, key=lambda match: match.start("name"), default=None)
        if last is None or LABELLED.search(last.string[: last.end("name") + 3][-MOST_APART:]):
            return None
        pair = re.search(rf"(?P<other>{self.one}){BOTH}", last.string[: last.start("name")][-20:])
        is_open = last["second"] or re.search(WITHDRAWN, said[last.end() :]) or pair
        return "" if is_open else self.texts.get(words_of(last["name"])) or last["name"].upper()

    def named(self, said: str) -> set[str]:
        """Return the letters of the options whose words are in a text, and not part of a larger expression."""
        words = words_of(said)
        found = {
            text: re.search(rf"(?<![{SIGNS.replace('=', '')}] )(?<!\S){re.escape(text)}(?!\S)(?! [{SIGNS}])", words)
            for text in self.texts
        }
        return {self.texts[text] for text, match in found.items() if text and match}

    def meant(self, said: str) -> str | None:
        """Return the letter of the only option whose words are in a text, unless that denies, doubts or names another one."""
        begun = rf"(?:^|[.;\n]|\b(?i:so|thus|hence|therefore|option|choice)\b)[\s*(]{{0,3}}{self.one}\s?[,\u2013\u2014-]"
        named = self.named(re.sub(REASON, " ", said))
        words = {word for words in self.texts for word in words.split()}
        is_doubtful = any(found[0].lower() not in words for found in DOUBT.finditer(said))
        return named.pop() if len(named) == 1 and not is_doubtful and not re.search(begun, said) else None

    def boxed(self, content: str) -> str | None:
        """Return the letter of a box's option, "" if it denies options or names several, None if it is about other things."""
        found = re.fullmatch(rf"{LEAD}([{self.both}])\b(\W{{0,8}})(.*)", content, re.DOTALL)
        rest = found and words_of(found[3])
        if found and (not rest or re.match(r"\W*[.):-]\s", found[2]) or self.texts.get(rest) == found[1].upper()):
            return found[1].upper()
        if words_of(content) in self.texts:
            return self.texts[words_of(content)]
        ended = re.fullmatch(rf"(.*?)\W*\((?:option )?([{self.both}])\)\W*", content, re.DOTALL)
        if ended and self.texts.get(words_of(ended[1])) == ended[2].upper():
            return ended[2].upper()
        denies = rf"(?i:\b(?:{NOT}|none|no)\b)|(?<![\w'])[{self.letters}](?![\w'])|^\W*[A-Za-z]\W*$"
        names = self.named(content)
        if re.search(denies, content) or len(names) > 1:
            return ""
        return names.pop() if names else None

    def left_over(self, said: str) -> str | None:
        """Return the letter that ends a text as a sentence of its own, if it is the only one in it."""
        letters = re.findall(rf"(?<![\w'\u2019])[{self.letters}](?![\w'\u2019])", said)
        last = re.search(rf"[.:;!?\n]\s?\(?([{self.letters}])\)?[.!]?$", said[-MOST_APART:].rstrip())
        return last[1] if last and len(letters) == 1 else None

    def alone(self, said: str) -> str | None:
        """Return the letter that is the whole last line, or the only one that stands out."""
        lines = said.strip().split("\n")[-2:]
        alone = [re.fullmatch(rf"[\s*_`(\[$\u2022-]{{0,8}}([{self.both}])[\s*_`)\].:$]{{0,8}}", line) for line in lines]
        found = [each and each[1].upper() for each in alone]
        if found[-1]:
            return found[-1] if found[0] in (None, found[-1]) else None
        said = self.without_list(said)
        goes_on = r" (?:because|since)\b|,\W{0,4}(?:because|since|as|due|given|the|for|I|$)(?!\w)| [-\u2013\u2014] "
        for names in (
            re.findall(
                rf"^[\s*_`(\[\u2022-]{{0,8}}({self.one})(?=\s?(?:[.):\]*_`!]|$)|{goes_on})(?!{self.second})"
                r"(?![^\n]*(?:[\s(][A-J][.):]\s|; ?[A-J] [-\u2013\u2014]))",
                said,
                re.MULTILINE,
            ),
            re.findall(rf"(?:\*\*|\()([{self.letters}])(?:\*\*|\))", said),
            re.findall(rf"{NAMED}{LEAD}({self.one})(?!{self.second}){ENDS}", said),
        ):
            if len({name.upper() for name in names}) == 1:
                return names[0].upper()
        return None


def _is_picked(said: str, begin: int) -> bool:
    """Whether what begins there is announced on its line as the one answer, not as the first of the options."""
    line = said[max(0, begin - MOST_APART) : begin].rpartition("\n")[2]
    return re.search(rf"{ONE}{LEAD}$", line) is not None


def _pattern(words: str) -> str:
    """Match a text whose words are `words`; a number only as a whole."""
    said = re.escape(words.replace(" ", "\0")).replace("%", r"\s?\\?%")
    said = re.sub(rf"\0(?=\\?[{SIGNS}])|(?<=[{SIGNS}])\0", r"\\W{0,3}", said).replace("\0", r"\W{1,3}")
    before = r"(?<![\w^-])(?<!\d[.,/:])" if words[:1].isdigit() or words[:1] == "-" else ""
    after = r"(?![\^]|[.,/:]\d|\s?\\?%)" if words[-1:].isdigit() else ""
    return f"{before}{said}{after}"


def spaced(text: str) -> str:
    """Set Latin letters apart from scripts that have no spaces between words."""
    return text if text.isascii() else re.sub(rf"(?<=[A-Za-z])(?={UNSPACED})|(?<={UNSPACED})(?=[A-Za-z])", " ", text)


def words_of(text: str) -> str:
    """Return the words, numbers and signs of mathematics in a text, in lower case."""
    text = re.sub(r"(?<![\w)\]])\+(?=\d)", "", spaced(text).casefold().replace("\u2212", "-").replace("\\%", "%"))
    found = re.findall(rf"(?<![\w)\]])-?\d{{1,40}}(?:[.,/:]\d{{1,40}}){{0,9}}(?:\s?%|(?!\w))|\w{{1,200}}|[{SIGNS}]", text)
    return " ".join(re.sub(r"\s", "", word) for word in found)
