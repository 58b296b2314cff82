"""Reasoning blocks: the one place that takes them off an answer before any task grades it."""

import re

# What the templates of reasoning models call a block, with a prefix such as "seed:" or "longcat_"
NAME = r"(?!no_)(?:[a-z][a-z0-9]{0,20}[:_-])?(?:think|thinking|thoughts?|reasoning|analysis|scratchpad) {0,3}\|?>"
# gpt-oss names channels; where special tokens are dropped, their names stand glued to the text
OPENING = (
    rf"<\|?(?:(?:begin|start)_(?:of_)?)?{NAME}|\[think\]|\u25c1think\u25b7"
    r"|<\|channel\|> ?(?:analysis|commentary)[^\n]{0,80}?<\|message\|>|\Aanalysis(?-i:(?=[A-Z]))"
)
CLOSING = (
    rf"<(?: {{0,3}}/|\|/|/\||\|end_(?:of_)?) {{0,3}}{NAME}|\[/think\]|\u25c1/think\u25b7"
    r"|<\|channel\|> ?final[^\n]{0,80}?<\|message\|>|(?-i:(?<!\s)assistantfinal)"
)
TAG = re.compile(rf"(?P<closing>{CLOSING})|{OPENING}", re.IGNORECASE)
OPENED = re.compile(rf"(?:{OPENING})\s*\Z", re.IGNORECASE)
LONGEST = 200  # characters of a tag, with the white space behind it
KIND = re.compile(r"channel|assistant|think|thought|reasoning|scratchpad", re.IGNORECASE)
KINDS = {"thought": "think", "assistant": "channel"}
END = re.compile(r"<\|(?:return|end|call)\|>")
# What templates write behind a turn, or before the user's; a model that runs on writes it as text
ENDED = re.compile(
    r"</s>|<\|(?:im_end|endoftext|eot_id|end_of_text|end|eom_id)\|>|<end_of_turn>"
    r"|<\|im_start\|>user|<\|start_header_id\|>user|<start_of_turn>user"
)
STATED = re.compile(
    r"(?:\b(?:final_)?answers?\b[^.\n]{0,60}?(?:\b(?:is|are|be)\b|[:=\uff1a])"
    r"|\b(?:respuesta|resposta|risposta|r[e\u00e9]ponse|antwort)\b[^.\n]{0,60}?(?:\b(?:es|est|\u00e9|\u00e8|ist|lautet)\b|[:=])"
    r"|\b\u043e\u0442\u0432\u0435\u0442\b\s?[:=\u2013\u2014]"
    r"|(?:\u7b54\u6848|\u7b54\u3048|\u6b63\u89e3)\s?(?:\u662f|\u4e3a|\u70ba|\u306f|[:=\uff1a])"
    r"|(?:\uc815\ub2f5|\ub2f5)(?:\uc740|\s?[:=]))[\s:*_\uff1a]{0,8}",
    re.IGNORECASE,
)
# "Question" begins a paragraph there, behind a number or letter, since an answer may restate the question before it says one.
# Behind a final answer, any next problem ends it
TURN = re.compile(
    r"\n[ \t]{0,9}(?:#{1,6} ?|\*\*)?(?:User|USER|Human|HUMAN|Instruction|INSTRUCTION) ?:"
    r"|\n[ \t]{0,9}\n[ \t]{0,9}(?:#{1,6} ?)?(?P<asks>Question|QUESTION) ?:"
    r"|(?P<next>\n[ \t]{0,9}(?:"
    r"(?:#{1,6} ?|\*\*)?(?:Q|(?:Question|Problem|Exercise)(?: \d{1,4})?)(?:\*\*)? ?:"
    r"|(?:#{1,6} ?|\*\*)(?:Question|Problem|Exercise) \d{1,4}\b"
    r"|(?:user|assistant)[ \t]{0,9}(?=\n)))"
)
FINAL = re.compile(
    rf"\\(?:boxed|fbox)\s{{0,8}}\{{|####[ \t]{{0,9}}\S{{0,9}}\d|{STATED.pattern}[^\n]{{0,40}}?(?:\d|\\[a-z]|\b(?-i:[A-HJ])\b)",
    re.IGNORECASE,
)
SAYS = re.compile(r"\d|\b[A-HJ]\b(?! [a-z])")


def split_reasoning(answer: str, prompt: str = "") -> tuple[str, bool]:
    """Return what an answer says outside its reasoning, and whether its reasoning is finished.

    An opening tag may end `prompt`, or be missing: then the text before the first closing tag is reasoning. A tag of another
    kind closes no block. A block that nothing closes is unfinished and lasts to the end.
    """
    said: list[str] = []
    opened = OPENED.search(prompt[-LONGEST:])
    start, kind = 0, _kind(opened[0]) if opened else None
    tags = list(TAG.finditer(answer))
    for tag in tags:
        of = _kind(tag[0])
        if tag["closing"] and kind in (None, of):
            said = said if kind else []
            start, kind = tag.end(), None
        elif not tag["closing"] and kind is None:
            said.append(answer[start : tag.start()])
            kind = of
    said += [] if kind else [answer[start:]]
    text = "".join(said)
    if any(_kind(tag[0]) == "channel" for tag in tags):
        text = END.split(text)[0]
    return text.strip() if tags else text, kind is None


def _kind(tag: str) -> str:
    """Return what a tag is of: tags of thinking and of thoughts are one kind, and so are gpt-oss' channels."""
    found = KIND.search(tag)
    name = found[0].lower() if found else "channel" if tag.lower() == "analysis" else "analysis"
    return KINDS.get(name, name)


def without_reasoning(answer: str) -> str:
    """Return what an answer says outside its reasoning, up to a special token that ends it."""
    return ENDED.split(split_reasoning(answer)[0], maxsplit=1)[0]


def own_turn(said: str) -> str:
    """Return what an answer says before a next turn of its own making, which begins with who speaks, as in `User:`."""
    begun, says, final = re.search(r"\S", said), SAYS.search(said), FINAL.search(said)
    for turn in TURN.finditer(said):
        before = final if turn["next"] else says if turn["asks"] else begun
        if before and before.start() < turn.start():
            return said[: turn.start()]
    return said
