"""Messages with marks, which show in a rendered text what a chat template made of each."""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

MARK = re.compile(r"~#~(\d+)~#~")  # without letters, which a template may put in upper case
WRITTEN_AS_JSON = ("tool", "ipython")  # roles whose lists are what a tool gave
NOBODY = "~##~"  # a role, and a key of a part of content, that no template knows


def marked_messages(messages: list[Any]) -> tuple[list[Any], dict[str, tuple[int, str]]]:
    """Return messages with a mark behind each text, and for each mark the number of the message and the text.

    A part of content gets a key `NOBODY` as well, except in `WRITTEN_AS_JSON`. It shows where a template writes parts as they
    are.
    """
    contents: dict[str, tuple[int, str]] = {}

    def marked(index: int, text: str) -> str:
        number = str(len(contents))
        contents[number] = index, text
        return f"{text}~#~{number}~#~"

    made = [{**message} for message in messages]
    for index, message in enumerate(made):
        if "content" in message:
            content = with_texts(message["content"], partial(marked, index))
            message["content"] = content if message["role"] in WRITTEN_AS_JSON else _with_key(content)
    return made, contents


def _with_key(content: Any) -> Any:
    return [{**part, NOBODY: NOBODY} for part in content] if isinstance(content, list) else content


def with_texts(content: Any, change: Callable[[str], str]) -> Any:
    """Return a message's content with its texts changed, except blank ones."""
    if isinstance(content, list):
        return [{**part, "text": with_texts(part["text"], change)} if "text" in part else part for part in content]
    return change(content) if isinstance(content, str) and content.strip() else content


def with_names(calls: Any) -> Any:
    """Return the calls of a message with other names of the functions."""
    if isinstance(calls, list):
        return [with_names(call) for call in calls]
    if not isinstance(calls, dict):
        return calls
    return {key: f"~{value}~" if key == "name" else with_names(value) for key, value in calls.items()}


def ends_with(rendered: str, content: str) -> bool:
    """Whether `content` ends a text, also escaped as JSON. White space, and reasoning before the answer, may be left out."""
    answer, text = content.rpartition("</think>")[2], "".join(rendered.split())
    forms = (answer, json.dumps(answer, ensure_ascii=False)[1:-1], json.dumps(answer)[1:-1])
    return any(text.endswith("".join(form.split())) for form in forms)
