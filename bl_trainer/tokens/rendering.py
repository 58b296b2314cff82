"""Rendered rows: whether the chat template puts every message's content into the training text."""

import json
import re
from typing import Any

import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List
from transformers import ProcessorMixin
from trl import get_training_chat_template
from trl.data_utils import is_conversational, prepare_multimodal_messages

from .._util.cached import Cached
from .._util.logs import warn_once
from .._util.text import sentence
from ..errors import RecipeError
from .filled import has_filled, unfilled
from .labels import first_row, handed_on
from .layouts import TEXT, RowError, arrange, check_stream
from .marked import MARK, NOBODY, ends_with, marked_messages, with_names, with_texts
from .messages import CALLS, ROLES, short, trains_in_full
from .names import MESSAGE_WEIGHT, ROW
from .template import messages_of

KWARGS = "chat_template_kwargs"
RENDERED = ("messages", "prompt", "completion", "tools", KWARGS, ROW)  # columns that rendering reads


def check_rendering(dataset: Any, processing_class: Any, chat_template: str | None, where: str, args: Any) -> Any:
    """Return a data set arranged, each row checked and rendered once to see that it holds all messages.

    Rows of a stream are checked as they are read. Raises RowError on the first row that lacks a message.
    """
    dataset = arrange(dataset, where, args.dataset_text_field, args.dataset_num_proc)
    first = first_row(dataset)
    if first is None or "input_ids" in first:
        return dataset
    fills = isinstance(dataset, Dataset) and has_filled(dataset)
    check = RenderedRow(processing_class, chat_template, where, args.assistant_only_loss, fills)
    if isinstance(dataset, IterableDataset):
        return check_rendered(check_stream(dataset, where, args.dataset_text_field), check)
    if is_conversational(first):
        with PartialState().local_main_process_first():  # the others find the result in the cache
            _check_set(dataset, check, args.dataset_num_proc)
    return dataset


def refuse_unmarked(processing_class: Any) -> None:
    """Raise RecipeError if the chat template doesn't mark what `assistant_only_loss` trains, and TRL can't mark it either."""
    template = getattr(processing_class, "chat_template", None)
    if template is None or re.search(r"{%-?\s*generation\s*-?%}", str(template)):
        return
    try:
        get_training_chat_template(processing_class)
    except ValueError as error:
        raise RecipeError(
            "Cannot use `assistant_only_loss: true`: the chat template does not mark the assistant's turns by `{% generation "
            "%}`, and TRL knows no such version of it. Set `chat_template_path` to a template with the marks, or split each "
            "row into the columns `prompt` and `completion` and remove the key."
        ) from error


def _check_set(dataset: Dataset, check: "RenderedRow", num_proc: int | None) -> None:
    """Render all rows. `datasets` caches the warnings by the rows, the template, the tokenizer and the versions."""

    def checked(example: dict[str, Any], row: int) -> dict[str, Any]:
        return {"warning": check(example, row), "unread": check.unread_keys(example)}

    rendered = dataset.with_format(None).select_columns([key for key in RENDERED if key in dataset.column_names])
    warnings = rendered.map(
        Cached(checked),
        with_indices=True,
        num_proc=num_proc,
        remove_columns=rendered.column_names,
        features=Features({"warning": TEXT, "unread": List(TEXT)}),
        desc="Checking rendered messages",
    )
    said = pc.drop_null(warnings.data.column("warning"))
    if len(said):
        warn_once(f"{said[0].as_py()} This concerns {len(said)} of {len(dataset)} rows.")
    check.warn_of(pc.unique(pc.list_flatten(warnings.data.column("unread"))).to_pylist())


def check_rendered(dataset: IterableDataset, check: "RenderedRow") -> IterableDataset:
    """Return a stream that raises RowError when it comes to a row that lacks a message."""
    said = False

    def checked(example: dict[str, Any], row: int) -> dict[str, Any]:
        nonlocal said
        warning = check(example, row)
        if warning and not said:
            said = True
            warn_once(warning)
        check.warn_of(check.unread_keys(example))
        return {}

    return handed_on(dataset, dataset.map(checked, with_indices=True, features=dataset.features))


class RenderedRow:
    """Check that the chat template renders all contents of an example; called with it and its number.

    Each content is rendered with a mark behind it. Where the mark is missing and the rendered text is the same whatever the
    content, the message is left out, which raises RowError. Another spelling of a known role, such as `human`, raises it too
    if the template takes the name for any other. A call returns a warning, or None: for a content that doesn't precede its
    mark, and a role that the template doesn't know. White space at the ends and reasoning may be left out.

    Args:
        assistant_only: Whether only assistants' messages train, so that each example needs one.
        fills: Whether nulls in calls and tools may be those of keys that other rows have. Rendered ones raise RowError.
    """

    def __init__(
        self,
        processing_class: Any,
        chat_template: str | None,
        where: str,
        assistant_only: bool = False,
        fills: bool = False,
    ):
        self.processing_class, self.chat_template, self.where = processing_class, chat_template, where
        self.assistant_only, self.fills = assistant_only, fills
        self.are_read: dict[str, bool] = {}  # keys of messages that hold truths or numbers

    def __call__(self, example: Any, row: int) -> str | None:
        if not is_conversational(example):
            return None
        columns = ("prompt", "completion") if "prompt" in example else ("messages",)
        messages = messages_of(example)
        at = f"row {example.get(ROW, row)} of {self.where}, counted from 0"
        if KWARGS in example and example[KWARGS] is None:
            raise RowError(
                f"Cannot train on {at}: it has no `{KWARGS}`, which other rows have. Give them to all rows or none.",
            )
        self._refuse_no_template(example)
        if self.assistant_only and not any(message["role"] == "assistant" for message in messages):
            raise RowError(
                f"Cannot train on {at}: it has no message of the assistant, and `assistant_only_loss: true` trains no other. "
                "Remove the row or the key.",
            )
        try:
            return self._check(messages, example, at)
        except RowError:
            raise
        except Exception as error:  # a template raises what it likes
            raise RowError(
                f"Cannot render {at}, by the chat template: {sentence(error)}. Correct the row, or set another "
                "`chat_template_path`.",
                columns,
            ) from error

    def unread_keys(self, example: Any) -> list[str]:
        """Return keys whose values have no effect: the template names none, nor renders otherwise without.

        They are `chat_template_kwargs`, and keys of messages that hold truths or numbers. Each is measured once, in the first
        row that has it.
        """
        messages = messages_of(example) if is_conversational(example) else []
        found = {key for message in messages for key, value in message.items() if isinstance(value, (bool, int, float))}
        new = [key for key in sorted(found - self.are_read.keys()) if key != MESSAGE_WEIGHT and trains_in_full(key) is None]
        own = (example.get(KWARGS) or {}).get("chat_template")
        template = str(own or self.chat_template or getattr(self.processing_class, "chat_template", None))
        for key in new:
            without = [{name: value for name, value in message.items() if name != key} for message in messages]
            is_named = re.search(rf"\b{re.escape(key)}\b", template) is not None
            self.are_read[key] = is_named or self._render(without, example) != self._render(messages, example)
        kwargs = {key: value for key, value in (example.get(KWARGS) or {}).items() if key != "chat_template"}
        for key in kwargs if messages else ():
            name = f"{KWARGS}.{key}"
            if name in self.are_read:
                continue
            new.append(name)
            other = {**example, KWARGS: {name: value for name, value in example[KWARGS].items() if name != key}}
            is_named = re.search(rf"\b{re.escape(key)}\b", template) is not None
            self.are_read[name] = is_named or self._render(messages, other) != self._render(messages, example)
        return [key for key in new if not self.are_read[key]]

    def warn_of(self, keys: list[str]) -> None:
        """Warn of keys that have no effect."""
        for key in keys:
            advice = f"Write `{MESSAGE_WEIGHT}: 0` for a message that does not train."
            whose, advice = ("", "Remove it.") if key.startswith(f"{KWARGS}.") else (" of messages", advice)
            warn_once(f"The key `{key}`{whose} in {self.where} has no effect: the chat template does not read it. {advice}")

    def _refuse_no_template(self, example: Any) -> None:
        own = (example.get(KWARGS) or {}).get("chat_template")
        if not (self.chat_template or own or getattr(self.processing_class, "chat_template", None)):
            raise RecipeError(
                f"Cannot render the messages of {self.where}: the tokenizer has no chat template. Set `chat_template_path`, or "
                "give prompt and completion as texts."
            )

    def _check(self, messages: list[Any], example: Any, at: str) -> str | None:
        marked, contents = marked_messages(messages)
        rendered = self._render(marked, example)
        if NOBODY in rendered:
            raise RowError(
                f"Cannot train on {at}: its content is a list of parts, which the chat template writes with their keys. Give "
                "each message's content as one text.",
            )
        before = dict(zip(MARK.findall(rendered), MARK.split(rendered)[::2], strict=False))
        changed = None
        for mark, (index, content) in contents.items():
            role = messages[index]["role"]
            if mark not in before and self._is_left_out(messages, index, example):
                raise RowError(
                    f"Cannot train on {at}: the chat template leaves out {short(content)}, a message with the role {role!r}. "
                    "Rename the role to one that the template renders, or set another `chat_template_path`."
                )
            if changed is None and not ends_with(before.get(mark, ""), content):
                changed = (
                    f"The chat template leaves out or changes content with the role {role!r} in {self.where}. Compare the "
                    f"rendered text of {at}."
                )
        self._refuse_lost_calls(messages, example, at)
        if self.fills and self._render(*unfilled(messages, example)) != self._render(messages, example):
            raise RowError(
                f"Cannot train on {at}: the chat template writes nulls of its calls or tools, for keys that other rows have. "
                "Save the rows as JSON lines without these nulls, or make the set with `on_mixed_types='use_json'`.",
            )
        return changed or self._check_roles(messages, example, at)

    def _refuse_lost_calls(self, messages: list[Any], example: Any, at: str) -> None:
        for index, message in enumerate(messages):
            if any(map(message.get, CALLS)):
                other = {**message, **{key: with_names(message[key]) for key in CALLS if message.get(key)}}
                if self._renders_alike(messages, index, other, example):
                    raise RowError(
                        f"Cannot train on {at}: the chat template leaves out the call of {short(message)}. Write it as "
                        "`tool_calls`, or set a `chat_template_path` that renders it."
                    )
        if example.get("tools") and self._render(messages, example) == self._render(messages, {**example, "tools": None}):
            raise RowError(
                f"Cannot train on {at}: the chat template leaves out its `tools`. Remove the column, or set a "
                "`chat_template_path` that renders it."
            )

    def _check_roles(self, messages: list[Any], example: Any, at: str) -> str | None:
        """Return a warning of a role that the template doesn't know. Raises RowError if it is a known one's other name."""
        for role in sorted({message["role"] for message in messages} - {*ROLES.values()}):
            meant = ROLES.get(role.lower())
            if not self._is_any_role(role, meant, messages, example):
                continue
            if meant is not None:
                raise RowError(
                    f"Cannot train on {at}: the chat template doesn't know the role {role!r} and writes it as any other name. "
                    f"Rename it to {meant!r}."
                )
            return (
                f"The chat template doesn't know the role {role!r} in {self.where}, and writes it as any other name. Compare "
                f"the rendered text of {at}."
            )
        return None

    def _is_any_role(self, role: str, meant: str | None, messages: list[Any], example: Any) -> bool:
        """Whether the template writes a role as it does an unknown one, and otherwise than the one that is meant."""

        def rendered(name: str) -> str | None:
            renamed = [{**each, "role": name if each["role"] == role else each["role"]} for each in messages]
            try:
                return self._render(renamed, example)
            except Exception:  # the template refuses the name, which it raises as it likes
                return None

        found, unknown, as_meant = rendered(role), rendered(NOBODY), rendered(meant) if meant else None
        if found is None or unknown is None:
            return False
        return found != as_meant and found.casefold() == unknown.replace(NOBODY, role).casefold()

    def _is_left_out(self, messages: list[Any], index: int, example: Any) -> bool:
        """Whether another content of a message leaves the rendered text as it is."""
        message = messages[index]
        if message.get("tool_calls"):  # beside which templates take content for reasoning
            return False
        other = {**message, "content": with_texts(message["content"], lambda text: f"~{text[::-1]}~")}
        return self._renders_alike(messages, index, other, example)

    def _renders_alike(self, messages: list[Any], index: int, other: Any, example: Any) -> bool:
        return self._render(messages, example) == self._render([*messages[:index], other, *messages[index + 1 :]], example)

    def _render(self, messages: list[Any], example: Any) -> str:
        tools = example.get("tools")
        options = {
            "chat_template": self.chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(example.get(KWARGS) or {}),
        }
        if isinstance(self.processing_class, ProcessorMixin):
            messages = prepare_multimodal_messages(messages)
        return self.processing_class.apply_chat_template(messages, tokenize=False, **options)
