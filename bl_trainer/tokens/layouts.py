"""Layouts of training rows: the common ones turned into TRL's columns, and the row that can't be trained on as it stands."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Json, List, Value

from .._util.cached import Cached
from .._util.logs import warn_once
from ..errors import RecipeError
from .labels import first_row, handed_on
from .messages import (
    CONTENTS,
    PLAIN,
    PLAIN_KEYS,
    SHAREGPT,
    SPEAKERS,
    Keys,
    are_mappings,
    as_messages,
    fault_of,
    is_plain,
    keys_of,
    parsed,
    read,
    refuse_keys,
    trains_in_full,
)
from .names import ROW

TEXT = Value("string")
CHATS = ("messages", "conversations")  # columns that can hold nothing but messages
# Columns that TRL would take for a layout of their own where they stand beside the one that is trained
RIVALS = ("prompt", "completion", "chosen", "rejected", *CHATS)
# What columns of questions and of their answers are often called
QUESTIONS = ("prompt", "question", "instruction", "query", "problem", "input")
ANSWERS = ("completion", "answer", "response", "output", "solution")


_checked: WeakKeyDictionary[Dataset, set[tuple[tuple[str, ...], bool]]] = WeakKeyDictionary()  # columns without a fault


class RowError(RecipeError):
    """A row that can't be trained on. `columns`: those that hold its training text."""

    def __init__(self, message: str, columns: tuple[str, ...] = ()):
        super().__init__(message)
        self.columns = columns


def arrange(dataset: Any, where: str, text_field: str, num_proc: int | None = None) -> Any:
    """Return a data set or stream with its training text in the columns that TRL reads.

    Messages in ShareGPT's keys, as JSON text, or in a column of another name become `messages`. Text is JSON only in columns
    that are called messages or conversations. In ShareGPT's layout the column `system` becomes the first message; beside
    other messages it is not read, and a warning tells. The rows of a data set are checked here, those of a stream but the
    first by `check_stream` as they are read. `num_proc`: processes that convert a data set.

    Raises:
        RecipeError: if the columns make no training text. RowError: on the first row that has none.
    """
    first = None if _is_transformed(dataset) else first_row(dataset)
    if first is None:
        return dataset  # TRL refuses a transform, or takes what it makes as prepared
    columns = find_layout(first, where, text_field)
    if columns == ("input_ids",):
        return dataset
    is_chat = are_chats(first, columns, text_field)
    _check_row(first, 0, columns, is_chat, where, (SPEAKERS, CONTENTS))
    kept = {*columns} if columns[0] == "prompt" else {*columns, text_field}
    rivals = [key for key in first if key in {*RIVALS, text_field} - kept]
    dataset = dataset.remove_columns(rivals) if rivals else dataset
    names = columns if len(columns) > 1 or not is_chat else ("messages",)
    if columns != (text_field,) and not (is_chat and _is_sharegpt(first, columns)) and _has_systems(dataset, first):
        why, how = "its texts are prompts and completions", "Put it before each prompt"
        if is_chat:
            why, how = (
                "its messages have role and content",
                "Put it into each row's messages as the first, with the role system",
            )
        warn_once(f"The column `system` of {where} is not trained: {why}. {how}.")
    if is_chat and (names != columns or not all(is_plain(first[column]) for column in columns)):
        return _convert(dataset, columns, names, where, _is_sharegpt(first, columns), num_proc)
    if isinstance(dataset, Dataset):
        _check_rows(dataset, columns, is_chat, where)
    return dataset


def check_stream(dataset: IterableDataset, where: str, text_field: str) -> IterableDataset:
    """Return an arranged stream that raises RowError when it comes to a row without a training text."""
    first = first_row(dataset)
    columns = find_layout(first, where, text_field)
    is_chat = are_chats(first, columns, text_field)

    def check(example: dict[str, Any], row: int) -> dict[str, Any]:
        _check_row(example, row, columns, is_chat, where, PLAIN)
        return {}

    return handed_on(dataset, dataset.map(check, with_indices=True, features=dataset.features))


def arrange_all(given: dict[str, Any]) -> dict[str, Any]:
    """Return a trainer's arguments with its data sets arranged, unless they are not to be prepared as they are.

    Raises RecipeError if the training set is none.
    """
    _refuse_no_set(given.get("train_dataset"))
    made, evaluated = {"train_dataset": arrange_one(given, given.get("train_dataset"), "train")}, given.get("eval_dataset")
    if isinstance(evaluated, dict):
        made["eval_dataset"] = {name: arrange_one(given, dataset, name) for name, dataset in evaluated.items()}
    elif evaluated is not None:
        made["eval_dataset"] = arrange_one(given, evaluated, "eval")
    return {**given, **made}


def arrange_one(given: Mapping[str, Any], dataset: Any, name: str) -> Any:
    """Return the data set `name` arranged, unless a trainer's arguments say that it is not to be prepared as it is."""
    args = given.get("args")
    options = getattr(args, "dataset_kwargs", None) or {}
    is_own = given.get("formatting_func") is not None or options.get("skip_prepare_dataset")
    if is_own or not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    how = getattr(args, "dataset_text_field", "text"), getattr(args, "dataset_num_proc", None)
    return arrange(dataset, f"the {name} set", *how)


def _refuse_no_set(dataset: Any) -> None:
    if isinstance(dataset, (Dataset, IterableDataset)):
        return
    why, how = "there is no `train_dataset`", "Give a `Dataset` or an `IterableDataset`"
    if dataset is not None:
        why = f"`train_dataset` is a {type(dataset).__name__}"
    if isinstance(dataset, dict) and dataset:
        why += f" of {', '.join(map(str, dataset))}"
        how = f"Give one of them: `train_dataset=data[{next(iter(dataset))!r}]`"
    raise RecipeError(f"Cannot train: {why}. {how}.")


def find_layout(first: dict[str, Any], where: str, text_field: str) -> tuple[str, ...]:
    """Return the columns that hold the training text, by a data set's first row. Raises RecipeError if there are none."""
    standard = [("input_ids",), ("prompt", "completion"), *((column,) for column in CHATS), (text_field,)]
    filled = {key for key, value in first.items() if value is not None}
    own = {*RIVALS, text_field}
    others = [key for key in first if key not in own and keys_of(read(key, first[key])) is not None]
    found = next((each for each in standard if {*each} <= filled), None)
    if found is None and len(others) == 1:
        _refuse_half(first, others[0], where)
        return (others[0],)
    found = found or next((each for each in standard if {*each} <= {*first}), None)
    if found is None:
        raise _no_layout(first, where, text_field, others)
    if found == ("prompt",) or (found == (text_field,) and text_field in CHATS and isinstance(first[text_field], str)):
        what = "half of a pair" if found == ("prompt",) else "messages"
        raise RecipeError(f"Cannot train on `dataset_text_field: {text_field}`: TRL takes this column for {what}. Rename it.")
    for column in found if are_chats(first, found, text_field) else ():
        refuse_keys(read(column, first[column]), column, where)
    return found


def _refuse_half(first: dict[str, Any], column: str, where: str) -> None:
    """Raise RecipeError where a column of another name holds the answers, and a column of text or messages what is asked."""
    asked = next((key for key in QUESTIONS if key in first), None)
    is_answer = all(message["role"] == "assistant" for message in as_messages(read(column, first[column])))
    if asked and (is_answer or keys_of(first[asked]) is not None):
        renamed = "" if asked == "prompt" else f"`{asked}` to `prompt` and "
        raise RecipeError(
            f"Cannot train on `{column}` of {where}: it holds answers, and `{asked}` what is asked. Rename {renamed}`{column}` "
            "to `completion`."
        )


def _no_layout(first: dict[str, Any], where: str, text_field: str, others: list[str]) -> RecipeError:
    """Return the error for columns that make no training text."""
    hidden = [key for key, value in first.items() if keys_of(parsed(value)) is not None and key not in others]
    if others:
        return RecipeError(
            f"Cannot choose among the columns {', '.join(others)} of {where}: each holds messages. Remove all but one, or "
            "rename one to messages."
        )
    if {"chosen", "rejected"} <= {*first}:
        return RecipeError(
            f"Cannot train on {where}: its columns `chosen` and `rejected` are preferences, not a text to train on. Rename "
            "`chosen` to `completion`, or to `messages` if it holds whole chats, and remove `rejected`."
        )
    if hidden:
        return RecipeError(
            f"Cannot train on {where}: its column `{hidden[0]}` holds messages as JSON text. Rename it to messages to train "
            f"these, or write `dataset_text_field: {hidden[0]}` to train the JSON itself."
        )
    columns = ", ".join(sorted(first))
    if text_field != "text":
        texts = [key for key, value in first.items() if isinstance(value, str)]
        advice = f"Write `dataset_text_field: {texts[0]}`" if len(texts) == 1 else "Name one of them"
        return RecipeError(
            f"Cannot train on {where}: `dataset_text_field: {text_field}` names no column of it; it has {columns}. {advice}."
        )
    return RecipeError(
        f"Cannot train on {where}: TRL can't make a training text of its columns {columns}. {_renaming(first)}, or write "
        "`dataset_text_field: ...`."
    )


def _renaming(first: dict[str, Any]) -> str:
    """Return which columns to rename, by the names that questions and their answers usually have."""
    asked = next((key for key in QUESTIONS if key in first), None)
    answered = next((key for key in ANSWERS if key in first), None)
    if asked and answered:
        pairs = [(asked, "prompt"), (answered, "completion")]
        more = "Join `input` to each `instruction`. " if asked == "instruction" and first.get("input") is not None else ""
        return more + "Rename " + " and ".join(f"`{old}` to `{new}`" for old, new in pairs if old != new)
    return "Rename a column of texts to `text`, one of chats to `messages`, or two to `prompt` and `completion`"


def are_chats(first: dict[str, Any], columns: tuple[str, ...], text_field: str | None = None) -> bool:
    """Whether the columns of a training text hold messages rather than texts, by the first row."""
    if columns == (text_field,) and isinstance(first[columns[0]], str):
        return False
    return columns[0] in CHATS or (columns != ("input_ids",) and any(are_mappings(read(key, first[key])) for key in columns))


def _is_transformed(dataset: Any) -> bool:
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def _is_system(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _has_systems(dataset: Any, first: dict[str, Any]) -> bool:
    """Whether the column `system` says something: of a stream in the first row, of a data set in any."""
    if not isinstance(dataset, Dataset) or dataset.features.get("system") != TEXT or "system" not in first:
        return _is_system(first.get("system"))
    return any(map(_is_system, pc.unique(dataset.data.column("system")).to_pylist()))


def _is_sharegpt(first: dict[str, Any], columns: tuple[str, ...]) -> bool:
    """Whether a chat is in ShareGPT's layout, of which a column `system` is a part, by the first row."""
    chats = [read(column, first[column]) for column in columns]
    return any(key in message for chat in chats for message in chat for key in SHAREGPT)


def _check_row(example: dict[str, Any], row: int, columns: tuple[str, ...], is_chat: bool, where: str, keys: Keys) -> None:
    for column in columns:
        fault = fault_of(example.get(column), is_chat, keys)
        if fault:
            raise RowError(
                f"Cannot train on row {example.get(ROW, row)} of {where}, counted from 0: {column!r} {fault}. Correct the row, "
                "or remove it.",
                columns,
            )


def _check_rows(dataset: Dataset, columns: tuple[str, ...], is_chat: bool, where: str) -> None:
    """Raise RowError on the first row of a data set that has no training text. Each data set is read once."""
    if (columns, is_chat) in _checked.get(dataset, ()):
        return
    if not all(_is_sound(dataset.data.column(column), dataset.features[column], is_chat) for column in columns):
        for row, example in enumerate(dataset.with_format(None).select_columns(list(columns))):
            _check_row(example, row, columns, is_chat, where, PLAIN)
    _checked.setdefault(dataset, set()).add((columns, is_chat))


def _is_sound(column: pa.ChunkedArray, feature: Any, is_chat: bool) -> bool:
    """Whether types and counts of nulls rule out that a row is at fault, which spares reading all of them."""
    if column.null_count or not is_chat:
        return not column.null_count and feature == TEXT
    message = feature.feature if isinstance(feature, List) else None
    if not isinstance(message, dict) or any(trains_in_full(key) is not None for key in message):
        return False
    return message.get("role") == message.get("content") == TEXT and all(
        _is_filled(chunk) for chunk in column.chunks if len(chunk)
    )


def _is_filled(chunk: pa.Array) -> bool:
    messages = chunk.flatten()
    parts = [messages, *(pc.struct_field(messages, key) for key in PLAIN_KEYS)]
    return pc.min(pc.list_value_length(chunk)).as_py() > 0 and not any(part.null_count for part in parts)


def _convert(
    dataset: Any, columns: tuple[str, ...], names: tuple[str, ...], where: str, is_sharegpt: bool, num_proc: int | None
) -> Any:
    """Return a data set or stream with the messages of `columns` as `names`, in TRL's keys."""

    def convert(example: dict[str, Any], row: int) -> dict[str, Any]:
        _check_row(example, row, columns, True, where, (SPEAKERS, CONTENTS))
        made = {name: as_messages(example[column]) for name, column in zip(names, columns, strict=True)}
        system, head = example.get("system"), made[names[0]]
        if is_sharegpt and _is_system(system) and head[0]["role"] != "system":
            head.insert(0, {"role": "system", "content": system})
        return made

    features = dataset.features
    if features is not None:  # JSON keeps each message's own keys
        others = {key: features[key] for key in features if key not in columns}
        features = Features(others | {name: List(Json()) for name in names})
    removed = [column for column in columns if column not in names]
    how = {"num_proc": num_proc} if isinstance(dataset, Dataset) else {}
    return dataset.map(Cached(convert), with_indices=True, remove_columns=removed, features=features, **how)


def align(datasets: list[Any], sources: list[str], text_field: str, num_proc: int | None = None) -> list[Any]:
    """Return the parts of a mixture, all arranged, so that they can be joined and arranged again.

    Raises RecipeError if their layouts differ.
    """
    layouts: dict[str, str] = {}
    columns: tuple[str, ...] = ()
    for dataset, source in zip(datasets, sources, strict=True):
        first = first_row(dataset)
        if first is not None:
            columns = find_layout(first, source, text_field)
            kind = "messages" if are_chats(first, columns, text_field) else "texts"
            layouts.setdefault(" and ".join(columns) + (f" ({kind})" if columns != ("input_ids",) else ""), source)
    if len(layouts) > 1:
        found = "; ".join(f"{source} has {layout}" for layout, source in layouts.items())
        raise RecipeError(f"Cannot mix data sets of different layouts: {found}. Give all of them the same columns.")
    for column in columns:
        kinds = [(dataset.features or {}).get(column) for dataset in datasets]
        if all(isinstance(kind, List) for kind in kinds) and any(kind != kinds[0] for kind in kinds):
            datasets = [_as_json(dataset, column, num_proc) for dataset in datasets]
    return datasets


def _as_json(dataset: Any, column: str, num_proc: int | None) -> Any:
    """Return a data set or stream with each message's own keys, so that they may differ."""
    features = Features({**dataset.features, column: List(Json())})
    how = {"num_proc": num_proc} if isinstance(dataset, Dataset) else {}
    return dataset.map(Cached(lambda example: {column: as_messages(example[column])}), features=features, **how)
