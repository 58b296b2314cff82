"""Which tokens of a row its chat template made, and which example each token of a packed row belongs to."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from trl.data_utils import is_conversational

from ..errors import RecipeError
from .names import MESSAGE_WEIGHT, ROW, TEMPLATE


class TemplateMark:
    """Adds `TEMPLATE` to a tokenised example. Raises RecipeError where the template's tokens can't be told from content."""

    def __init__(self, tokenizer: Any, chat_template: str | None, name: str):
        self.tokenizer, self.chat_template, self.name = tokenizer, chat_template, name

    def __call__(self, example: Any) -> dict[str, Any]:
        ids = example["input_ids"]
        if not is_conversational(example):
            return {TEMPLATE: [0] * len(ids)}
        mask = template_mask(self.tokenizer, self.chat_template, example, ids)
        if -1 in mask:
            raise RecipeError(
                f"`special_tokens` can't tell the chat template's tokens from content in row {example[ROW]} of the {self.name} "
                "set, counted from 0: its messages hold more than text (tool calls, reasoning), the template changes them, or "
                "the tokenizer is a slow one. Give messages of plain text, or remove `special_tokens`."
            )
        return {TEMPLATE: mask}


def segments(feature: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each example in a row, which packing makes of several."""
    rows, size = feature[ROW], len(feature["input_ids"])
    if feature.get("seq_lengths") is not None:
        starts = [0]
        for length in feature["seq_lengths"][:-1]:
            starts.append(starts[-1] + length)
    elif isinstance(rows, list):  # wrapped: an example goes on until the next one
        starts = [i for i in range(size) if i == 0 or rows[i] != rows[i - 1]]
    else:
        starts = [0]
    yield from zip(starts, [*starts[1:], size], strict=True)


def _content_spans(text: str, pieces: list[str], contents: list[str]) -> list[tuple[int, int]] | None:
    """Return where each of `contents` stands in `text`, between `pieces`; None if the template changes or lacks one."""
    spans, at = [], len(pieces[0])
    if not text.startswith(pieces[0]):
        return None
    for content, after in zip(contents, pieces[1:], strict=True):
        forms = [form for form in (content, content.strip()) if text.startswith(form + after, at)]
        if not forms:
            return None
        spans.append((at, at + len(forms[0])))
        at += len(forms[0]) + len(after)
    return spans if at == len(text) else None


def messages_of(example: Any) -> list[dict[str, Any]]:
    """Return the messages of a conversation: `messages`, or `prompt` and `completion`."""
    return example["prompt"] + example["completion"] if "prompt" in example else example["messages"]


def renderer(tokenizer: Any, chat_template: str | None, example: Any) -> Callable[[list[dict[str, Any]]], str]:
    """Return what renders messages as TRL renders those of `example`."""
    tools = example.get("tools")
    options = {
        "chat_template": chat_template,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        "tokenize": False,
        **(example.get("chat_template_kwargs") or {}),
    }
    return lambda messages: tokenizer.apply_chat_template(messages, **options)


def of_tokens(tokenizer: Any, text: str, ids: list[int], value: Callable[[int, int], Any]) -> list[Any] | None:
    """Return `value(start, stop)` of each of `ids`, by its place in `text`; None if they are not its first or last tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    whole, values = encoded["input_ids"], [value(start, stop) for start, stop in encoded["offset_mapping"]]
    if ids == whole[: len(ids)]:
        return values[: len(ids)]
    return values[-len(ids) :] if ids == whole[-len(ids) :] else None


def template_mask(tokenizer: Any, chat_template: str | None, example: Any, ids: list[int]) -> list[int]:
    """Return for each of `ids` 1 if the chat template made it, 0 if it holds some of a message's content; all -1 if unknown.

    `example` has `messages`, or `prompt` and `completion`. The contents are found in the rendered text by rendering it again
    with marks in their place; tokens belong to them by their offsets in the text.
    """
    messages = messages_of(example)
    contents: list[Any] = [message.get("content") for message in messages]
    unknown = [-1] * len(ids)
    known = ("role", "content", "name", MESSAGE_WEIGHT)
    has_more = any(value for message in messages for key, value in message.items() if key not in known)
    if not getattr(tokenizer, "is_fast", False) or has_more or not all(isinstance(content, str) for content in contents):
        return unknown
    render = renderer(tokenizer, chat_template, example)
    marks = [f"content{i}tnetnoc" for i in range(len(contents))]
    text = render(messages)
    marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    pieces, rest = [], render(marked)
    for mark in marks:
        before, _, rest = rest.partition(mark)
        pieces.append(before)
    pieces.append(rest)
    spans = _content_spans(text, pieces, contents)
    if spans is None:
        return unknown

    def is_template(start: int, stop: int) -> int:
        return int(not any(start < end and stop > begin for begin, end in spans))

    return of_tokens(tokenizer, text, ids, is_template) or unknown
