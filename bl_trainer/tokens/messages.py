"""Messages in the layouts of OpenAI and ShareGPT: their keys and roles, their faults, and how TRL writes them."""

import functools
import json
import math
import re
from typing import Any

from ..errors import RecipeError
from .names import MESSAGE_WEIGHT

Keys = tuple[tuple[str, ...], tuple[str, ...]]
SPEAKERS, CONTENTS = ("role", "from"), ("content", "value")  # keys of a message in the layouts of OpenAI and ShareGPT
PLAIN_KEYS = ("role", "content")  # TRL's own
PLAIN: Keys = (("role",), ("content",))
SHAREGPT = ("from", "value")  # what only ShareGPT's layout has
CALLS = ("tool_calls", "function_call")  # keys of a message that calls functions, and may have no content
INSTEAD = (*CALLS, "thinking", "reasoning_content")  # what may stand in place of content
# What the speakers of ShareGPT's layout are called in chat templates
ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "ai", "model", "assistant", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
# Words in the names by which other trainers leave out or weight messages and rows, and the values that train in full
TRAINS = dict.fromkeys("weight weights loss train trainable trained training learn".split(), True)
TRAINS |= dict.fromkeys("supervise supervised include included".split(), True)
TRAINS |= dict.fromkeys("mask masks masked drop dropped ignore ignored skip skipped exclude excluded".split(), False)
BESIDE = "is do on use calculate compute scale message turn token sample example instance row".split()
GREATEST = (2 - 2**-23) * 2.0**127  # of float32
NEGATIONS = ("no", "not", "dont")
SPELLED = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@functools.cache
def trains_in_full(name: str) -> bool | None:
    """Return the value at which a key or column of this name trains in full; None if the name says nothing of training."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", name)]
    chosen = [TRAINS[word] for word in words if word in TRAINS]
    if not chosen or not {*words} <= {*TRAINS, *BESIDE, *NEGATIONS}:
        return None
    return chosen[0] is not any(word in NEGATIONS for word in words)


def has_no_say(name: str, value: Any) -> bool:
    """Whether a key or column would leave something out or weight it, by name and value, if it were read."""
    full = trains_in_full(name)
    value = SPELLED.get(value.lower(), full) if isinstance(value, str) else value
    return full is not None and value is not None and value != full


def read(column: str, value: Any) -> Any:
    """Return the value of a column, parsed if its name says that it holds messages."""
    return parsed(value) if column.lower().removesuffix("s") in ("message", "conversation") else value


def parsed(value: Any) -> Any:
    """Return the messages that a text holds as JSON; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except json.JSONDecodeError:  # a text that begins with a bracket
        return value
    return found if keys_of(found) is not None else value


def fault_of(value: Any, is_chat: bool, keys: Keys) -> str | None:
    """Return why a value is no training text, or no messages if `is_chat`; None if it is.

    `keys`: what speaker and content may be called, `PLAIN` where nothing converts the messages.
    """
    if not is_chat:
        return None if isinstance(value, str) else f"is {short(value)}, not a text"
    messages = value if keys == PLAIN else parsed(value)
    if not are_mappings(messages):
        return f"is {short(value)}, not messages with role and content"
    return next((fault for message in messages if (fault := _fault_of_message(message, keys))), None)


def _fault_of_message(message: dict[str, Any], keys: Keys) -> str | None:
    if not _is_message(message, keys):
        own = {key: value for key, value in message.items() if value is not None}  # Arrow fills the keys of other messages
        return f"has {short(own)}, not messages with role and content"
    if _role(message) is None:
        return f"has a message from {short(_first_of(message, SPEAKERS))}, which is none of {', '.join(ROLES)}"
    weight = weight_of(message)
    if wrong := fault_of_weight(weight):
        return f"has a message with `{MESSAGE_WEIGHT}: {short(weight)}`, which {wrong}"
    key = next((key for key in message if key != MESSAGE_WEIGHT and has_no_say(key, message[key])), None)
    if key is None:
        return None
    return (
        f"has a message with `{key}: {short(message[key])}`, which has no effect. Write `{MESSAGE_WEIGHT}: 0` for a "
        "message that does not train, another number to weight it, or `assistant_only_loss: true` to train answers alone"
    )


def fault_of_weight(value: Any) -> str | None:
    """Return what a weight must be, None if it is; costs are multiplied in float32, which has no greater number."""
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        return "must be a number, 0 or above"
    return None if value <= GREATEST else f"must be at most {GREATEST:.2g}"


def weight_of(message: dict[str, Any]) -> Any:
    """Return the weight of a message, 1 if it has none."""
    weight = message.get(MESSAGE_WEIGHT)
    return 1 if weight is None else weight


def as_messages(value: Any) -> list[dict[str, Any]]:
    """Return messages of any layout that `fault_of` passes with role and content."""
    made = []
    for message in parsed(value):
        rest = {key: each for key, each in message.items() if key not in (*SPEAKERS, *CONTENTS) and each is not None}
        content = _first_of(message, CONTENTS)
        calls = _calls(content) if message.get("from") == "function_call" else None
        said = {"content": None, "tool_calls": calls} if calls else {"content": content}
        made.append({"role": _role(message), **said, **rest})
    return made


def _calls(content: Any) -> list[dict[str, Any]] | None:
    """Return the calls that a `function_call` of ShareGPT's layout holds as JSON; None if it is another text."""
    try:
        found = json.loads(content)
    except (TypeError, json.JSONDecodeError):
        return None
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and "name" in call for call in found):
        return None
    return [{"type": "function", "function": call} for call in found]


def short(value: Any) -> str:
    """Return the beginning of a value as JSON."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."


def are_mappings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _first_of(message: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _role(message: dict[str, Any]) -> str | None:
    """Return the role of a message, None if its speaker is unknown; roles by that name go as they are."""
    return message.get("role") or ROLES.get(str(message.get("from")).lower())


def keys_of(value: Any) -> tuple[str, str] | None:
    """Return the keys for speaker and content of messages; None if they lack them."""
    if not are_mappings(value):
        return None
    speaker, content = (next((key for key in keys if key in value[0]), None) for keys in (SPEAKERS, CONTENTS))
    return (speaker, content) if speaker and content else None


def is_plain(value: Any) -> bool:
    """Whether messages are in TRL's own keys."""
    return are_mappings(value) and not any(key in message for message in value for key in SHAREGPT)


def _is_message(message: dict[str, Any], keys: Keys) -> bool:
    speakers, contents = keys
    has_content = isinstance(_first_of(message, contents), (str, list)) or any(map(message.get, INSTEAD))
    return has_content and isinstance(_first_of(message, speakers), str)


def refuse_keys(value: Any, column: str, where: str) -> None:
    """Raise RecipeError on messages in keys of no known layout."""
    if are_mappings(value) and keys_of(value) is None and not any(map(value[0].get, INSTEAD)):
        raise RecipeError(
            f"Cannot read the messages in `{column}` of {where}: their keys are {', '.join(value[0])}. Rename these to role "
            "and content."
        )
