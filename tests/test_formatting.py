"""`formatting_func`: its texts train, whatever columns stand beside them. And texts that hold what the tokenizer adds."""

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from bl_trainer import BLConfig, BLTrainer
from bl_trainer.errors import RecipeError
from bl_trainer.tokens.formatting import formatted
from bl_trainer.tokens.prepare import Rows
from conftest import make_tokenizer
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


def test_its_texts_are_cached_for_every_trainer_of_the_set(tokenizer, tmp_path):
    """Also for one with another folder, or another process."""
    data = Dataset.from_list([{"a": "x"}] * 2)

    def fingerprint(folder):
        rows = Rows(data, tokenizer, BLConfig(str(folder), use_cpu=True, bf16=False), False, str, "train")
        return formatted(rows).dataset._fingerprint

    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "other")


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


def test_a_start_token_that_text_and_tokenizer_give_is_told_of(tmp_path, monkeypatch):
    """As a chat template's output has it that a user trains as text."""
    said, tokenizer = [], make_tokenizer()
    monkeypatch.setattr("bl_trainer.tokens.vocabulary.warn_once", said.append)
    tokenizer.bos_token = "<user>"
    start = [("<user>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<user> $A", special_tokens=start)
    sets = {"train": [{"text": "<user>abc<end>"}] * 2, "eval": [{"text": "abc<end>"}] * 2}
    train, evaluated = map(Dataset.from_list, sets.values())
    trainer = build(BLTrainer, tokenizer, train, tmp_path, eval_data=evaluated)
    assert trainer.train_dataset[0]["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    assert [line.partition(":")[0] for line in said] == ["Rows of the train set begin with <user> twice"]
