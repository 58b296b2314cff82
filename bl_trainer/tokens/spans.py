"""Weights within a row, which multiply the row's own: of each message of a chat, and of each token beside `input_ids`.

A token of weight 0 is no target. A message's tokens are all that the template writes from its header to the next message's.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Json, List

from ..errors import RecipeError
from ..head.targets import IGNORED
from .labels import columns_of, first_row, plain
from .messages import are_mappings, weight_of
from .names import MESSAGE_WEIGHT, ROW, TOKEN_WEIGHT, WEIGHT
from .template import messages_of, of_tokens, renderer

CHATS = ("messages", "prompt", "completion")
MARK = "~#0#~"  # without letters, which a template may put in upper case
OBVIOUS = (0, 1)  # weights that hold in any message: what doesn't train has no weight, and 1 is the default


class Weighing(NamedTuple):
    """What the weights within a data set's rows do: `masks` with some 0, `multiplies` with others than 0 and 1."""

    masks: bool = False
    multiplies: bool = False


def weighing_of(dataset: Any) -> Weighing:
    """Return what the weights within the rows of an arranged data set do; a stream's may do all if its first row has any."""
    present = columns_of(dataset)
    if "input_ids" in present:
        return Weighing(*[TOKEN_WEIGHT in present] * 2)
    columns = [column for column in CHATS if column in present]
    if not isinstance(dataset, Dataset):
        first: Any = first_row(dataset) or {}
        chats: list[Any] = [first[column] for column in columns if are_mappings(first.get(column))]
        return Weighing(*[any(MESSAGE_WEIGHT in message for chat in chats for message in chat)] * 2)
    if dataset.format["type"] == "custom":
        return Weighing()  # TRL refuses a transform
    found = {weight for column in columns for weight in _weights_in(dataset, column)}
    return Weighing(0 in found, bool(found - {*OBVIOUS}))


def _weights_in(dataset: Dataset, column: str) -> set[float]:
    """Return the distinct weights of the messages in a column."""
    feature = dataset.features[column]
    message = feature.feature if isinstance(feature, List) else None
    found: set[float] = set()
    rows = plain(dataset).select_columns([column])
    if isinstance(message, dict) and MESSAGE_WEIGHT in message:
        for table in rows.with_format("arrow").iter(1000):
            weights = pc.struct_field(pc.list_flatten(table[column]), MESSAGE_WEIGHT)
            found |= {*pc.unique(pc.drop_null(weights)).to_pylist()}
    elif isinstance(message, Json) and _mentions_weights(rows, column):
        found = {weight_of(message) for row in rows for message in row[column] or ()}
    return found


def _mentions_weights(rows: Dataset, column: str) -> bool:
    """Whether messages that are stored as JSON may have weights, which is known much faster than they are read."""
    for table in rows.with_format("arrow").iter(1000):
        for chunk in pc.list_flatten(table[column]).chunks:
            texts = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
            if pc.any(pc.match_substring(texts, f'"{MESSAGE_WEIGHT}"')).as_py():
                return True
    return False


def refuse_untrained(dataset: Dataset, name: str, assistant_only: bool, completion_only: bool) -> None:
    """Raise RecipeError on the first row with a weight, other than 0 and 1, of a message that doesn't train."""
    if weighing_of(dataset).multiplies and "input_ids" not in columns_of(dataset):
        columns = [column for column in CHATS if column in columns_of(dataset)]
        for row, example in enumerate(plain(dataset).select_columns(columns)):
            check_trained(example, f"row {row} of the {name} set, counted from 0,", assistant_only, completion_only)


def check_trained(example: Any, which: str, assistant_only: bool, completion_only: bool) -> None:
    """Raise RecipeError on an example with a weight, other than 0 and 1, of a message that doesn't train."""
    for column in CHATS:
        messages = example.get(column)
        for message in messages if are_mappings(messages) else ():
            hidden = column == "prompt" and completion_only
            if weight_of(message) in OBVIOUS or not (hidden or (assistant_only and message["role"] != "assistant")):
                continue
            key = "completion_only_loss" if hidden else "assistant_only_loss"
            raise RecipeError(
                f"`{MESSAGE_WEIGHT}: {message[MESSAGE_WEIGHT]:g}` in {which} has no effect: under `{key}: true` a message with "
                f"the role {message['role']!r} does not train here. Remove the weight, or write `{key}: false`."
            )


class SpanWeights:
    """Masks the tokens of weight 0 in a tokenised example, and multiplies `objective_weight` by the other weights.

    A row without weights stays as it is, but for the column that `multiplies` adds. Raises RecipeError where a message's tokens
    can't be told, and on a weight of a stream whose first row has none.

    Args:
        multiplies: Whether all rows get the column `objective_weight`.
        ignores: Whether weights other than 0 are left out, as in a diagnosis.
        only: Whether assistants' messages, and whether completions, train alone.
    """

    def __init__(
        self, tokenizer: Any, chat_template: str | None, name: str, multiplies: bool, ignores: bool, only: tuple[bool, bool]
    ):
        self.tokenizer, self.chat_template, self.name = tokenizer, chat_template, name
        self.multiplies, self.ignores, self.only = multiplies and not ignores, ignores, only

    def __call__(self, example: Any) -> dict[str, Any]:
        ids, labels = example["input_ids"], example["labels"]
        weights = example[TOKEN_WEIGHT] if TOKEN_WEIGHT in example else self._of_messages(example, ids)
        weights = weights or [1] * len(ids)
        made = {"labels": [IGNORED if weight == 0 else label for weight, label in zip(weights, labels, strict=True)]}
        if self.multiplies:
            own = example.get(WEIGHT, 1.0)
            own = own if isinstance(own, list) else [own] * len(ids)
            made[WEIGHT] = [float(a * b) for a, b in zip(own, weights, strict=True)]
        return made

    def _of_messages(self, example: Any, ids: list[int]) -> list[float] | None:
        """Return the weight of each token, None if all are 1."""
        if not any(are_mappings(example.get(column)) for column in CHATS):
            return None
        messages = messages_of(example)
        weights = [weight_of(message) for message in messages]
        if all(weight == 1 for weight in weights):
            return None
        row = (
            f"row {example[ROW]} of the {self.name} set, counted from 0," if ROW in example else f"a row of the {self.name} set"
        )
        check_trained(example, row, *self.only)
        if not (self.multiplies or self.ignores or {*weights} <= {*OBVIOUS}):
            raise RecipeError(
                f"Cannot weight messages of {row} since the first row of the stream has no weights. Write `{MESSAGE_WEIGHT}: "
                "1` in a message of its first row."
            )
        found = message_weights(self.tokenizer, self.chat_template, example, weights, ids)
        if found is None:
            raise RecipeError(
                f"Cannot tell which tokens of {row} belong to which message, as `{MESSAGE_WEIGHT}` needs: the chat template "
                "joins or changes messages (tool calls, reasoning), or the tokenizer is a slow one. Remove the weights."
            )
        return found


def message_weights(
    tokenizer: Any, chat_template: str | None, example: Any, weights: list[float], ids: list[int]
) -> list[float] | None:
    """Return for each of `ids` the weight of its message; None if they can't be told.

    A token belongs to the message in which its text begins. `weights`: of each message.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    messages, render = messages_of(example), renderer(tokenizer, chat_template, example)
    text, starts = render(messages), [(0, weights[0])]
    for i in range(1, len(messages)):
        if weights[i] != weights[i - 1]:
            start = _start_of(i, messages, render, text)
            if start is None:
                return None
            starts.append((start, weights[i]))
    places = [start for start, _ in starts] + [len(text)]
    if any(start >= stop for start, stop in pairwise(places)):
        return None
    return of_tokens(tokenizer, text, ids, lambda begin, end: next(w for at, w in reversed(starts) if at <= begin))


def _start_of(i: int, messages: list[dict[str, Any]], render: Callable[[Any], str], text: str) -> int | None:
    """Return where message `i` begins in the rendered text; None if it can't be told.

    It is where the text of those before it ends. A template may render these otherwise where they come last, as Qwen3's does
    with reasoning. Then it is found by what follows the content of the one before, which gets a mark at its end.
    """
    try:
        before = render(messages[:i])
    except Exception:  # a template raises what it likes, as where there is no user's message yet
        return None
    if text.startswith(before):
        return len(before)
    last, content = messages[i - 1], messages[i - 1].get("content")
    if not isinstance(content, str) or not content.strip():
        return None
    stripped = content.rstrip()
    marked = {**last, "content": stripped + MARK + content[len(stripped) :]}
    head, mark, rest = render([*messages[: i - 1], marked, *messages[i:]]).partition(MARK)
    _, other, tail = render([*messages[: i - 1], marked]).partition(MARK)
    is_sure = mark and other and head + rest == text and rest.startswith(tail)
    return len(head) + len(tail) if is_sure else None
