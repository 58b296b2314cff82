"""Rendered rows: whether the chat template puts every message's content into the training text."""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate.logging import get_logger
from datasets import IterableDataset
from transformers import ProcessorMixin
from trl.data_utils import is_conversational, prepare_multimodal_messages

from .._util.text import sentence
from .layouts import RowError, arrange, check_stream, first_row, short
from .names import ROW

logger = get_logger(__name__)

RENDERED = ("messages", "prompt", "completion", "tools", "chat_template_kwargs", ROW)  # columns that rendering reads
MARK = re.compile(r"~#~(\d+)~#~")  # without letters, which a template may put in upper case


def check_rendering(dataset: Any, processing_class: Any, chat_template: str | None, where: str, args: Any) -> Any:
    """Return a data set arranged, each row checked and rendered once to see that it holds all messages.

    Rows of a stream are checked as they are read. Raises RowError on the first row that lacks a message.
    """
    dataset = arrange(dataset, where, args.dataset_text_field)
    first = first_row(dataset)
    if first is None or "input_ids" in first:
        return dataset
    check = RenderedRow(processing_class, chat_template, where)
    if isinstance(dataset, IterableDataset):
        return check_rendered(check_stream(dataset, where, args.dataset_text_field), check)
    if is_conversational(first):
        rendered = dataset.with_format(None).select_columns([key for key in RENDERED if key in dataset.column_names])
        rendered.map(check, with_indices=True, num_proc=args.dataset_num_proc, desc="Checking rendered messages")
    return dataset


def check_rendered(dataset: IterableDataset, check: "RenderedRow") -> IterableDataset:
    """Return a stream that raises RowError when it comes to a row that lacks a message."""

    def checked(example: dict[str, Any], row: int) -> dict[str, Any]:
        check(example, row)
        return {}

    return dataset.map(checked, with_indices=True, features=dataset.features)


class RenderedRow:
    """Check that the chat template renders all contents of an example; called with it and its number.

    Each content is rendered with a mark behind it. Where the mark is missing and the rendered text is the same whatever the
    content, the message is left out, which raises RowError. A warning tells of a content that doesn't precede its mark; white
    space at the ends and reasoning may be left out.
    """

    def __init__(self, processing_class: Any, chat_template: str | None, where: str):
        self.processing_class, self.chat_template, self.where = processing_class, chat_template, where

    def __call__(self, example: Any, row: int) -> None:
        if not is_conversational(example):
            return
        columns = ("prompt", "completion") if "prompt" in example else ("messages",)
        messages = [message for key in columns for message in example[key]]
        at = f"row {example.get(ROW, row)} of {self.where}, counted from 0"
        try:
            self._check(messages, example, at)
        except RowError:
            raise
        except Exception as error:  # a template raises what it likes
            raise RowError(
                f"Cannot render {at}, by the chat template: {sentence(error)}. Correct the row, or set another "
                "`chat_template_path`.",
                columns,
            ) from error

    def _check(self, messages: list[Any], example: Any, at: str) -> None:
        marked, contents = marked_messages(messages)
        rendered = self._render(marked, example)
        before = dict(zip(MARK.findall(rendered), MARK.split(rendered)[::2], strict=False))
        for mark, (index, content) in contents.items():
            role = messages[index]["role"]
            if mark not in before and self._is_left_out(messages, index, example):
                raise RowError(
                    f"Cannot train on {at}: the chat template leaves out {short(content)}, a message with the role {role!r}. "
                    "Rename the role to one that the template renders, or set another `chat_template_path`."
                )
            if not ends_with(before.get(mark, ""), content):
                logger.warning_once(
                    f"The chat template leaves out or changes content with the role {role!r} in {self.where}. Compare the "
                    f"rendered text of {at}."
                )

    def _is_left_out(self, messages: list[Any], index: int, example: Any) -> bool:
        """Whether another content of a message leaves the rendered text as it is."""
        message = messages[index]
        if message.get("tool_calls"):  # beside which templates take content for reasoning
            return False
        other = {**message, "content": with_texts(message["content"], lambda text: f"~{text[::-1]}~")}
        return self._render(messages, example) == self._render([*messages[:index], other, *messages[index + 1 :]], example)

    def _render(self, messages: list[Any], example: Any) -> str:
        tools = example.get("tools")
        options = {
            "chat_template": self.chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(example.get("chat_template_kwargs") or {}),
        }
        if isinstance(self.processing_class, ProcessorMixin):
            messages = prepare_multimodal_messages(messages)
        return self.processing_class.apply_chat_template(messages, tokenize=False, **options)


def marked_messages(messages: list[Any]) -> tuple[list[Any], dict[str, tuple[int, str]]]:
    """Return messages with a mark behind each text, and for each mark the number of the message and the text."""
    contents: dict[str, tuple[int, str]] = {}

    def marked(index: int, text: str) -> str:
        number = str(len(contents))
        contents[number] = index, text
        return f"{text}~#~{number}~#~"

    made = [
        {**message, "content": with_texts(message["content"], partial(marked, index))} if "content" in message else message
        for index, message in enumerate(messages)
    ]
    return made, contents


def with_texts(content: Any, change: Callable[[str], str]) -> Any:
    """Return a message's content with its texts changed, except blank ones."""
    if isinstance(content, list):
        return [{**part, "text": with_texts(part["text"], change)} if "text" in part else part for part in content]
    return change(content) if isinstance(content, str) and content.strip() else content


def ends_with(rendered: str, content: str) -> bool:
    """Whether `content` ends a text, also escaped as JSON. White space, and reasoning before the answer, may be left out."""
    answer, text = content.rpartition("</think>")[2], "".join(rendered.split())
    forms = (answer, json.dumps(answer, ensure_ascii=False)[1:-1], json.dumps(answer)[1:-1])
    return any(text.endswith("".join(form.split())) for form in forms)
