"""Layouts of training rows: the common ones train as they read, and what can't be trained on is named."""

import bz2
import csv
import gzip
import json
import lzma
import re
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from datasets import Dataset, Features, IterableDataset, Json, List, concatenate_datasets
from datasets.fingerprint import Hasher
from huggingface_hub import constants
from packaging.version import Version

from bl_trainer import BLConfig, BLTrainer
from bl_trainer._util.cached import VERSIONS, Cached
from bl_trainer._util.hub import why_no_data, why_unavailable
from bl_trainer.cli import main
from bl_trainer.errors import RecipeError
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.tokens import layouts
from bl_trainer.tokens.filled import has_filled
from bl_trainer.tokens.idle import check_labels
from bl_trainer.tokens.layouts import RowError, arrange, check_stream
from bl_trainer.tokens.rendering import RenderedRow, check_rendering
from conftest import make_llama, write_recipe

# Leaves out messages of any other role, and begins with a prompt of its own, as Qwen's does
STRICT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<user>' + 'you are helpful.' + '<end>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] in ('system', 'user') %}{{ '<user>' + message['content'] + '<end>' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<end>' }}{% endif %}"
    "{% endfor %}"
)
CHAT = [[{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i}"}] for i in range(4)]


def renamed(messages, speaker, content, names=None):
    names = names or {}
    return [{speaker: names.get(each["role"], each["role"]), content: each["content"]} for each in messages]


SHAREGPT = [renamed(each, "from", "value", {"user": "human", "assistant": "gpt"}) for each in CHAT]
# Name -> rows that hold the conversations of CHAT
LAYOUTS = {
    "sharegpt": [{"conversations": each} for each in SHAREGPT],
    "sharegpt, other names": [
        {"conversations": renamed(each, "from", "value", {"user": "Human", "assistant": "chatgpt"})} for each in CHAT
    ],
    "sharegpt in messages": [{"messages": each} for each in SHAREGPT],
    "from and content": [{"messages": renamed(each, "from", "content")} for each in CHAT],
    "role and value": [{"conversations": renamed(each, "role", "value")} for each in CHAT],
    "conversations": [{"conversations": each} for each in CHAT],
    "conversation": [{"conversation": each, "id": i} for i, each in enumerate(CHAT)],
    "chat": [{"chat": each, "source": "a"} for each in SHAREGPT],
    "dialog": [{"id": "x", "dialog": each} for each in CHAT],
    "any name": [{"turns of talk": each} for each in CHAT],
    "JSON text": [{"messages": json.dumps(each)} for each in CHAT],
    "JSON text of sharegpt": [{"conversations": json.dumps(each)} for each in SHAREGPT],
    "ultrachat": [{"prompt": each[0]["content"], "prompt_id": str(i), "messages": each} for i, each in enumerate(CHAT)],
    "prompt of messages": [{"prompt": each[:1], "messages": each} for each in CHAT],
    "preferences": [{"chosen": "a", "rejected": "b", "messages": each} for each in CHAT],
    "keys of other rows": [{"messages": [{**turn, "name": None} for turn in each]} for each in CHAT],
}
PAIRS = {
    "sharegpt": [{"prompt": each[:1], "completion": each[1:]} for each in SHAREGPT],
    "messages besides": [{"prompt": each[:1], "completion": each[1:], "messages": "?", "text": "?"} for each in CHAT],
}


@pytest.fixture
def strict(tokenizer):
    before, tokenizer.chat_template = tokenizer.chat_template, STRICT
    yield tokenizer
    tokenizer.chat_template = before


@pytest.fixture
def write(tmp_path, checkpoint):
    """Write a recipe for rows or a file of data, and give the arguments that name it."""

    def write(data=None, **changes):
        if isinstance(data, list):
            path = tmp_path / "data.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in data))
            data = path
        return ["--config", str(write_recipe(tmp_path, checkpoint, data or tmp_path, **changes))]

    return write


def refusal(argv, capsys, verb="train"):
    """Return the one line that the verb ends in, with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main([verb, *argv])
    assert caught.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


def trained_ids(rows, tokenizer, folder, stream=False, **options):
    """Return the token ids and labels that a trainer makes of rows."""
    args = BLConfig(str(folder), use_cpu=True, bf16=False, report_to="none", max_steps=1, **options)
    dataset = rows if isinstance(rows, (Dataset, IterableDataset)) else Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if stream else dataset
    trainer = BLTrainer(make_llama(tokenizer), args, train_dataset=dataset, processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.fixture
def expected(strict, tmp_path):
    return trained_ids([{"messages": each} for each in CHAT], strict, tmp_path)


@pytest.mark.parametrize("stream", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_common_layouts_train_as_messages_do(name, stream, expected, strict, tmp_path):
    assert trained_ids(LAYOUTS[name], strict, tmp_path, stream) == expected


@pytest.mark.parametrize("stream", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("name", PAIRS)
def test_common_layouts_train_as_pairs_do(name, stream, strict, tmp_path):
    plain = [{"prompt": each[:1], "completion": each[1:]} for each in CHAT]
    assert trained_ids(PAIRS[name], strict, tmp_path, stream) == trained_ids(plain, strict, tmp_path)


def test_a_text_beside_a_pair_leaves_the_pair_its_end(tokenizer, tmp_path):
    pairs = [{"prompt": "a", "completion": "b"}]
    beside = [{**row, "text": "c"} for row in pairs]
    assert trained_ids(beside, tokenizer, tmp_path) == trained_ids(pairs, tokenizer, tmp_path)


JSON = json.dumps(CHAT[0])
TEXTS = [
    ([{"text": '[{"a": 1}] b'}], "text"),
    ([{"text": "[b"}], "text"),
    ([{"text": JSON}, {"text": "b"}], "text"),
    ([{"body": JSON}], "body"),
    ([{"conversation": JSON}], "conversation"),
    ([{"prompt": JSON, "completion": "b"}], "text"),
    ([{"prompt": "write messages", "completion": JSON}, {"prompt": JSON, "completion": JSON}], "text"),
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "field"), TEXTS, ids=str)
def test_texts_that_hold_json_stay_texts(rows, field, turned):
    dataset = Dataset.from_list(rows[::-1] if turned else rows)
    assert arrange(dataset, "the train set", field)[:] == dataset[:]


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "Message"])
def test_json_text_is_parsed_where_the_name_of_the_column_says_so(column):
    rows = [{column: json.dumps(each)} for each in CHAT]
    assert list(arrange(Dataset.from_list(rows), "the train set", "text")["messages"]) == CHAT
    with pytest.raises(RowError, match=f"row 4 of the train set, counted from 0: {column!r} is .b., not messages"):
        arrange(Dataset.from_list([*rows, {column: "b"}]), "the train set", "text")


def test_all_keys_of_all_messages_are_kept():
    tool = {"from": "gpt", "value": "b", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    rows = [{"messages": json.dumps(each)} for each in [[{"from": "human", "value": "a"}]] * 1500 + [[tool]]]
    made = arrange(Dataset.from_list(rows), "the train set", "text")
    assert made[0]["messages"] == [{"role": "user", "content": "a"}]
    assert made[1500]["messages"] == [{"role": "assistant", "content": "b", "tool_calls": tool["tool_calls"]}]


def test_the_system_column_of_sharegpt_comes_first():
    rows = [{"system": system, "conversations": SHAREGPT[0]} for system in ("be kind", None, " ")]
    made = arrange(Dataset.from_list(rows), "the train set", "text")["messages"]
    assert made[0] == [{"role": "system", "content": "be kind"}, *CHAT[0]]
    assert made[1] == made[2] == CHAT[0]


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_a_system_column_beside_other_chats_is_told_of(column, monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.tokens.layouts.warn_once", said.append)
    rows = [{"system": "linux", column: each} for each in CHAT]
    assert list(arrange(Dataset.from_list(rows), "the train set", "text")["messages"]) == CHAT
    assert "The column `system` of the train set is not trained" in said[0]


def test_a_system_column_beside_pairs_is_told_of_wherever_it_begins(monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.tokens.layouts.warn_once", said.append)
    pair = {"prompt": "a", "completion": "b"}
    arrange(Dataset.from_list([{**pair, "system": each} for each in (None, " ")]), "the train set", "text")
    arrange(Dataset.from_list([{"text": "a", "system": "linux"}]), "the train set", "text")
    assert not said
    arrange(Dataset.from_list([{**pair, "system": each} for each in (None, " ", "be kind")]), "the train set", "text")
    assert said == [
        "The column `system` of the train set is not trained: its texts are prompts and completions. Put it before each prompt."
    ]


def test_an_input_beside_an_instruction_is_not_advised_away():
    rows = [{"instruction": "a", "input": "", "output": "c"}, {"instruction": "a", "input": "b", "output": "c"}]
    with pytest.raises(
        RecipeError, match=r"Join `input` to each `instruction`\. Rename `instruction` to `prompt` and `output` to"
    ):
        arrange(Dataset.from_list(rows), "the train set", "text")


def test_calls_of_functions_and_what_stands_in_place_of_content():
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(call)}]
    turns += [{"from": "observation", "value": "1"}, {"from": "gpt", "value": "b"}]
    found = arrange(Dataset.from_list([{"conversations": turns}]), "the train set", "text")[0]["messages"]
    assert found[1] == {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}
    assert [each["role"] for each in found] == ["user", "assistant", "tool", "assistant"]
    plain = [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(1)"}]
    found = arrange(Dataset.from_list([{"conversations": plain}]), "the train set", "text")[0]["messages"]
    assert found[1] == {"role": "assistant", "content": "f(1)"}
    for key, value in (("function_call", call), ("tool_calls", [call]), ("thinking", "hm"), ("reasoning_content", "hm")):
        row = {"messages": [CHAT[0][0], {"role": "assistant", "content": None, key: value}]}
        assert arrange(Dataset.from_list([row]), "the train set", "text")[0]["messages"][1][key] == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss_weight", 0.5), ("train", False), ("loss_mask", 0), ("masked", True), ("weights", 0), ("Weight", 0),
        ("drop", True), ("ignore", True), ("skip", True), ("is_masked", True), ("no_loss", True), ("include", False),
        ("learn", False), ("train_on", False), ("trained", False), ("supervise", False), ("calculate_loss", 0),
        ("isSkipped", True),
        ("train", "false"),
    ],
    ids=str,
)  # fmt: skip
def test_keys_of_messages_that_have_no_effect_are_refused(key, value):
    rows = [{"messages": each} for each in CHAT] + [{"messages": [{**CHAT[0][0], key: value}, CHAT[0][1]]}]
    for row in rows:
        sharegpt = {"conversations": renamed(row["messages"], "from", "value")}
        sharegpt["conversations"][0] |= {each: row["messages"][0][each] for each in row["messages"][0] if each == key}
        row |= {"other": sharegpt["conversations"]}
    for column, layout in (("messages", "messages"), ("other", "conversations")):
        dataset = Dataset.from_list([{layout: row[column]} for row in rows])
        with pytest.raises(RowError, match=f"row 4 of .* has a message with `{key}: .*`, which has no .*`weight: 0`"):
            arrange(dataset, "the train set", "text")
    full = "true" if isinstance(value, str) else type(value)(not value or isinstance(value, float))
    same = Dataset.from_list([{"messages": [{**turn, key: full} for turn in each]} for each in CHAT])
    assert arrange(same, "the train set", "text")[:] == same[:]


@pytest.mark.parametrize("arranged", ["messages", "conversations", "text"])
def test_the_first_row_of_a_stream_is_read_once(arranged):
    starts = []

    def rows():
        starts.append(1)
        yield {arranged: SHAREGPT[0] if arranged == "conversations" else CHAT[0] if arranged == "messages" else "a"}

    stream = IterableDataset.from_generator(rows)
    check_labels({"train": stream}, BLConfig(use_cpu=True, bf16=False, report_to="none"))
    for _ in range(2):
        found = arrange(stream, "the train set", "text")
        check_labels({"train": found}, BLConfig(use_cpu=True, bf16=False, report_to="none"))
        check_stream(found, "the train set", "text")
    assert len(starts) == (3 if arranged == "conversations" else 1)  # each conversion is a stream of its own


def test_rows_in_trl_s_layouts_are_not_touched(text_data, pair_data, chat_data):
    for dataset in (text_data, pair_data, chat_data, Dataset.from_list([{"input_ids": [1], "messages": None}])):
        assert arrange(dataset, "the train set", "text") is dataset


UNKNOWN = [
    ([{"conversations": [{"speaker": "a", "utterance": "b"}]}], "of the train set: their keys are speaker, utterance. Rename"),
    ([{"conversations": [{"from": "narrator", "value": "b"}]}], "a message from \"narrator\", which is none of human, user"),
    ([{"a": CHAT[0], "b": CHAT[0]}], "Cannot choose among the columns a, b of the train set: each holds messages. Remove all"),
    ([{"prompt": CHAT[0][:1], "answer": CHAT[0][1:]}], "Cannot train on `answer` of the train set: it holds answers, and"),
    ([{"question": "a", "turn": CHAT[0][1:]}], "what is asked. Rename `question` to `prompt` and `turn` to `completion`."),
    ([{"instruction": "a", "output": "b"}], "can't make a training text of its columns instruction, output. Rename `inst"),
    ([{"prompt": CHAT[0][:1], "completion": "b"}], "'completion' is \"b\", not messages with role and content"),
    ([{"conversations": ["a", "b"]}], "'conversations' is [\"a\", \"b\"], not messages with role and content"),
    ([{"c": JSON}], "its column `c` holds messages as JSON text. Rename it to messages to train these, or write `dataset_t"),
    ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "`chosen` and `rejected` are preferences, not a text to train on."),
    ([{"messages": [CHAT[0][0], {"role": "user", "text": "b"}]}], "'messages' has {\"role\": \"user\", \"text\": \"b\"}, not"),
    ([{"messages": "[{'role': 'user', 'content': 'a'}]"}], "\"[{'role': 'user', 'content': 'a'}]\", not messages with"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), UNKNOWN, ids=[message for _, message in UNKNOWN])
def test_layouts_that_are_not_known_are_refused_by_name(rows, message, write, tmp_path, capsys):
    assert message in refusal(write(rows), capsys)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError) as caught:  # before the model would be looked for
        BLTrainer("no/model", BLConfig(use_cpu=True, bf16=False, report_to="none"), train_dataset=Dataset.from_list(rows))
    assert message in str(caught.value)


HOLES = [
    ([{"messages": CHAT[0]}, {"messages": None}], "'messages' is null, not messages"),
    ([{"messages": CHAT[0]}, {"messages": []}], "'messages' is [], not messages"),
    ([{"messages": CHAT[0]}, {"messages": [{"role": "user", "content": None}]}], "not messages with role and content"),
    ([{"messages": CHAT[0]}, {"messages": [{"role": None, "content": "a"}]}], "not messages with role and content"),
    ([{"text": "a", "messages": None}, {"text": None, "messages": CHAT[0]}], "'text' is null, not a text"),
    ([{"messages": CHAT[0], "text": None}, {"messages": None, "text": "a"}], "'messages' is null, not messages"),
    ([{"text": "a"}, {"text": None}], "'text' is null, not a text"),
    ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], "'completion' is null, not a text"),
    ([{"conversations": SHAREGPT[0]}, {"conversations": None}], "'conversations' is null, not messages"),
    ([{"messages": json.dumps(CHAT[0])}, {"messages": "a"}], "'messages' is \"a\", not messages"),
]


@pytest.mark.parametrize("kind", ["parquet", "streamed parquet", "trainer", "streamed trainer"])
@pytest.mark.parametrize(("rows", "message"), HOLES, ids=[str(rows[1]) for rows, _ in HOLES])
def test_the_row_without_a_text_is_named(rows, message, kind, write, tokenizer, tmp_path, capsys):
    dataset = Dataset.from_list(rows)
    if "parquet" in kind:
        dataset.to_parquet(tmp_path / "data.parquet")
        stream = {"dataset_streaming": True, "max_steps": 3} if "streamed" in kind else {}
        line = refusal(write(tmp_path / "data.parquet", per_device_train_batch_size=1, **stream), capsys)
    else:
        with pytest.raises(RowError) as caught:
            trained_ids(dataset, tokenizer, tmp_path, stream="streamed" in kind)
        line = str(caught.value)
    assert "Cannot train on row 1 of the train set, counted from 0: " in line
    assert message in line
    assert "Correct the row, or remove it." in line
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("column", ["text", "content", "role"])
def test_a_value_of_another_type_among_texts_is_named(column, write, tmp_path, capsys):
    good, bad = ({"text": value} if column == "text" else {"messages": [{**CHAT[0][0], column: value}]} for value in ("a", 7))
    line = refusal(write([good, bad]), capsys)
    assert f"Cannot train on {tmp_path}/data.jsonl, line 2: " in line
    arrow = Dataset.from_list([{**good, "other": [1]}]).select_columns(list(good))
    assert arrange(arrow, "the train set", "text") is arrow  # a whole one, of which no row is read


def test_a_first_row_without_a_text_is_named(tokenizer, tmp_path):
    for rows in ([{"messages": None}, {"messages": CHAT[0]}], [{"text": None}, {"text": "a"}]):
        with pytest.raises(RowError, match="row 0 of the train set"):
            trained_ids(rows, tokenizer, tmp_path)


def test_the_line_of_a_local_file_is_named_in_any_layout(write, tmp_path, capsys):
    rows = [{"conversations": each} for each in SHAREGPT]
    line = refusal(write([*rows, {"conversations": [{"from": "narrator", "value": "a"}]}]), capsys)
    assert f"Cannot train on {tmp_path}/data.jsonl, line 5: 'conversations' has a message from \"narrator\"" in line
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(CHAT[0])], ["hi"]])
    line = refusal(write(tmp_path / "data.csv"), capsys)
    assert f"{tmp_path}/data.csv, line 3: 'messages' is \"hi\", not messages" in line


def test_messages_as_json_text_in_csv_and_parquet(write, expected, strict, tmp_path):
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(each)] for each in CHAT)])
    Dataset.from_list([{"messages": json.dumps(each)} for each in CHAT]).to_parquet(tmp_path / "data.parquet")
    for name in ("data.csv", "data.parquet"):
        for stream in ({}, {"dataset_streaming": True, "max_steps": 1}):
            train, _ = Recipe.read(write(tmp_path / name, **stream)).load_datasets()
            assert trained_ids(train, strict, tmp_path / "out") == expected


# Rendering


def render(tokenizer, rows, template, **columns):
    check = RenderedRow(tokenizer, template, "the train set")
    return [check({"messages": row, **columns}, i) for i, row in enumerate(rows)]


LOST = {
    "unknown role": [{"role": "human", "content": "you"}, CHAT[0][1]],  # which the template's own prompt holds
    "later": [*CHAT[0], {"role": "critic", "content": "no"}],
}


@pytest.mark.parametrize("name", LOST)
def test_a_message_that_the_template_leaves_out_is_an_error(name, tokenizer):
    with pytest.raises(RowError, match="row 1 of the train set, counted from 0: the chat template leaves out"):
        render(tokenizer, [CHAT[0], LOST[name]], STRICT)


THINKING = (
    "{% for m in messages %}{% set c = m.content %}{% if not loop.last and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}{{ c | trim + '\\n' }}{% endfor %}"
)
KEPT = {
    "white space": ([{"role": "user", "content": "  a\n b "}], THINKING),
    "thinking": ([{"role": "assistant", "content": "<think>\nhm\n</think>\n\nso"}, *CHAT[0]], THINKING),
    "only thinking": ([{"role": "assistant", "content": "<think>hm</think>"}, *CHAT[0]], THINKING),
    "blank": ([{"role": "system", "content": " "}, *CHAT[0]], STRICT.replace("'system', ", "")),
    "as JSON": ([{"role": "tool", "content": 'a "b"\nc'}], "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"),
    "moved": ([{"role": "system", "content": "s"}, *CHAT[0]],
              "{% for m in messages[1:] %}{{ m.content }}{% endfor %}{{ messages[0].content }}"),
    "tool call": ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
                  "{% for m in messages %}{{ m.content or m.tool_calls[0].name }}{% endfor %}"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_templates_may_do_to_a_message(name, tokenizer):
    messages, template = KEPT[name]
    assert render(tokenizer, [messages], template) == [None]


PARTS = [{"role": "user", "content": [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]}]
SPELLED = {
    "as Python does": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
    "trimmed": "{% for m in messages %}{{ m.role + m.content | trim }}{% endfor %}",
    "as JSON": "{% for m in messages %}{{ m.content if m.content is string else m.content | tojson }}{% endfor %}",
}


@pytest.mark.parametrize("name", SPELLED)
def test_parts_of_content_that_the_template_writes_as_they_are_are_refused(name, tokenizer):
    with pytest.raises(RowError, match=r"row 1 of the train set, .*: its content is a list of parts, which the chat template"):
        render(tokenizer, [CHAT[0], PARTS], SPELLED[name])
    reads = "{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}"
    assert render(tokenizer, [PARTS], reads) == [None]
    knows = "{{ 'of a tool ' if messages[0].role == 'ipython' }}" + SPELLED["as JSON"]
    for role in ("tool", "ipython"):
        assert render(tokenizer, [[{**PARTS[0], "role": role}]], knows) == [None]


def calling(**arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [*CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}


def tooled(**properties):
    return {"messages": CHAT[0], "tools": [{"name": "f", "parameters": properties, "default": None}]}


WRITES = (
    "{{ tools | tojson if tools }}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
)


@pytest.mark.parametrize("make", [calling, tooled])
def test_nulls_for_keys_of_other_rows_are_refused(make, tokenizer):
    """Arrow gives each row the keys of all: a call of `x` would train `y: null` too."""
    args, rows = BLConfig(use_cpu=True, bf16=False), [make(x=1), make(x=2), make(y="b")]
    message = r"row 0 of the train set, .*: the chat template writes nulls of its calls or tools, for keys that other rows have"
    with pytest.raises(RowError, match=message):
        check_rendering(Dataset.from_list(rows), tokenizer, WRITES, "the train set", args)
    plain = WRITES.replace("tools | tojson", "tools[0].name").replace("calls | tojson", "calls[0].function.name")
    for each, template in ((rows[:2], WRITES), (rows, plain)):
        check_rendering(Dataset.from_list(each), tokenizer, template, "the train set", args)
    apart = concatenate_datasets([Dataset.from_list(each, Dataset.from_list(rows).features) for each in (rows[:2], rows[2:])])
    assert apart.data.column("messages").num_chunks == 2
    assert has_filled(apart)
    features = Features({key: List(Json()) for key in rows[0]})
    check_rendering(Dataset.from_list(rows, features=features), tokenizer, WRITES, "the train set", args)


LOSSY = {
    "beginning": (CHAT[1], "{% for m in messages %}{{ m.content[2:] }}{% endfor %}"),
    "end": (CHAT[1], "{% for m in messages %}{{ m.content[:2] }}{% endfor %}"),
    "part": (PARTS, "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"),
    "letters": (CHAT[1], "{% for m in messages %}{{ m.content | upper }}{% endfor %}"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_message_of_which_the_template_leaves_out_a_part_is_warned_of(name, tokenizer):
    messages, template = LOSSY[name]
    (said,) = render(tokenizer, [messages], template)
    assert "leaves out or changes content with the role 'user' in the train set. Compare the rendered text of row 0" in said


GENERIC = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("key", ["function_call", "tool_calls"])
def test_a_call_that_the_template_leaves_out_is_an_error(key, tokenizer):
    call = {"name": "f", "arguments": "{}"}
    row = [*CHAT[0], {"role": "assistant", "content": None, key: call if key == "function_call" else [{"function": call}]}]
    with pytest.raises(RowError, match=r"row 1 .*: the chat template leaves out the call of .*assistant"):
        render(tokenizer, [CHAT[0], row], "{% for m in messages %}{{ m.role }}{{ m.content or '' }}{% endfor %}")
    row[-1]["content"] = "I call."
    with pytest.raises(RowError, match=r"row 1 .*: the chat template leaves out the call of .*assistant"):
        render(tokenizer, [CHAT[0], row], GENERIC)


@pytest.mark.parametrize("template", [GENERIC, GENERIC + "{{ tools | tojson }}"])
def test_tools_that_the_template_leaves_out_are_an_error(template, tokenizer):
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    check = RenderedRow(tokenizer, template, "the train set")
    if "tools" in template:
        assert check({"messages": CHAT[0], "tools": tools}, 0) is None
        return
    with pytest.raises(RowError, match=r"row 0 .*: the chat template leaves out its `tools`\. Remove the column"):
        check({"messages": CHAT[0], "tools": tools}, 0)
    assert check({"messages": CHAT[0], "tools": []}, 0) is None


def test_arguments_of_the_template_that_it_does_not_read_are_named(tokenizer):
    check = RenderedRow(tokenizer, GENERIC + "{{ 'x' if thinks }}", "the train set")
    row = {"messages": CHAT[0], "chat_template_kwargs": {"thinks": False, "enable_thinking": False}}
    assert check.unread_keys(row) == ["chat_template_kwargs.enable_thinking"]
    with pytest.raises(RowError, match="it has no `chat_template_kwargs`, which other rows have"):
        check({**row, "chat_template_kwargs": None}, 3)


# The role as it is, in capitals, and of a template that knows two of them
CAPITALS = GENERIC.replace("m.role", "m.role | upper")
EITHER = "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content }}{% endfor %}"
VICUNA = "{% for m in messages %}{{ {'human': 'H:', 'gpt': 'G:'}[m.role] or raise_exception('no') }}{{ m.content }}{% endfor %}"
GEMMA = GENERIC.replace("m.role", "'model' if m.role == 'assistant' else m.role")
ROLE_NAMES = [
    (GENERIC, "human", "gpt", "'gpt' and writes it as any other name. Rename it to 'assistant'"),
    (GENERIC, "User", "assistant", "'User' and writes it as any other name. Rename it to 'user'"),
    (CAPITALS, "human", "assistant", "'human'"),
    (CAPITALS, "User", "assistant", None),
    (EITHER, "user", "gpt", None),
    (EITHER, "human", "assistant", "'human' and writes it as any other name. Rename it to 'user'"),
    (VICUNA, "human", "gpt", None),
    (GEMMA, "user", "model", None),
]


@pytest.mark.parametrize(("template", "asks", "says", "message"), ROLE_NAMES, ids=str)
def test_other_names_of_roles_are_refused_where_the_template_does_not_know_them(template, asks, says, message, tokenizer):
    rows = [[{"role": asks, "content": "a"}, {"role": says, "content": "b"}]]
    if message is None:
        assert render(tokenizer, rows, template) == [None]
    else:
        with pytest.raises(RowError, match=f"row 0 .*: the chat template doesn't know the role {message}"):
            render(tokenizer, rows, template)


def test_an_own_role_of_a_generic_template_is_warned_of(tokenizer):
    (said,) = render(tokenizer, [[{"role": "critic", "content": "a"}]], GENERIC)
    assert "doesn't know the role 'critic' in the train set, and writes it as any other name" in said


def test_a_tokenizer_without_a_template_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(RecipeError, match=r"of the train set: the tokenizer has no chat template. Set `chat_template_path`"):
        render(tokenizer, CHAT, None)


def test_a_row_without_an_answer_is_named_where_only_answers_train(tokenizer):
    check = RenderedRow(tokenizer, STRICT, "the train set", assistant_only=True)
    check({"messages": CHAT[0]}, 0)
    with pytest.raises(RowError, match=r"row 1 .*: it has no message of the assistant, and `assistant_only_loss: true`"):
        check({"messages": CHAT[0][:1]}, 1)


def test_a_template_without_marks_is_named_where_only_answers_train(write, tokenizer, tmp_path, capsys):
    (tmp_path / "t.jinja").write_text(STRICT)
    options = {"assistant_only_loss": True, "chat_template_path": str(tmp_path / "t.jinja"), "max_steps": 1}
    argv = write([{"messages": each} for each in CHAT], **options)
    said = refusal(argv, capsys)
    assert said.startswith("error: Cannot use `assistant_only_loss: true`: the chat template does not mark the assistant's")
    assert said.endswith("or split each row into the columns `prompt` and `completion` and remove the key.")
    (tmp_path / "t.jinja").write_text(STRICT + "{%- generation %}{% endgeneration %}")
    Recipe.read(argv).load_datasets()


def test_rows_with_gaps_are_checked_once(monkeypatch):
    checked, check = [], layouts.fault_of
    monkeypatch.setattr(layouts, "fault_of", lambda value, *args: checked.append(value) or check(value, *args))
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    dataset = Dataset.from_list([{"messages": [CHAT[0][0], call]}] * 3)
    for _ in range(3):
        assert arrange(dataset, "the train set", "text") is dataset
    assert len(checked) == 3 + 3  # each row, and the first as often as it tells the layout


@pytest.mark.parametrize("as_mixture", [False, True])
def test_layouts_are_converted_by_the_processes_that_the_recipe_names(as_mixture, write, tmp_path, monkeypatch):
    asked, plain = [], Dataset.map

    def noted(self, *args, num_proc=None, **kwargs):
        asked.append(num_proc)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Dataset, "map", noted)
    file = {"path": "json", "data_files": str(tmp_path / "data.jsonl")}
    changes = {"dataset_name": None, "datasets": [file]} if as_mixture else {}
    argv = write([{"conversations": each} for each in SHAREGPT], dataset_num_proc=2, **changes)
    train, _ = Recipe.read(argv).load_datasets()
    assert train["messages"][0] == CHAT[0]
    assert asked == [2]


def test_results_of_another_version_are_not_taken_from_the_cache(monkeypatch):
    before = Hasher.hash(Cached(arrange))
    assert Hasher.hash(Cached(arrange)) == before
    monkeypatch.setitem(VERSIONS, "bl_trainer", "0")
    assert Hasher.hash(Cached(arrange)) != before


def test_rows_are_rendered_once_and_their_warning_is_kept(strict, tmp_path, monkeypatch):
    said, template = [], STRICT.replace("message['content']", "message['content'][1:]")
    monkeypatch.setattr("bl_trainer.tokens.rendering.warn_once", said.append)
    Dataset.from_list([{"messages": each} for each in CHAT]).to_parquet(tmp_path / "a.parquet")
    args = BLConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for _ in range(2):
        dataset = Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))
        check_rendering(dataset, strict, template, "the train set", args)
        monkeypatch.setattr(RenderedRow, "_render", lambda *_: pytest.fail("rendered again"))
    assert said[0] == said[1]
    monkeypatch.setitem(VERSIONS, "bl_trainer", "0")
    with pytest.raises(pytest.fail.Exception, match="rendered again"):
        check_rendering(dataset, strict, template, "the train set", args)
    assert "Compare the rendered text of row 0 of the train set, counted from 0. This concerns 4 of 4 rows." in said[0]


TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
WORDS = {"user": "zebra", "assistant": "quokka", "system": "walrus", "human": "okapi"}


@pytest.mark.parametrize("roles", [("user", "assistant"), ("system", "user", "assistant"), ("human", "assistant")], ids=str)
def test_messages_of_real_templates_are_left_out_where_their_words_are(roles, tokenizer):
    messages = [{"role": role, "content": WORDS[role]} for role in roles]
    found = set()
    for template in (path.read_text(encoding="utf-8") for path in TEMPLATES):
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as error:  # it takes no such roles, and says so
            with pytest.raises(RowError, match=re.escape(f"by the chat template: {error}")):
                render(tokenizer, [messages], template)
            continue
        is_whole = all(WORDS[role] in text for role in roles)
        of_roles = "doesn't know the role 'human'|" if "human" in roles else ""
        with (
            nullcontext()
            if is_whole and not of_roles
            else pytest.raises(RowError, match=f"{of_roles}the chat template leaves out")
        ):
            render(tokenizer, [messages], template)
        found.add(is_whole)
    assert True in found
    assert False in found


@pytest.mark.parametrize("stream", [False, True], ids=["loaded", "streamed"])
def test_every_row_is_rendered(stream, strict, tmp_path):
    rows = [{"messages": each} for each in [*CHAT * 10, [{"role": "human", "content": "a"}]]]
    with pytest.raises(RowError, match='row 40 of the train set, counted from 0: the chat template leaves out "a"'):
        trained_ids(rows, strict, tmp_path, stream)
    pairs = [{"prompt": each[:1], "completion": each[1:]} for each in [*CHAT, [{"role": "human", "content": "a"}, *CHAT[0]]]]
    with pytest.raises(RowError, match="row 4 of the train set"):
        trained_ids(pairs, strict, tmp_path, stream)


def test_an_evaluation_set_is_treated_alike(strict, tmp_path):
    args = BLConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", eval_strategy="steps", eval_steps=1)
    sets = {name: Dataset.from_list(LAYOUTS[name]) for name in ("sharegpt", "conversations")}
    model, train = make_llama(strict), Dataset.from_list([{"messages": each} for each in CHAT])
    trainer = BLTrainer(model, args, train_dataset=train, eval_dataset=sets, processing_class=strict)
    found = [dataset["input_ids"] for dataset in trainer.eval_dataset.values()]
    assert list(found[0]) == list(found[1]) == list(trainer.train_dataset["input_ids"])
    of_messages, of_sharegpt = trainer.evaluate(train), trainer.evaluate(sets["sharegpt"])
    assert of_messages["eval_nll"] == pytest.approx(of_sharegpt["eval_nll"], abs=1e-6)


@pytest.mark.parametrize("verb", ["train", "diagnose"])
def test_a_lost_message_is_said_before_the_model_loads(verb, write, tmp_path, capsys, monkeypatch):
    (tmp_path / "t.jinja").write_text(STRICT)
    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", lambda *args, **kwargs: pytest.fail("loaded"))
    argv = write([{"messages": [{"role": "human", "content": "a"}]}], chat_template_path=str(tmp_path / "t.jinja"))
    argv += ["--report", str(tmp_path / "report")] if verb == "diagnose" else []
    line = refusal(argv, capsys, verb)
    assert "row 0 of the train set, counted from 0: the chat template leaves out \"a\", a message with the role 'human'" in line
    assert not (tmp_path / "out").exists()


def test_a_row_that_can_not_be_rendered_is_named(write, tmp_path, capsys):
    (tmp_path / "t.jinja").write_text("{{ raise_exception('roles must alternate') if messages | length > 2 }}")
    rows = [{"messages": CHAT[0]}, {"messages": [*CHAT[0], *CHAT[1]]}]
    (tmp_path / "t.jinja").write_text(
        "{% if messages | length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}" + STRICT
    )
    line = refusal(write(rows, chat_template_path=str(tmp_path / "t.jinja")), capsys)
    assert "Cannot render row 1 of the train set, counted from 0, by the chat template: roles must alternate." in line


# Mixtures


def mixture(tmp_path, *parts, **changes):
    entries = []
    for i, rows in enumerate(parts):
        (tmp_path / f"part{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append({"path": "json", "data_files": str(tmp_path / f"part{i}.jsonl")})
    return {"dataset_name": None, "datasets": entries, **changes}


@pytest.mark.parametrize("stream", [{}, {"streaming": True, "max_steps": 1}], ids=["loaded", "streamed"])
def test_chats_of_different_layouts_mix(stream, write, tmp_path):
    tools = [{"messages": [*CHAT[3][:1], {**CHAT[3][1], "name": "x"}]}]
    parts = mixture(tmp_path, LAYOUTS["sharegpt"], LAYOUTS["conversation"], LAYOUTS["ultrachat"], tools, **stream)
    train, _ = Recipe.read(write(**parts)).load_datasets()
    made = [[{key: turn[key] for key in ("role", "content")} for turn in row["messages"]] for row in train]
    assert made == CHAT * 3 + CHAT[3:]


@pytest.mark.parametrize("stream", [{}, {"streaming": True, "max_steps": 1}], ids=["loaded", "streamed"])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ([{"text": "a"}], [{"prompt": "a", "completion": "b"}]),
            "part0.jsonl has text (texts); TMP/part1.jsonl has prompt and",
        ),
        (([{"prompt": "a", "completion": "b"}], [{"messages": CHAT[0]}]), "TMP/part1.jsonl has messages (messages)"),
        (([{"prompt": "a", "completion": "b"}], PAIRS["sharegpt"]), "part1.jsonl has prompt and completion (messages)"),
    ],
    ids=str,
)
def test_data_sets_of_different_kinds_do_not_mix(parts, message, stream, write, tmp_path, capsys):
    line = refusal(write(**mixture(tmp_path, *parts, **stream)), capsys)
    assert "Cannot mix data sets of different layouts: " in line
    assert message.replace("TMP", str(tmp_path)) in line
    assert "Give all of them the same columns." in line
    assert not (tmp_path / "out").exists()


def test_a_mixture_is_what_trl_makes_of_it(write, tmp_path):
    from trl import get_dataset

    rows = [[{"text": f"{part} {i}", "extra": i} for i in range(size)] for part, size in (("a", 10), ("b", 6))]
    changes = mixture(tmp_path, *rows, test_split_size=0.25, eval_strategy="epoch")
    for entry, fraction in zip(changes["datasets"], (0.5, 0.5), strict=True):
        entry |= {"columns": ["text"], "fraction": fraction}
    recipe = Recipe.read(write(**changes))
    ours = recipe.load_datasets()
    from transformers import set_seed

    set_seed(recipe.training.seed)
    theirs = get_dataset(recipe.mixture)
    assert [part[:] for part in ours] == [theirs[split][:] for split in ("train", "test")]


# Files

LINES = b"".join(json.dumps({"text": f"a{i}"}).encode() + b"\n" for i in range(3))
FILES = {
    "data.jsonl.gz": gzip.compress(LINES),
    "data.json.gz": gzip.compress(json.dumps([{"text": f"a{i}"} for i in range(3)]).encode()),
    "data.jsonl.bz2": bz2.compress(LINES),
    "data.jsonl.xz": lzma.compress(LINES),
    "data.csv.gz": gzip.compress(b"text\na0\na1\na2\n"),
    "data.txt.xz": lzma.compress(b"a0\na1\na2\n"),
    "da[t]a*?.jsonl": LINES,
    "a*?.jsonl.gz": gzip.compress(LINES),
}


@pytest.mark.parametrize("stream", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("name", FILES)
def test_compressed_files_and_names_with_glob_characters(name, stream, write, tmp_path):
    folder = tmp_path / "f[1]"
    folder.mkdir()
    (folder / name).write_bytes(FILES[name])
    format = {"csv": "csv", "txt": "text"}.get(name.split(".")[1], "json")
    on = {"max_steps": 1, "dataset_streaming": True} if stream else {}
    mixed = {"max_steps": 1, "streaming": True} if stream else {}
    entries = [
        {"path": format, "data_files": str(folder / name)},
        {"path": format, "data_files": {"train": [str(folder / name)]}},
        {"path": str(folder / name)},
        {"path": str(folder)},
    ]
    sources = [{"dataset_name": str(source), **on} for source in (folder / name, folder)]
    for source in [*sources, *({"dataset_name": None, "datasets": [entry], **mixed} for entry in entries)]:
        train, _ = Recipe.read(write(**source)).load_datasets()
        assert [row["text"] for row in train] == ["a0", "a1", "a2"]


def test_faults_in_compressed_files(write, tmp_path, capsys):
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(LINES + b"{\n"))
    assert "data.jsonl.gz, line 4: Expecting property name" in refusal(write(tmp_path / "data.jsonl.gz"), capsys)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINES)[:-12])
    assert "cut.jsonl.gz: the compressed file is truncated or damaged" in refusal(write(tmp_path / "cut.jsonl.gz"), capsys)
    (tmp_path / "a[0-9].jsonl.gz").write_bytes(gzip.compress(LINES))
    if Version(version("datasets")) >= Version("5"):  # which takes it for an address
        line = refusal(write(tmp_path / "a[0-9].jsonl.gz"), capsys)
        assert "a[0-9].jsonl.gz is compressed, and its name holds brackets. Rename or decompress it" in line
    (tmp_path / "plain.jsonl.gz").write_bytes(LINES)
    line = refusal(write(tmp_path / "plain.jsonl.gz"), capsys)
    assert "plain.jsonl.gz: it is not compressed, as .gz says. Rename it to plain.jsonl" in line
    line = refusal(write(dataset_name="data/none.jsonl"), capsys)
    assert f"there is no such file or folder in {Path.cwd()}" in line
    (tmp_path / "none.jsonl.zip").write_bytes(b"")
    assert "'.zip' is none of .jsonl, .json, .parquet, .csv, .txt" in refusal(write(tmp_path / "none.jsonl.zip"), capsys)


def test_zstandard_is_asked_for(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "data.jsonl.zst").write_bytes(bytes.fromhex("28b52ffd") + b"x")
    assert "data.jsonl.zst: it is compressed. Run `pip install zstandard`." in refusal(
        write(tmp_path / "data.jsonl.zst"), capsys
    )


def test_the_folder_that_one_is_in(write, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(LINES)
    monkeypatch.chdir(tmp_path / "data")
    for source in ({"dataset_name": "."}, {"dataset_name": None, "datasets": [{"path": "."}]}, {"dataset_name": "../data/."}):
        train, _ = Recipe.read(write(**source)).load_datasets()
        assert len(train) == 3


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["train", "validation"], "Write `dataset_test_split: validation`, or `eval_strategy: no`"),
        (["train", "extra", "dev"], "Write `dataset_test_split: dev`"),
        (["train"], "Write `eval_strategy: no`, or `test_split_size` for a mixture."),
    ],
    ids=str,
)
def test_a_split_is_advised_that_is_not_trained_on(names, advice, write, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / "data" / f"{name}-00000-of-00001.jsonl").write_bytes(LINES)
    (tmp_path / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {name}\n    path: {name}-*\n" for name in names)
        + "---\n"
    )
    line = refusal(write(tmp_path / "data", eval_strategy="epoch"), capsys)
    assert "no split 'test'" in line
    assert advice in line


# What isn't installed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "nosuch"}, "Cannot report to `report_to: nosuch`: it is unknown."),
        ({"report_to": "tensorbord"}, "it is unknown. Did you mean 'tensorboard'? Write one of "),
        ({"report_to": "wandb"}, "Cannot report to `report_to: wandb`: wandb is not installed. "),
        ({"report_to": "wandb"}, "installed. Run `pip install wandb`, or set `report_to: none`."),
        ({"attn_implementation": "flash_attention_2"}, "Cannot use `attn_implementation: flash_attention_2`: "),
        ({"model_init_kwargs": {"attn_implementation": "nosuch"}}, "Cannot use `attn_implementation: nosuch`: it is unknown."),
        (
            {"attn_implementation": "flash_attention_9"},
            "`attn_implementation: flash_attention_9`: it is unknown. Did you mean 'flash_attention_",
        ),
        ({"attn_implementation": "flash_attention_9"}, "sdpa, or a kernel's name on the Hub, `OWNER/NAME`."),
        ({"attn_implementation": "no/such"}, "Cannot use `attn_implementation: no/such`: "),
        ({"push_to_hub": True}, "Cannot push to the Hub: there is no token. Run `hf auth login`, or set HF_TOKEN."),
    ],
    ids=str,
)
def test_what_is_missing_is_said_before_data_and_model_load(changes, message, write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bl_trainer.recipe.rules.find_spec", lambda name: None)
    monkeypatch.setattr("bl_trainer.recipe.checks.get_token", lambda: None)
    monkeypatch.setattr("bl_trainer.recipe.checks.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Recipe, "load_datasets", lambda self: pytest.fail("loaded"))
    assert message in refusal(write([{"text": "a"}], **changes), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("offline", [True, False], ids=["by a variable", "without a network"])
def test_a_model_that_is_nowhere_is_said_soon_where_there_is_no_hub(offline, write, tmp_path, capsys, monkeypatch):
    """The libraries would ask for half a minute, with a line for each time."""
    asked = []

    def head(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr("bl_trainer._util.hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("bl_trainer._util.hub.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr("bl_trainer._util.hub.PAUSE", 0)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *args, **kwargs: pytest.fail("asked"))
    said = refusal(write([{"text": "a"}], model_name_or_path="no/such"), capsys)
    why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} can't be reached"
    assert said == (
        "error: `model_name_or_path: no/such` is not a folder here, and has no configuration that can be loaded: it is not in "
        f"the cache, and {why}. Correct the name, or download the model."
    )
    assert len(asked) == (0 if offline else 2)
    for options in (
        {"chat_template_path": "no/such"},
        {"model_name_or_path": "no/such", "attn_implementation": "flex_attention"},
    ):
        assert "it is not in the cache, and " in refusal(write([{"text": "a"}], **options), capsys)


def test_data_that_are_nowhere_are_named(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    where = "it is not in the cache, and HF_HUB_OFFLINE is set. Correct the name, or download the data set."
    assert refusal(write(dataset_name="no/such"), capsys) == f"error: Cannot load `dataset_name: no/such`: {where}"
    said = refusal(write(dataset_name=None, datasets=[{"path": "no/such"}]), capsys)
    assert said == f"error: Cannot load `datasets` (no/such): {where}"
    (tmp_path / "cache/some___data/default/0.0.0/hash").mkdir(parents=True)
    assert why_no_data("some/data") is None


def test_what_is_in_the_cache_is_taken_from_there(tmp_path, monkeypatch):
    monkeypatch.setattr("bl_trainer._util.hub.try_to_load_from_cache", lambda *args, **kwargs: "path")
    assert why_unavailable("some/model") is None
    monkeypatch.undo()
    assert why_unavailable(str(tmp_path)) is None
    assert why_unavailable("no/such/name") is None  # transformers says what is wrong with it
    monkeypatch.setattr("bl_trainer._util.hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("bl_trainer._util.hub.get_session", lambda: SimpleNamespace(head=lambda *args, **kwargs: None))
    assert why_unavailable("some/model") is None
