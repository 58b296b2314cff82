"""Weights within a row: of messages, and of tokens beside `input_ids`."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset, IterableDataset

from bl_trainer import BLConfig, BLTrainer
from bl_trainer.errors import RecipeError
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.tokens.layouts import arrange
from bl_trainer.tokens.spans import SpanWeights, Weighing, message_weights, weighing_of
from conftest import make_double, write_recipe
from test_trainer import first_gradient
from ways import build, relative_difference

ROUNDING = {"auto": 1e-9, "trl": 1e-6}  # of the heads, in float64; TRL's adds some of it in float32
# Writes a thought before the last answer only, as Qwen3's does, so that the messages before a row's end render otherwise
THINKS = (
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else 'a:' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ 'hm' }}{% endif %}"
    "{{ message['content'].strip() + '<end>' }}{% if not loop.last %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def turn(role, content, *weight):
    return {"role": role, "content": content, **dict(zip(["weight"], weight, strict=False))}


def chats(count=12):
    """Two turns each, their answers weighing 2, 0.5, 0, or nothing said; the second always with a key."""
    weights = (2.0, 0.5, 0.0, None)
    return [
        {
            "messages": [
                turn("user", "abc"[i % 3] + " q", None),
                turn("assistant", f"answer {i}", weights[i % 4]),
                turn("user", "and then?", None),
                turn("assistant", f"more of it {i % 5}", weights[(i + i // 4 + 1) % 4]),
            ],
            "objective_weight": 1 + i % 2,
        }
        for i in range(count)
    ]


def hand_weighted(tokenizer, rows):
    """Gradient of the sum of w (1 - p) over the assistants' tokens, on full logits, divided by those with a weight above 0."""
    model, total, count = make_double(tokenizer), 0.0, 0
    for row in rows:
        ids, weights = [], []
        for message in row["messages"]:
            text = ("<user>" if message["role"] == "user" else "") + message["content"] + "<end>"
            own = tokenizer(text)["input_ids"]
            weight = 1.0 if message.get("weight") is None else message["weight"]
            ids += own
            weights += [weight if message["role"] == "assistant" else 0.0] * len(own)
        ids, weights = torch.tensor(ids), torch.tensor(weights, dtype=torch.float64)[1:]
        p = model(ids[None]).logits[0, :-1].softmax(-1).gather(1, ids[1:, None])[:, 0]
        total = total + (row.get("objective_weight", 1) * weights * (1 - p)).sum()
        count += int((weights > 0).sum())
    (total / count).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


CUTS = [
    {"per_device_train_batch_size": 12},
    {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "padding_free": True},
    {"per_device_train_batch_size": 12, "packing": True, "max_length": 256},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12, "packing": True, "max_length": 128},
]


@pytest.mark.parametrize("head", ["auto", "trl"])
@pytest.mark.parametrize("options", CUTS, ids=str)
def test_messages_weigh_as_by_hand(options, head, tokenizer, tmp_path):
    rows = chats()
    given = {"objective": "neg_p", "assistant_only_loss": True, "loss_head": head, **options}
    found = first_gradient(tokenizer, Dataset.from_list(rows), tmp_path, **given)
    assert relative_difference(found, hand_weighted(tokenizer, rows)) < ROUNDING[head]


def test_the_hand_weighted_loss_tells_them_apart(tokenizer):
    rows, weighted = chats(), hand_weighted(tokenizer, chats())
    for key in ("weight", "objective_weight"):
        plain = [{k: v for k, v in row.items() if k != key} for row in copy.deepcopy(rows)]
        for row in plain:
            row["messages"] = [{k: v for k, v in message.items() if k != key} for message in row["messages"]]
        assert relative_difference(hand_weighted(tokenizer, plain), weighted) > 0.05, key


def as_ids(tokenizer, rows):
    """The same rows as token ids, with their labels and a weight for each token."""
    made = []
    for row in rows:
        ids, labels, weights = [], [], []
        for message in row["messages"]:
            own = tokenizer(("<user>" if message["role"] == "user" else "") + message["content"] + "<end>")["input_ids"]
            weight = 1.0 if message.get("weight") is None else float(message["weight"])
            ids += own
            labels += own if message["role"] == "assistant" else [-100] * len(own)
            weights += [weight] * len(own)
        made.append({"input_ids": ids, "labels": labels, "token_weight": weights, "objective_weight": row["objective_weight"]})
    return made


def folded(row):
    """A row with `token_weight` as one without."""
    weights = row["token_weight"]
    labels = [label if weight else -100 for label, weight in zip(row["labels"], weights, strict=True)]
    own = [weight * row["objective_weight"] for weight in weights]
    return {"input_ids": row["input_ids"], "labels": labels, "objective_weight": own}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 30},
        {"max_length": 30, "truncation_mode": "keep_end"},
        {"max_length": 30, "packing": True},
        {"max_length": 30, "packing": True, "packing_strategy": "wrapped"},
    ],
    ids=str,
)
def test_every_way_to_give_weights_gives_the_same_rows(options, tokenizer, tmp_path):
    rows = chats()
    tokens = as_ids(tokenizer, rows)
    ways = {
        "by hand": Dataset.from_list([folded(row) for row in tokens]),
        "tokens": Dataset.from_list(tokens),
        "messages": Dataset.from_list(rows),
        "stream": Dataset.from_list(rows).to_iterable_dataset(),
        "stream of tokens": Dataset.from_list(tokens).to_iterable_dataset(),
    }
    found = {}
    for name, data in ways.items():
        asked = {"assistant_only_loss": True} if name in ("messages", "stream") else {}
        own = build(BLTrainer, tokenizer, data, tmp_path, max_steps=1, **asked, **options).train_dataset
        columns = ("input_ids", "labels", "objective_weight")
        found[name] = [{column: row[column] for column in columns} for row in own]
        assert "token_weight" not in next(iter(own))
    expected = found.pop("by hand")
    if not options:
        expected = [folded(row) for row in tokens]
    for name, each in found.items():
        assert each == expected, name


def test_messages_of_weight_0_are_masked_alone(tokenizer, tmp_path):
    """Which leaves the loss, and the columns, as they are without weights."""
    rows = [{"messages": [turn("user", "a"), turn("assistant", "b", i % 2), turn("assistant", "c", 1)]} for i in range(4)]
    data = Dataset.from_list(rows)
    for given in (data, data.to_iterable_dataset()):
        own = build(BLTrainer, tokenizer, given, tmp_path, max_steps=1, assistant_only_loss=True).train_dataset
        labels = [row["labels"] for row in own]
        b, c, end = tokenizer("bc<end>")["input_ids"]
        assert labels == [[-100] * 3 + ([b, end] if i % 2 else [-100] * 2) + [c, end] for i in range(4)]
    assert weighing_of(data) == Weighing(masks=True)
    own = build(BLTrainer, tokenizer, data, tmp_path, max_steps=1, assistant_only_loss=True).train_dataset
    assert "objective_weight" not in own.column_names


def test_prompts_and_completions_have_weights_too(tokenizer, tmp_path):
    row = {
        "prompt": [turn("user", "a")],
        "completion": [turn("assistant", "b", 0.5), turn("user", "c", 0), turn("assistant", "d")],
    }
    (own,) = build(BLTrainer, tokenizer, Dataset.from_list([row]), tmp_path, max_steps=1).train_dataset
    assert own["objective_weight"] == [1.0] * 3 + [0.5] * 2 + [0.0] * 3 + [1.0] * 2
    assert [label != -100 for label in own["labels"]] == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 2


def test_rows_of_other_layouts_keep_their_weights(tokenizer, tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 2}]
    plain = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    data = Dataset.from_list([{"conversations": plain}, {"conversations": turns}])
    assert weighing_of(arrange(data, "the train set", "text")) == Weighing(multiplies=True)
    assert not any(weighing_of(arrange(data.select([0]), "the train set", "text")))
    own = build(BLTrainer, tokenizer, data, tmp_path, max_steps=1).train_dataset
    assert own["objective_weight"][:] == [[1.0] * 5, [1.0] * 3 + [2.0] * 2]


def test_evaluation_weighs_by_its_own_messages(tokenizer, tmp_path):
    def rows(weight):
        return Dataset.from_list([{"messages": [turn("user", "a"), turn("assistant", f"b {i}", weight)]} for i in range(4)])

    for weight, factor in ((1, 1), (2, 2), (0.25, 0.25)):
        options = {"objective": "neg_p", "assistant_only_loss": True, "eval_data": rows(weight)}
        metrics = build(BLTrainer, tokenizer, rows(3), tmp_path, **options).evaluate()
        assert metrics["eval_loss"] == pytest.approx(factor * (1 - metrics["eval_target_prob"]), rel=1e-5)


class Template:
    """A tokenizer whose template writes reasoning before the last answer, and an end that the last message lacks."""

    @pytest.fixture
    def thinking(self, tokenizer):
        made = copy.deepcopy(tokenizer)
        made.chat_template = THINKS
        return made


class TestWhichTokensAreAMessages(Template):
    def weights(self, tokenizer, messages, chat_template=None, cut=slice(None)):
        text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=chat_template)
        ids = tokenizer(text)["input_ids"][cut]
        weights = [message.get("weight", 1) for message in messages]
        return message_weights(tokenizer, chat_template, {"messages": messages}, weights, ids)

    def test_of_a_template_that_renders_the_last_answer_otherwise(self, thinking):
        messages = [turn("user", "q"), turn("assistant", "one ", 0), turn("user", "r"), turn("assistant", "two", 0.5)]
        #        <user>q<end>   _a:one<end>   _<user>r<end>   _a:hmtwo<end>
        expected = [1] * 3 + [0] * 7 + [1] * 4 + [0.5] * 9
        assert self.weights(thinking, messages) == expected
        assert self.weights(thinking, messages, cut=slice(9)) == expected[:9]
        assert self.weights(thinking, messages, cut=slice(-9, None)) == expected[-9:]

    def test_a_first_message_that_weighs(self, tokenizer):
        messages = [turn("assistant", "ab", 3), turn("user", "c"), turn("assistant", "d", 2)]
        assert self.weights(tokenizer, messages) == [3] * 3 + [1] * 3 + [2] * 2

    def test_messages_that_call_tools_where_texts_continue_one_another(self, tokenizer):
        template = (
            "{% for m in messages %}{{ m['role'][:1] + (m['content'] or '') }}"
            "{% if m['tool_calls'] %}{{ m['tool_calls'][0]['function']['name'] }}{% endif %}{{ '<end>' }}{% endfor %}"
        )
        call = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
        }
        messages = [turn("user", "q"), {**call, "weight": 0.5}, turn("tool", "1", 0), turn("assistant", "b")]
        assert self.weights(tokenizer, messages, template) == [1] * 3 + [0.5] * 3 + [0] * 3 + [1] * 3

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}{{ loop.length ~ m['content'] }}{% endfor %}",  # says how many there are
            "{% for m in messages|reverse %}{{ m['content'] }}{% endfor %}",
            "{{ raise_exception('no') if messages|length < 4 }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        ],
    )
    def test_that_can_not_be_told(self, template, tokenizer, tmp_path):
        messages = [turn("user", "q"), turn("assistant", "x", 0), turn("user", "y"), turn("assistant", "z", 0.5)]
        if "reverse" in template or "raise" in template:
            assert self.weights(tokenizer, messages, template) is None
        made = copy.deepcopy(tokenizer)
        made.chat_template = template
        mark = SpanWeights(made, template, "train", True, False, (False, False))
        with pytest.raises(
            RecipeError, match="Cannot tell which tokens of row 0 of the train set, counted from 0, belong to wh"
        ):
            mark({"messages": messages, "input_ids": [5, 6, 7], "labels": [5, 6, 7], "bl_row": 0})


WRONG = [
    ({"input_ids": [5, 6], "token_weight": [1.0, -1.0]}, "`token_weight` of row 1 of the train set, counted from 0, is -1.0"),
    ({"input_ids": [5, 6], "token_weight": [1.0, math.nan]}, "`token_weight` of row 1 .* is nan: it must be a number, 0 or ab"),
    ({"input_ids": [5, 6], "token_weight": [1.0]}, "Cannot train on row 1 .*: `token_weight` has 1 numbers for 2 tokens. Give"),
    (
        {"input_ids": [5, 6], "token_weight": [1.0, 0.5], "objective_weight": [1.0]},
        "Cannot train on row 1 of the train set, counted from 0: `objective_weight` has 1 numbers for 2 tokens. Give one",
    ),
    (
        {"input_ids": [5, 6], "objective_weight": [1.0, 2.0, 3.0]},
        "Cannot train on row 1 of the train set, counted from 0: `objective_weight` has 3 numbers for 2 tokens. Give one",
    ),
    ({"input_ids": [5, 6], "token_weight": None}, "`token_weight` of row 1 of the train set, counted from 0, is missing"),
    ({"text": "ab", "token_weight": [1.0, 1.0]}, "Cannot use the column `token_weight` of the train set: it has no"),
    ({"input_ids": [5, 6], "token_weights": [1.0, 1.0]}, "The column 'token_weights' of the train set has no effect. Write"),
    ({"messages": [turn("user", "a", -1)]}, "row 1 of .* has a message with `weight: -1`, which must be a number, 0 or above"),
    ({"messages": [turn("user", "a", math.nan)]}, "has a message with `weight: NaN`, which must be a number, 0 or above"),
    ({"messages": [turn("user", "a", 1e40)]}, r"row 1 .* a message with `weight: 1e\+40`, which must be at most 3.4e\+38"),
    ({"input_ids": [5, 6], "token_weight": [1.0, 1e40]}, r"`token_weight` of row 1 .* is 1e\+40: it must be at most 3.4e\+38"),
    ({"messages": [turn("user", "a", "heavy")]}, "has a message with `weight: \"heavy\"`, which must be a number, 0 or above"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_weights_are_named_before_the_model_loads(row, message, tokenizer, tmp_path):
    good = {name: [2.0, 0.0] for name in ("token_weight", "token_weights", "objective_weight")}
    good["messages"] = [turn("user", "a", 1)]
    first = {key: good.get(key, value) for key, value in row.items()}
    if row.get("messages") and isinstance(row["messages"][0]["weight"], str):
        first = {"messages": [turn("user", "a", None)]}
    args = BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(RecipeError, match=message):
        BLTrainer("no-such-model", args, train_dataset=Dataset.from_list([first, row]), processing_class=tokenizer)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"messages": [turn("user", "a", 0.5), turn("assistant", "b", None)]},
            {"assistant_only_loss": True},
            "`weight: 0.5` in row 1 of the train set, counted from 0, has no effect: under `assistant_only_loss: true` a",
        ),
        (
            {"prompt": [turn("user", "a", 2)], "completion": [turn("assistant", "b", None)]},
            {},
            "`weight: 2` in row 1 of the train set, counted from 0, has no effect: under `completion_only_loss: true` a",
        ),
    ],
    ids=["assistant", "completion"],
)
def test_weights_of_what_does_not_train_are_refused(row, options, message, tokenizer, tmp_path):
    fine = copy.deepcopy(row)
    for chat in fine.values():
        for each in chat:
            each["weight"] = 0 if each["role"] == "user" else 1
    args = BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    with pytest.raises(RecipeError, match=message):
        BLTrainer("no-such-model", args, train_dataset=Dataset.from_list([fine, row]), processing_class=tokenizer)
    stream = IterableDataset.from_generator(lambda: iter([fine, row]))
    with pytest.raises(RecipeError, match=message):
        [*build(BLTrainer, tokenizer, stream, tmp_path, max_steps=1, **options).train_dataset]
    build(BLTrainer, tokenizer, Dataset.from_list([fine]), tmp_path, **options)  # 0 and 1 hold


def test_weights_that_come_later_in_a_stream(tokenizer, tmp_path):
    plain, weighted = ({"messages": [turn("user", "a"), turn("assistant", "b", *given)]} for given in ((), (0.5,)))
    stream = IterableDataset.from_generator(lambda: iter([plain, weighted]))
    with pytest.raises(
        RecipeError, match=r"since the first row of the stream has no weights. Write `weight: 1` in a message of"
    ):
        [*build(BLTrainer, tokenizer, stream, tmp_path, max_steps=1).train_dataset]


@pytest.mark.parametrize(
    ("columns", "options", "why"),
    [
        (
            "messages",
            {"formatting_func": str},
            "`weight` of messages needs .*: `formatting_func` renders the examples. Remove the key",
        ),
        ("messages", {"data_collator": dict}, "`weight` of messages needs .*: the `data_collator` is your own. Remove the key"),
        ("messages", {"image": True}, "`weight` of messages needs .*: the data set has images. Remove the key"),
        (
            "token_weight",
            {"data_collator": dict},
            "`token_weight` needs .*: the `data_collator` is your own. Remove the column",
        ),
        (
            "token_weight",
            {"skip": True},
            "`token_weight` needs .*: `skip_prepare_dataset` leaves out what .* Remove the column",
        ),
        (
            "token_weight",
            {"parallel": True},
            "`token_weight` needs .*: context parallelism cuts sequences up. Remove the column",
        ),
    ],
    ids=str,
)
def test_what_would_lose_weights_on_their_way(columns, options, why, tokenizer, tmp_path, monkeypatch):
    row = {"input_ids": [5, 6], "token_weight": [1.0, 0.5]}
    if columns == "messages":
        row = {"messages": [turn("user", "a"), turn("assistant", "b", 0)]}
    keys = {"dataset_kwargs": {"skip_prepare_dataset": True}} if options.pop("skip", False) else {}
    row |= {"image": "no.png"} if options.pop("image", False) else {}
    args = BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **keys)
    if options.pop("parallel", False):
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
        args.pad_to_multiple_of = 4
    data = Dataset.from_list([row])
    with pytest.raises(RecipeError, match=why):
        BLTrainer("no-such-model", args, train_dataset=data, processing_class=tokenizer, **options)


def test_a_file_of_chats_trains_with_its_weights(checkpoint, tmp_path):
    """From JSONL to the first step: only some messages have the key."""
    data = tmp_path / "chats"
    data.mkdir()
    rows = [{"messages": [turn("user", "a"), turn("assistant", "b", *w), turn("assistant", "c")]} for w in ((), (0,), (0.5,))]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_recipe(tmp_path, checkpoint, data, max_steps=1, assistant_only_loss=True)
    recipe = Recipe.read(["--config", str(path)])
    train_set, _ = recipe.load_datasets()
    trainer = BLTrainer(recipe.model.model_name_or_path, recipe.training, train_dataset=train_set)
    assert trainer.train_dataset["objective_weight"][:] == [
        [1.0] * 7,
        [1.0] * 3 + [0.0] * 2 + [1.0] * 2,
        [1.0] * 3 + [0.5] * 2 + [1.0] * 2,
    ]
    assert [sum(label != -100 for label in labels) for labels in trainer.train_dataset["labels"]] == [4, 2, 4]
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
