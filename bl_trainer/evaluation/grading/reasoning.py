"""Reasoning blocks: the one place that takes them off an answer before any task grades it."""

import re

# Opening and closing tags of reasoning, as the chat templates of reasoning models write them
NAMES = ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think")
PAIRS = {f"<{name}>": f"</{name}>" for name in NAMES} | {
    "[THINK]": "[/THINK]",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
}
CLOSING = {closing: opening for opening, closing in PAIRS.items()}
TAG = re.compile("|".join(map(re.escape, (*PAIRS, *CLOSING))))


def split_reasoning(answer: str, prompt: str = "") -> tuple[str, bool]:
    """Return what an answer says outside its reasoning, and whether its reasoning is finished.

    An opening tag may end `prompt`, or be missing: then the text before the first closing tag is reasoning. A block that
    nothing closes is unfinished and lasts to the end.
    """
    said: list[str] = []
    start, is_open = 0, prompt.rstrip().endswith(tuple(PAIRS))
    tags = list(TAG.finditer(answer))
    for tag in tags:
        if tag[0] in CLOSING:
            said = said if is_open else []
            start, is_open = tag.end(), False
        elif not is_open:
            said.append(answer[start : tag.start()])
            is_open = True
    said += [] if is_open else [answer[start:]]
    text = "".join(said)
    return text.strip() if tags else text, not is_open


def without_reasoning(answer: str) -> str:
    """Return what an answer says outside its reasoning."""
    return split_reasoning(answer)[0]
