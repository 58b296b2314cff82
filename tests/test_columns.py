"""Columns that would be lost, or that hold no numbers: each is refused with its row, in a stream as it is read."""

import json
import re

import pytest
from datasets import Dataset, IterableDataset

from bl_trainer import BLConfig, BLTrainer
from bl_trainer.errors import RecipeError
from bl_trainer.tokens.idle import check_labels
from bl_trainer.tokens.labels import check_rows
from bl_trainer.tokens.rendering import check_rendering
from test_guards import GOOD, IDS, TEXT, verb_refuses
from ways import build, train

SKIPS = {"dataset_kwargs": {"skip_prepare_dataset": True}}


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


LATER = {
    "labels": [-100] * 4,
    "completion_mask": [0, 0, 1, 1],
    "assistant_masks": [0, 0, 1, 1],
    "token_weight": [1.0, 0.0, 0.0, 1.0],
    "objective_weight": 0.0,
    "attention_mask": [1, 1, 1, 1],
    "ref_logprobs": [0.0, -1.0, -1.0, -1.0],
    "seq_lengths": [2, 2],
    "position_ids": [0, 1, 0, 1],
}


class TestStreams:
    @pytest.mark.parametrize("column", LATER)
    def test_a_column_that_the_first_row_lacks(self, column):
        message = (
            f"Cannot train on row 2 of the train set, .*: it has the column `{column}`, which the first row .* lacks. Give"
        )
        with pytest.raises(RecipeError, match=message):
            list(check_rows(stream_of([IDS, IDS, {**IDS, column: LATER[column]}]), "train"))

    @pytest.mark.parametrize("column", [each for each in LATER if each not in ("attention_mask", "position_ids")])
    def test_a_column_that_a_later_row_lacks(self, column):
        message = (
            f"Cannot train on row 1 of the train set, .*: it lacks the column `{column}`, which the first row .* has. Give"
        )
        with pytest.raises(RecipeError, match=message):
            list(check_rows(stream_of([{**IDS, column: LATER[column]}, IDS]), "train"))

    @pytest.mark.parametrize("more", [{"objective_weight": 0.0}, {"prompt": "a", "completion": "b"}], ids=str)
    def test_of_texts(self, more):
        message = f"row 1 of the train set, .*: it has the column `{next(iter(more))}`, which the first row of the stream lacks"
        with pytest.raises(RecipeError, match=message):
            list(check_rows(stream_of([TEXT, {**TEXT, **more}]), "train"))
        others = [{**TEXT, "source": "b", "tools": "[]"}, {**TEXT, **dict.fromkeys(more)}]
        assert len(list(check_rows(stream_of([TEXT, *others, TEXT]), "train"))) == 4

    @pytest.mark.parametrize(
        ("first", "later", "message"),
        [
            (IDS, GOOD, "row 1 of the train set, .* has the column `labels`"),
            ({**TEXT, "objective_weight": 1.0}, TEXT, "row 1 of the train set, .* lacks the column `objective_weight`"),
        ],
        ids=["more", "less"],
    )
    def test_in_training(self, first, later, message, tokenizer, tmp_path):
        with pytest.raises(RecipeError, match=message):
            train(BLTrainer, tokenizer, stream_of([first, *[later] * 7]), tmp_path)
        assert not (tmp_path / "out").exists()

    def test_in_evaluation(self, tokenizer, tmp_path):
        with pytest.raises(RecipeError, match=r"row 1 of the eval set, .* has the column `labels`"):
            build(BLTrainer, tokenizer, Dataset.from_list([IDS] * 8), tmp_path, eval_data=stream_of([IDS, GOOD])).evaluate()

    def test_that_are_prepared_keep_the_labels_of_each_row(self, tokenizer, tmp_path):
        trainer = build(BLTrainer, tokenizer, stream_of([IDS, GOOD]), tmp_path, **SKIPS)
        assert trainer.data_collator([IDS, GOOD])["labels"].tolist() == [IDS["input_ids"], GOOD["labels"]]


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, SKIPS], ids=str)
def test_positions_of_examples_that_a_user_has_packed(options, tokenizer, tmp_path):
    row = {**GOOD, "position_ids": [0, 1, 0, 1]}
    for data in (Dataset.from_list([row] * 8), stream_of([row] * 8)):
        with pytest.raises(
            RecipeError, match="The column `position_ids` of the train set has no effect: the examples of a row"
        ):
            build(BLTrainer, tokenizer, data, tmp_path, **options)


NO_NUMBERS = [
    ({"input_ids": [5.5, 6.5, 7.5]}, "`input_ids` has 5.5, which is not a token id. Correct"),
    ({"input_ids": "[5,6,7]"}, r"`input_ids` is \"\[5,6,7\]\", not a list. Give a token id for each"),
    ({"input_ids": 5}, "`input_ids` is 5, not a list"),
    ({"input_ids": ["5", "6"]}, '`input_ids` has "5", which is not a token id'),
    ({"input_ids": [5, 6, 7], "labels": [None, 6, 7]}, "`labels` has null, which is not a token id"),
    ({"input_ids": [5, 6, 7], "labels": [5.0, 6.0, 7.0]}, "`labels` has 5.0, which is not a token id"),
    ({"input_ids": [5, 6, 7], "assistant_masks": [None, 1, 1]}, "`assistant_masks` has null, which is not a number"),
    ({"input_ids": [5, 6, 7], "attention_mask": [1, None, 1]}, "`attention_mask` has null, which is not a number"),
]


@pytest.mark.parametrize(("row", "message"), NO_NUMBERS, ids=str)
def test_what_is_no_number(row, message):
    message = "Cannot train on row {} of the train set, counted from 0: " + message
    for data in (Dataset.from_list([row]), stream_of([row])):
        with pytest.raises(RecipeError, match=message.format(0)):
            check_labels({"train": data}, None)  # before a model loads
    fine = {"input_ids": [5, 6, 7], **{key: [1, 1, 1] for key in row if key != "input_ids"}}
    with pytest.raises(RecipeError, match=message.format(1)):
        list(check_rows(stream_of([fine, row]), "train"))


def test_what_is_no_number_among_thousands():
    rows = Dataset.from_list([GOOD] * 2500 + [{**GOOD, "labels": [None, 6, 7, 8]}])
    with pytest.raises(RecipeError, match="row 2500 of the train set, counted from 0: `labels` has null"):
        check_rows(rows, "train")


@pytest.mark.parametrize(
    ("row", "message"), [(NO_NUMBERS[0][0], "`input_ids` has 5.5"), (NO_NUMBERS[4][0], "`labels` has null")]
)
def test_what_is_no_number_in_the_verb(row, message, checkpoint, tmp_path, capsys):
    verb_refuses(tmp_path, checkpoint, [row] * 3, f"Cannot train on row 0 of the train set, counted from 0: {message}", capsys)


def test_numbers_of_other_types_are_taken():
    masks = [{"input_ids": [5, 6], "completion_mask": mask} for mask in ([True, False], [1.0, 0.0], [1, 0])]
    for row in masks:
        for data in (Dataset.from_list([row]), stream_of([row])):
            assert json.loads(json.dumps(list(check_rows(data, "train")))) == [row]
    for kind in ("numpy", "torch"):
        formatted = Dataset.from_list([GOOD]).with_format(kind)
        assert len(list(check_rows(formatted, "train"))) == len(list(check_rows(formatted.to_iterable_dataset(), "train"))) == 1


READS = "{% for m in messages %}{{ m.role }}:{% if m.prefix %}#{% endif %}{{ m.content }}\n{% endfor %}"
DUMPS = "{% for m in messages %}{{ m.content }}{{ m | tojson }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "extra", "unread"),
    [
        (READS, {"toxic": False}, ["toxic"]),
        (READS, {"score": 0.5, "turn_id": 3, "name": "a", "weight": 0}, ["score", "turn_id"]),
        (READS, {"prefix": False, "tags": ["a"], "source": "b", "train": True}, []),
        (DUMPS, {"score": 0.5}, []),
    ],
    ids=str,
)
@pytest.mark.parametrize("streamed", [False, True], ids=["set", "stream"])
def test_keys_of_messages_that_the_template_does_not_read(template, extra, unread, streamed, tokenizer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.tokens.rendering.warn_once", said.append)
    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
    rows = [{"messages": chat}, *[{"messages": [chat[0], {**chat[1], **extra}]}] * 2]
    args = BLConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    data = check_rendering(stream_of(rows) if streamed else Dataset.from_list(rows), tokenizer, template, "the train set", args)
    assert len(list(data)) == 3
    keys = [re.search("The key `(.*)` of messages in the train set has no effect: the chat template", each)[1] for each in said]
    assert keys == unread


UNWEIGHED = {
    "tokens": [GOOD | {"token_weight": [1.0, 0.0, 0.0, 0.0]}, GOOD | {"token_weight": [1.0] * 4}],
    "messages": [
        {"messages": [{"role": role, "content": "ab", "weight": weight} for role in ("user", "assistant")]} for weight in (0, 1)
    ],
}


@pytest.mark.parametrize("kind", UNWEIGHED)
def test_rows_that_do_not_train_by_their_weights(kind, tokenizer, tmp_path, monkeypatch):
    said = []
    for room in ("labels", "streams"):
        monkeypatch.setattr(f"bl_trainer.tokens.{room}.warn_once", said.append)
    masked, full = UNWEIGHED[kind]
    why = "do not train: their weights are 0, or `max_length: 64` cuts their targets off, or they have none. Raise"
    build(BLTrainer, tokenizer, Dataset.from_list([masked, full] * 4), tmp_path, max_length=64)
    assert said.pop().startswith(f"4 of 8 rows of the train set {why}")
    options = {"max_length": 64, "per_device_train_batch_size": 4, "max_steps": 1, "shuffle_dataset": False}
    train(BLTrainer, tokenizer, stream_of([full, masked] * 4), tmp_path, **options)
    assert re.search(f"rows that were read of the train stream {why}", said.pop())
    assert not said
    with pytest.raises(
        RecipeError, match=r"no row has a target\. Every label is -100, has the weight 0, or is that of a row's"
    ):
        build(BLTrainer, tokenizer, Dataset.from_list([masked] * 8), tmp_path, max_length=64)
