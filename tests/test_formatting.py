"""`formatting_func`: its texts train, whatever columns stand beside them."""

import pytest
from datasets import Dataset

from bl_trainer import BLTrainer
from bl_trainer.errors import RecipeError
from ways import build

CHAT = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
# Columns that TRL trains in place of the text
ROWS = {
    "text": ({"text": "other"}, {}),
    "a text by another name": ({"body": "other"}, {"dataset_text_field": "body"}),
    "messages": ({"messages": CHAT}, {}),
    "sharegpt": ({"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]}, {}),
    "pair": ({"prompt": "ask", "completion": "say"}, {"completion_only_loss": False}),
    "half of a pair": ({"prompt": "ask", "response": "say"}, {}),
    "packed": ({"messages": CHAT}, {"packing": True, "max_length": 64}),
}


def texts(tokenizer, dataset):
    return {tokenizer.decode(row["labels"]).replace(" ", "") for row in dataset}


@pytest.mark.parametrize(("kind", "streamed"), [*((kind, False) for kind in ROWS), ("messages", True)])
def test_the_texts_that_it_makes_train(kind, streamed, tokenizer, tmp_path):
    row, options = ROWS[kind]
    data = Dataset.from_list([row] * 2)
    data = data.to_iterable_dataset() if streamed else data
    made = {"formatting_func": lambda example: f"made of {len(example)}"}
    trainer = build(BLTrainer, tokenizer, data, tmp_path, eval_data=data, made=made, **options)
    expected = f"madeof{len(row)}<end>"
    found = texts(tokenizer, trainer.train_dataset) | texts(tokenizer, trainer.eval_dataset)
    assert found == ({expected * 2} if kind == "packed" else {expected})


def test_what_is_no_text_is_named(tokenizer, tmp_path):
    data = Dataset.from_list([{"a": "x"}, {"a": "y"}])
    made = {"formatting_func": lambda example: ["x"] if example["a"] == "y" else "x"}
    with pytest.raises(
        RecipeError, match=r'row 1 of the train set, counted from 0: `formatting_func` gives \["x"\], not a text'
    ):
        build(BLTrainer, tokenizer, data, tmp_path, made=made)


def test_its_texts_have_no_assistant(tokenizer, tmp_path):
    data, made = Dataset.from_list([{"messages": CHAT}] * 2), {"formatting_func": str}
    with pytest.raises(RecipeError, match="`assistant_only_loss: true` has no effect on the train set: `formatting_func`"):
        build(BLTrainer, tokenizer, data, tmp_path, made=made, assistant_only_loss=True)
