"""Runs that could not learn, and labels, keys and columns that would have no effect: refused before training, in words."""

import json
import math
import re

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import BatchSampler
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DogeConfig,
    DogeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)
from trl import SFTTrainer

from bl_trainer import BLConfig, BLTrainer, Threshold
from bl_trainer.cli import main
from bl_trainer.errors import RecipeError
from bl_trainer.tokens.idle import check_labels
from bl_trainer.tokens.labels import _count_blank, check_ids, check_rows
from bl_trainer.tokens.layouts import arrange
from bl_trainer.training.guards import FEW, refuse_dropped, refuse_dropped_sets, warn_of_few, warn_of_idle
from conftest import make_llama, sizes, write_recipe
from ways import Gradients, build, train, weights

TEXT = {"text": "hello there"}
PAIR = {"prompt": "abc", "completion": "de"}
CHAT = {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "abc"}, {"from": "gpt", "value": "de"}]}
IDS = {"input_ids": [5, 6, 7, 8]}
GOOD = {**IDS, "labels": [-100, 6, 7, 8]}
MASKED = {**IDS, "labels": [-100] * 4}

kinds = pytest.mark.parametrize("streamed", [False, True], ids=["set", "stream"])


def as_data(rows, streamed=False):
    data = Dataset.from_list(rows)
    return data.to_iterable_dataset() if streamed else data


def refused(tokenizer, tmp_path, rows, message, streamed=False, trains=False, **options):
    """A trainer over `rows` isn't built, or doesn't begin to train, says why, and leaves no folder behind."""
    rows = as_data(rows, streamed) if isinstance(rows, list) else rows
    with pytest.raises(ValueError, match=message):
        (train if trains else build)(BLTrainer, tokenizer, rows, tmp_path, **options)
    assert not (tmp_path / "out").exists()


def verb_refuses(tmp_path, checkpoint, rows, message, capsys, test_rows=None, **changes):
    data = tmp_path / "data"
    data.mkdir()
    for split, part in (("train", rows), ("test", test_rows)):
        if part is not None:
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", str(write_recipe(tmp_path, checkpoint, data, **changes))])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    (line,) = (line for line in printed.err.splitlines() if line.startswith("error: "))
    assert message in line
    assert "Model saved" not in printed.out
    assert not (tmp_path / "out").exists()


class TestNoTarget:
    @kinds
    @pytest.mark.parametrize(
        ("rows", "options"),
        [
            ([MASKED] * 8, {}),
            ([MASKED] * 8, {"packing": True, "max_length": 16}),
            ([MASKED] * 8, {"objective": "neg_p", "stop_on_nan": True}),
            ([{"input_ids": [5], "labels": [5]}] * 8, {}),  # which nothing predicts
            ([{"input_ids": [5], "labels": [5]}] * 8, {"packing": True, "max_length": 16}),
            ([{**MASKED, "objective_weight": 2.0}] * 8, {"packing": True, "max_length": 16}),
        ],
        ids=str,
    )
    def test_of_the_whole_training_set(self, rows, options, streamed, tokenizer, tmp_path):
        refused(tokenizer, tmp_path, rows, "Cannot use the train set: no row has a target", streamed, **options)

    def test_one_target_is_enough(self, tokenizer, tmp_path):
        train(BLTrainer, tokenizer, as_data([MASKED] * 7 + [GOOD]), tmp_path)

    def test_of_a_set_that_is_not_prepared(self, tokenizer, tmp_path):
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        refused(tokenizer, tmp_path, [MASKED] * 8, "Cannot use the train set: no row has a target", **options)

    @kinds
    def test_of_an_evaluation_set(self, streamed, tokenizer, tmp_path):
        sets = {"good": as_data([GOOD] * 4), "bad": as_data([MASKED] * 4, streamed)}
        message = "Cannot use the bad set: no row has a target"
        refused(tokenizer, tmp_path, [GOOD] * 8, message, eval_data=sets, eval_strategy="epoch")

    def test_of_a_set_given_to_evaluate(self, tokenizer, tmp_path):
        trainer = build(BLTrainer, tokenizer, as_data([GOOD] * 8), tmp_path)
        with pytest.raises(RecipeError, match="Cannot use the eval set: no row has a target"):
            trainer.evaluate(as_data([MASKED] * 4))

    def test_that_a_collator_makes(self, tokenizer, tmp_path, monkeypatch):
        """Only training shows it: the logs warn, and no model counts as trained."""
        said = []
        monkeypatch.setattr("bl_trainer.training.guards.logger.warning", said.append)
        trainer = build(BLTrainer, tokenizer, as_data([GOOD] * 8), tmp_path, eval_data=as_data([GOOD] * 8))
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: collate([{**row, "labels": [-100] * len(row["labels"])} for row in rows])
        with pytest.raises(RecipeError, match="Cannot evaluate the eval set: no row has a target"):
            trainer.evaluate()
        with pytest.raises(RecipeError, match="Nothing trained: no row of any step had a target"):
            trainer.train()
        assert said[0].startswith("Nothing trains: since the last log no row had a target")

    def test_in_the_verb(self, checkpoint, tmp_path, capsys):
        verb_refuses(tmp_path, checkpoint, [MASKED] * 8, "Cannot use the train set: no row has a target", capsys, max_steps=1)


class TestCutOff:
    LONG = {"prompt": "a" * 30, "completion": "bc"}

    @kinds
    @pytest.mark.parametrize("options", [{}, {"packing": True}, {"packing": True, "objective": "neg_p", "stop_on_nan": True}])
    def test_every_target(self, options, streamed, tokenizer, tmp_path):
        message = "Cannot use the train set: `max_length: 16` cuts every target off, in all rows. Raise it to at least 31."
        refused(tokenizer, tmp_path, [self.LONG] * 8, message, streamed, max_length=16, **options)
        train(BLTrainer, tokenizer, as_data([self.LONG] * 8, streamed), tmp_path, **{**options, "max_length": 31})

    def test_at_the_end(self, tokenizer, tmp_path):
        row = {"input_ids": [5] * 30, "labels": [5] * 10 + [-100] * 20}
        message = "`max_length: 16` cuts every target off, in all rows. Raise it, or write `truncation_mode: keep_start`"
        refused(tokenizer, tmp_path, [row] * 8, message, max_length=16, truncation_mode="keep_end")

    def test_of_an_evaluation_set(self, checkpoint, tmp_path, capsys):
        changes = {"max_length": 16, "max_steps": 1, "eval_strategy": "steps"}
        message = "Cannot use the eval set: `max_length: 16` cuts every target off"
        verb_refuses(tmp_path, checkpoint, [PAIR] * 8, message, capsys, [self.LONG] * 4, **changes)

    def test_of_the_training_set_in_the_verb(self, checkpoint, tmp_path, capsys):
        message = "`max_length: 16` cuts every target off"
        verb_refuses(tmp_path, checkpoint, [self.LONG] * 8, message, capsys, max_length=16, max_steps=1)

    def test_an_empty_set(self, tokenizer, tmp_path):
        empty = Dataset.from_dict({"text": []})
        refused(tokenizer, tmp_path, empty, "The train set is empty")
        refused(tokenizer, tmp_path, [TEXT] * 4, "The eval set is empty", eval_data=empty)


class TestFewTokens:
    def said(self, tokenizer, data, tmp_path, monkeypatch, threshold, **options):
        said = []
        monkeypatch.setattr("bl_trainer.training.guards.logger.warning", said.append)
        options = {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.0, "threshold": threshold, **options}
        trainer = train(BLTrainer, tokenizer, data, tmp_path, **options)
        return [line for line in said if "target tokens train" in line], trainer

    def test_are_told_of_once(self, tokenizer, text_data, tmp_path, monkeypatch):
        rows = text_data.select(range(8))
        _, trainer = self.said(tokenizer, rows, tmp_path, monkeypatch, None)
        trainer.threshold = Threshold(above_percentile=98)
        trainer.resolve_threshold()
        above = {"above": trainer.threshold.above}
        said, trainer = self.said(tokenizer, rows, tmp_path, monkeypatch, above)
        share = trainer.state.log_history[0]["kept_fraction"]
        assert 0 < share < FEW
        assert len(said) == 1
        assert said[0].startswith(f"Only {100 * share:.2g} % of the target tokens train: the others are outside `thresh")
        assert "Widen `threshold` unless this is meant" in said[0]

    def test_of_a_percentile_are_meant(self, tokenizer, text_data, tmp_path, monkeypatch):
        threshold = {"above_percentile": 98}
        said, trainer = self.said(tokenizer, text_data.select(range(8)), tmp_path, monkeypatch, threshold)
        assert 0 < trainer.state.log_history[0]["kept_fraction"] < FEW
        assert not said

    def test_the_threshold_is_spelled_as_in_a_recipe(self, monkeypatch):
        said = []
        monkeypatch.setattr("bl_trainer.training.guards.logger.warning", said.append)
        for threshold in (Threshold(0.2), Threshold(0.2, 0.9), Threshold(0.3, 0.9, above_percentile=10)):
            warn_of_idle({"kept_fraction": 0, "target_prob": 0.1}, threshold, [])
        spelled = ["0.2", "{above: 0.2, below: 0.9}", "{above_percentile: 10, below: 0.9}"]
        assert [line.split(" within ")[1].split(" (")[0] for line in said] == [f"`threshold: {text}`" for text in spelled]

    def test_a_stretch_is_told_of_once(self, monkeypatch):
        said = []
        monkeypatch.setattr("bl_trainer.training.guards.logger.warning", said.append)
        idle, history = {"loss": 0.0, "kept_fraction": 0, "target_prob": 0.1}, []
        for means in (idle, idle, {**idle, "kept_fraction": 0.5}, idle, {**idle, "kept_fraction": math.nan}):
            warn_of_idle(means, Threshold(0.2), history)
            history += [means, {"eval_loss": 0.0}]
        assert len(said) == 3

    def test_of_most_nothing_is_said(self):
        warn_of_few({"kept_fraction": 0.5, "target_prob": 0.1}, Threshold(0.1), [])
        warn_of_few({}, Threshold(0.1), [])


class TestFrozen:
    def test_an_adapter_that_is_loaded_for_inference(self, tokenizer, text_data, tmp_path):
        get_peft_model(make_llama(tokenizer), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        load = lambda **how: PeftModel.from_pretrained(make_llama(tokenizer), tmp_path / "adapter", **how)  # noqa: E731
        message = "Cannot train PeftModel.*: all its parameters are frozen. .*`is_trainable=True`"
        refused(tokenizer, tmp_path, text_data, message, trains=True, model=load())
        start = load(is_trainable=True)
        before = {name: p.detach().clone() for name, p in start.named_parameters() if p.requires_grad}
        after = weights(train(BLTrainer, tokenizer, text_data, tmp_path, model=start))
        assert any(not torch.equal(after[name], p) for name, p in before.items())

    def test_an_adapter_that_transformers_loads(self, tokenizer, text_data, tmp_path):
        make_llama(tokenizer).save_pretrained(tmp_path / "base")
        base = type(make_llama(tokenizer)).from_pretrained(tmp_path / "base")
        get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        model = type(base).from_pretrained(tmp_path / "adapter")
        refused(tokenizer, tmp_path, text_data, "all its parameters are frozen", trains=True, model=model)

    def test_a_frozen_model_can_be_evaluated(self, tokenizer, text_data, tmp_path):
        model = make_llama(tokenizer).requires_grad_(False)
        refused(tokenizer, tmp_path, text_data, "Cannot train LlamaForCausalLM: all its", trains=True, model=model)
        options = {"model": model, "eval_data": text_data}
        assert "eval_nll" in build(BLTrainer, tokenizer, text_data, tmp_path, **options).evaluate()

    def test_an_adapter_for_inference(self, tokenizer, text_data, tmp_path):
        config = LoraConfig(target_modules=["q_proj"], inference_mode=True)
        refused(tokenizer, tmp_path, text_data, "all its parameters are frozen", trains=True, peft_config=config)


class TestOptimizers:
    """A user's own may hold other parameters than those that train."""

    def test_made_before_the_adapter(self, tokenizer, text_data, tmp_path):
        model = make_llama(tokenizer)
        made = {"optimizers": (torch.optim.AdamW(model.parameters()), None)}
        with pytest.raises(RecipeError, match="the optimizer in `optimizers` holds no parameter that trains"):
            build(BLTrainer, tokenizer, text_data, tmp_path, model, LoraConfig(target_modules=["q_proj"]), made=made)
        model.requires_grad_(False)
        build(
            BLTrainer, tokenizer, text_data, tmp_path, model, made={"optimizers": (torch.optim.AdamW(model.parameters()), None)}
        )

    def test_of_some_parameters(self, tokenizer, text_data, tmp_path, monkeypatch):
        said, model = [], make_llama(tokenizer)
        monkeypatch.setattr("bl_trainer.training.guards.logger.warning", said.append)
        build(
            BLTrainer, tokenizer, text_data, tmp_path, model, made={"optimizers": (torch.optim.AdamW(model.parameters()), None)}
        )
        assert not said
        optimizer = torch.optim.AdamW(model.lm_head.parameters())
        build(BLTrainer, tokenizer, text_data, tmp_path, model, made={"optimizers": (optimizer, None)})
        (said,) = said
        assert said.startswith(
            "The optimizer in `optimizers` leaves out 20 of 21 parameters, such as model.embed_tokens.weight"
        )


class TestCollators:
    """A user's own, over rows whose labels mask."""

    PREPARED = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}] * 8

    def test_that_unmasks_what_labels_mask(self, tokenizer, tmp_path):
        """transformers' makes labels of all tokens; with rows of one length it doesn't even fail."""
        made = {"data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False)}
        trainer = build(BLTrainer, tokenizer, as_data(self.PREPARED), tmp_path, made=made)
        with pytest.raises(
            RecipeError, match="the `data_collator` makes 32 targets of rows whose `labels` have 16, so prompts"
        ):
            trainer.train()

    def test_that_keep_labels_or_mask_more(self, tokenizer, pair_data, tmp_path):
        keeps = DataCollatorForSeq2Seq(tokenizer)
        own = build(BLTrainer, tokenizer, pair_data, tmp_path)
        other = build(BLTrainer, tokenizer, pair_data, tmp_path, made={"data_collator": keeps})
        a, b = (next(iter(each.get_train_dataloader()))["labels"] for each in (own, other))
        assert torch.equal(a, b)

        def masks(features):
            batch = keeps(features)
            return {**batch, "labels": batch["labels"].masked_fill(torch.arange(batch["labels"].shape[1]) < 8, -100)}

        assert train(BLTrainer, tokenizer, pair_data, tmp_path, made={"data_collator": masks}).state.global_step == 1

    def test_that_ends_each_row(self, tokenizer, tmp_path):
        end = {"input_ids": tokenizer.eos_token_id, "labels": tokenizer.eos_token_id}

        def ends(features):
            return DataCollatorForSeq2Seq(tokenizer)([{key: [*row[key], end[key]] for key in end} for row in features])

        made = {"data_collator": ends}
        assert train(BLTrainer, tokenizer, as_data(self.PREPARED), tmp_path, made=made).state.global_step == 1

    @kinds
    def test_labels_that_are_shifted(self, streamed, tokenizer, tmp_path):
        """As those of other loops are, whose loss doesn't shift."""
        ids = [5, 6, 7, 8, 9]
        row = {"input_ids": ids, "labels": [*ids[1:], -100]}
        message = "Cannot train on row 0 of the train set, counted from 0: `labels` are shifted already"
        refused(tokenizer, tmp_path, [row] * 8, message, streamed)
        later = as_data([{"input_ids": ids, "labels": ids}, *[row] * 3], streamed)
        trainer = build(BLTrainer, tokenizer, later, tmp_path, per_device_train_batch_size=1, max_steps=4)
        with pytest.raises(RecipeError, match="Cannot train on these rows: `labels` are shifted already"):
            trainer.train()
        shifts = {"data_collator": lambda features: {**(batch := DataCollatorForSeq2Seq(tokenizer)(features)),
                                                     "labels": batch["labels"].roll(-1, 1)}}  # fmt: skip
        trainer = build(BLTrainer, tokenizer, as_data([{"input_ids": ids, "labels": ids}] * 8), tmp_path, made=shifts)
        with pytest.raises(RecipeError, match="Cannot train on these rows: `labels` are shifted already"):
            trainer.train()

    @pytest.mark.parametrize("lengths", [[1, 2], [2, 3], [], [4, 0], [5, -1]], ids=str)
    def test_lengths_of_examples_that_are_not_those_of_the_row(self, lengths, tokenizer, tmp_path):
        """Two rows whose mistakes cancel would train on examples that are cut elsewhere."""
        rows = [{**IDS, "labels": IDS["input_ids"], "seq_lengths": each} for each in ([1, 3], [4], lengths, [2, 3], [3])]
        for streamed in (False, True):
            with pytest.raises(
                RecipeError, match=r"row 2 of the train set, .*: its `seq_lengths`, \[.*\], are not those of 4 tok"
            ):
                list(check_rows(as_data(rows, streamed), "train"))
        assert check_rows(as_data(rows[:2]), "train")


class TestNoStep:
    @pytest.mark.parametrize(
        ("rows", "batch", "processes"), [(3, 4, 1), (7, 4, 2), (8, 4, 2), (4, 4, 1), (9, 4, 3), (12, 4, 3)]
    )
    def test_as_accelerate_drops(self, rows, batch, processes):
        sampler = BatchSampler(range(rows), batch, drop_last=True)
        steps = len(BatchSamplerShard(sampler, processes, 0))
        if steps:
            refuse_dropped(rows, batch * processes, "train", "key")
        else:
            with pytest.raises(RecipeError, match=f"drops its only batch, {rows} rows where all processes take"):
                refuse_dropped(rows, batch * processes, "train", "key")

    @pytest.mark.parametrize("options", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 2}], ids=str)
    def test_of_training(self, options, tokenizer, text_data, tmp_path):
        options = {"dataloader_drop_last": True, "per_device_train_batch_size": 4, **options}
        message = "Cannot use the train set: `dataloader_drop_last: true` drops its only batch, 3 rows where all"
        refused(tokenizer, tmp_path, text_data.select(range(3)), message, trains=True, **options)
        assert train(BLTrainer, tokenizer, text_data.select(range(4)), tmp_path, **options).state.global_step > 0

    def test_of_training_on_several_processes(self, tokenizer, text_data, tmp_path, monkeypatch):
        options = {"dataloader_drop_last": True, "per_device_train_batch_size": 2}
        trainer = build(BLTrainer, tokenizer, text_data.select(range(5)), tmp_path, **options)
        refuse_dropped_sets(trainer)
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", 3)
        with pytest.raises(RecipeError, match="5 rows where all processes take 6"):
            refuse_dropped_sets(trainer)

    def test_of_evaluation(self, tokenizer, text_data, tmp_path):
        options = {"eval_data": text_data.select(range(3)), "per_device_eval_batch_size": 4, "dataloader_drop_last": True}
        message = "Cannot use the eval set: `dataloader_drop_last: true` .* lower `per_device_eval_batch_size`"
        refused(tokenizer, tmp_path, text_data, message, trains=True, eval_strategy="epoch", **options)

    def test_packing_counts_packed_rows(self, checkpoint, tmp_path, capsys):
        changes = {"dataloader_drop_last": True, "packing": True, "max_length": 64, "per_device_train_batch_size": 2}
        message = "Cannot use the train set: `dataloader_drop_last: true` drops its only batch, 1 rows where all"
        verb_refuses(tmp_path, checkpoint, [PAIR] * 8, message, capsys, **changes)

    def test_of_a_loader_that_gives_nothing(self, tokenizer, text_data, tmp_path):
        trainer = build(BLTrainer, tokenizer, text_data, tmp_path)
        trainer.get_train_dataloader = lambda: []
        with pytest.raises(RecipeError, match="Nothing trained: the training set gave no complete batch"):
            trainer.train()

    def test_a_stream_has_no_last_batch(self, checkpoint, tmp_path, capsys):
        changes = {"dataloader_drop_last": True, "dataset_streaming": True, "max_steps": 1}
        verb_refuses(tmp_path, checkpoint, [PAIR] * 3, "`dataloader_drop_last` has no effect on a streamed", capsys, **changes)


WITHOUT_EFFECT = [
    ([TEXT], {"completion_only_loss": True}, "has no prompt and completion. Remove it, or split each row"),
    ([CHAT], {"completion_only_loss": True}, "Write `assistant_only_loss: true` instead"),
    ([SHAREGPT], {"completion_only_loss": True}, "Write `assistant_only_loss: true` instead"),
    ([IDS], {"completion_only_loss": True}, "it has `input_ids` without `completion_mask`"),
    ([GOOD], {"completion_only_loss": True}, "its `labels` choose the targets. Remove the key"),
    ([TEXT], {"assistant_only_loss": True}, "it has no messages. Remove it, or give messages"),
    ([PAIR], {"assistant_only_loss": True}, "Write `completion_only_loss: true` instead"),
    ([{**IDS, "assistant_masks": [0, 0, 1, 1]}], {"assistant_only_loss": True}, "`assistant_masks` works without it"),
    ([{**PAIR, "body": "abc"}], {"dataset_text_field": "body"}, "`dataset_text_field: body` has no effect on the train set"),
    ([CHAT], {"dataset_text_field": "body"}, "its column `messages` is trained. Remove the key, or that column"),
    ([{**IDS, "body": "abc"}], {"dataset_text_field": "body"}, "its column `input_ids` is trained. Remove the key, or that"),
    ([{**IDS, "completion_mask": [0, 0, 1, 1]}], {}, "no effect without its key. Write `completion_only_loss: true`"),
    ([{**GOOD, "completion_mask": [0, 0, 1, 1]}], {}, "`completion_mask` of the train set has no effect: its `labels` choose"),
    ([{**GOOD, "assistant_masks": [0, 0, 1, 1]}], {}, "`assistant_masks` of the train set has no effect: its `labels` choose"),
    (
        [{**IDS, "assistant_mask": [0, 0, 1, 1]}],
        {},
        "The column 'assistant_mask' of the train set has no effect. Write `a",
    ),
    ([{**IDS, "label": [5, 6, 7, 8]}], {}, "The column 'label' of the train set has no effect. Write `labels`"),
    (
        [{**IDS, "loss_mask": [0, 0, 1, 1]}],
        {},
        "The column 'loss_mask' of the train set has no effect. Write `labels`, the",
    ),
    ([{**GOOD, "seq_lengths": [2, 2]}], {}, "`seq_lengths` of the train set has no effect: packed examples would see each"),
    ([{**TEXT, "labels": [2, 7]}], {}, "Cannot use the column `labels` of the train set: it has no `input_ids`"),
    ([{**PAIR, "completion_mask": [0, 1]}], {}, "Cannot use the column `completion_mask` of the train set: it has no `inp"),
    ([{**CHAT, "assistant_masks": [0, 1]}], {}, "Cannot use the column `assistant_masks` of the train set: it has no `inp"),
]


@pytest.mark.parametrize(("rows", "options", "message"), WITHOUT_EFFECT, ids=str)
def test_what_has_no_effect_is_an_error(rows, options, message, tmp_path):
    args = BLConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, **options)
    for kind in (Dataset.from_list(rows * 8), Dataset.from_list(rows * 8).to_iterable_dataset()):
        with pytest.raises(RecipeError) as caught:  # before the model loads
            BLTrainer("no-such-model", args, train_dataset=kind)
        assert message in str(caught.value)


@pytest.mark.parametrize("case", [0, -1, -3])
def test_and_in_the_verb(case, checkpoint, tmp_path, capsys):
    rows, options, message = WITHOUT_EFFECT[case]
    verb_refuses(tmp_path, checkpoint, rows * 8, message, capsys, **options)


def checked(train_row, eval_row, **options):
    args = BLConfig(use_cpu=True, bf16=False, report_to="none", **options)
    check_labels({name: as_data([row] * 8) for name, row in (("train", train_row), ("eval", eval_row))}, args)


@pytest.mark.parametrize(("rows", "options", "message"), WITHOUT_EFFECT, ids=str)
def test_columns_of_an_evaluation_set_too(rows, options, message):
    if options:  # a key has its effect on the training set
        train_row = {"body": "abc"} if "dataset_text_field" in options else CHAT if "assistant_only_loss" in options else PAIR
        checked(train_row, rows[0], **options)
    else:
        with pytest.raises(RecipeError) as caught:
            checked(GOOD, rows[0])
        assert message.replace("train set", "eval set") in str(caught.value)


@pytest.mark.parametrize("mask", ["prompt_mask", "loss_mask", "target_mask", "mask"])
def test_a_mask_of_unknown_sense_is_not_to_be_renamed(mask):
    row = {**IDS, mask: [1, 1, 0, 0]}
    with pytest.raises(RecipeError) as caught:
        checked(row, GOOD)
    assert "Write `labels`, the token's id where it trains and -100 where not, or remove it." in str(caught.value)
    assert "completion_mask" not in str(caught.value)
    checked({**row, "labels": [-100, -100, 7, 8]}, GOOD)


@pytest.mark.parametrize(
    ("row", "is_told"),
    [
        ({**TEXT, "weight": 0.5}, True),
        ({**CHAT, "sample_weight": 2}, True),
        ({**IDS, "loss_weight": [0.0, 1.0, 1.0, 1.0]}, True),
        ({**TEXT, "loss_scale": 0.0}, True),
        ({**CHAT, "weights": 1}, True),
        ({**PAIR, "train": False}, True),
        ({**TEXT, "is_masked": True}, True),
        ({**TEXT, "token_weights": [0.0, 1.0]}, True),
        ({**GOOD, "loss_mask": [0, 1, 1, 1]}, False),
        ({**IDS, "token_weight": [0.0, 1.0, 1.0, 1.0]}, False),
        ({**TEXT, "training_step": 5}, False),
        ({**TEXT, "weight": "heavy"}, False),
        ({**TEXT, "weight": 0.5, "objective_weight": 0.5}, False),
        ({**TEXT, "score": 0.5}, False),
    ],
    ids=str,
)
def test_a_column_of_weights_without_effect_is_told_of(row, is_told, monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.tokens.idle.warn_once", said.append)
    checked(row, TEXT)
    assert is_told == any(
        "of the train set has no effect. To weight rows, rename it to `objective_weight`" in each for each in said
    )


def test_rows_that_do_not_train_are_counted(tokenizer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.tokens.labels.warn_once", said.append)
    long = {"prompt": "a" * 30, "completion": "bc"}
    build(BLTrainer, tokenizer, as_data([PAIR] * 5 + [long] * 3), tmp_path, max_length=16)
    assert said.pop().startswith("3 of 8 rows of the train set do not train: `max_length: 16` cuts their targets off, or")
    late = {"input_ids": [5] * 9, "labels": [-100] * 8 + [5]}
    build(BLTrainer, tokenizer, as_data([GOOD] * 5 + [MASKED] * 2 + [late]), tmp_path, max_length=8)
    assert said[0].startswith("1 of 8 rows of the train set do not train: `max_length: 8`")
    assert said[1].startswith("2 of 8 rows of the train set do not train: all their labels are -100.")
    said.clear()
    build(BLTrainer, tokenizer, as_data([GOOD] * 6 + [MASKED] * 2), tmp_path)
    assert len(said) == 1
    assert "2 of 8 rows" in said.pop()
    build(BLTrainer, tokenizer, as_data([PAIR] * 8), tmp_path, max_length=16)
    assert not said


def test_rows_of_a_stream_that_do_not_train_are_counted_as_they_are_read(tokenizer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.tokens.streams.warn_once", said.append)
    late = {"input_ids": [5] * 9, "labels": [-100] * 8 + [5]}
    options = {"max_length": 8, "per_device_train_batch_size": 2, "shuffle_dataset": False, "max_steps": 2}
    train(BLTrainer, tokenizer, as_data([GOOD, MASKED, late, GOOD] * 2).to_iterable_dataset(), tmp_path, **options)
    assert len(said) == 1
    assert said.pop().startswith("4 of 8 rows that were read of the train stream do not train: `max_length: 8` cuts their")
    train(BLTrainer, tokenizer, as_data([GOOD] * 8).to_iterable_dataset(), tmp_path, **options)
    assert not said


PACKED = [
    ({"packing": True}, ["3 of 8 rows of the train set do not train: `max_length: 16` cuts their targets off, or"]),
    ({"packing": True, "packing_strategy": "bfd_split"}, []),
    ({"packing": True, "packing_strategy": "wrapped"}, []),
]


@pytest.mark.parametrize(("options", "messages"), PACKED, ids=str)
def test_rows_that_do_not_train_are_counted_in_packed_sets(options, messages, tokenizer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.tokens.labels.warn_once", said.append)
    long = {"prompt": "a" * 30, "completion": "bc"}
    build(BLTrainer, tokenizer, as_data([PAIR] * 5 + [long] * 3), tmp_path, max_length=16, **options)
    assert len(said) == len(messages)
    assert all(map(str.startswith, said, messages))


@pytest.mark.parametrize("lengths", [None, [[2], [2, 2, 1]], [[1, 1], [4, 1]]], ids=str)
def test_examples_without_a_target_are_counted(lengths):
    labels = [[-100, -100], [5, -100, -100, -100, 6]]
    columns = {"input_ids": [[5] * len(row) for row in labels], "labels": labels}
    packed = columns if lengths is None else {**columns, "seq_lengths": lengths}
    assert _count_blank(Dataset.from_dict(packed)) == {None: (2, 1), 2: (4, 2), 1: (4, 2)}[lengths and lengths[0][0]]
    empty = Dataset.from_dict({"labels": [[], [5], [], [-100]]}, features=Features({"labels": List(Value("int64"))}))
    assert _count_blank(empty) == (4, 3)


WRONG_IDS = [
    ({"input_ids": [5, 6, 99], "labels": [5, 6, 7]}, "`input_ids` has 99"),
    ({"input_ids": [5, 6, -1]}, "`input_ids` has -1"),
]
WRONG_IDS += [({**GOOD, "labels": [5, 6, 99, 8]}, "`labels` has 99"), ({**GOOD, "labels": [5, 6, -1, 8]}, "`labels` has -1")]


@kinds
@pytest.mark.parametrize(("row", "message"), WRONG_IDS, ids=str)
def test_ids_that_the_model_does_not_have(row, message, streamed):
    fine = {**IDS, **{key: [5] * 4 for key in row if key != "input_ids"}}
    check = lambda rows, size: list(check_ids(as_data(rows, streamed), "train", size))  # noqa: E731
    check([fine, {**GOOD, "labels": [-100, 5, 6, 7]}], 9)
    with pytest.raises(RecipeError, match=rf"row 2 of the train set, counted from 0: {message}, and .* embeddings for 0 to 43"):
        check([fine, fine, row], 44)


def test_ids_that_the_model_does_not_have_are_said_before_training(tokenizer, tmp_path):
    refused(
        tokenizer, tmp_path, [GOOD, {**GOOD, "input_ids": [5, 6, 7, 999]}], "row 1 of the train set, .*: `input_ids` has 999"
    )
    stray = make_llama(tokenizer, vocab_size=len(tokenizer) - 1)  # without an embedding for the last letter
    for streamed in (False, True):
        texts = as_data([TEXT, {"text": "hello?"}], streamed)
        with pytest.raises(RecipeError, match=r"row 1 of the prepared eval set, .*: `input_ids` has 43, and .* for 0 to 42"):
            build(BLTrainer, tokenizer, as_data([TEXT] * 8), tmp_path / "texts", model=stray, eval_data=texts).evaluate()
    sets = {"a": as_data([GOOD]), "b": as_data([GOOD, {"input_ids": [5, 999], "labels": [5, 5]}])}
    refused(tokenizer, tmp_path, [GOOD] * 8, "row 1 of the .* set, .*: `input_ids` has 999", eval_data=sets)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "Cannot train: there is no `train_dataset`. Give a `Dataset` or an `IterableDataset`."),
        (
            DatasetDict(train=Dataset.from_list([TEXT]), test=Dataset.from_list([TEXT])),
            "DatasetDict of train, test. Give one of",
        ),
        ([TEXT], "Cannot train: `train_dataset` is a list. Give a `Dataset`"),
    ],
    ids=["none", "splits", "list"],
)
def test_what_is_no_training_set(data, message):
    with pytest.raises(RecipeError) as caught:
        BLTrainer("no-such-model", BLConfig(use_cpu=True, bf16=False, report_to="none"), train_dataset=data)
    assert message in str(caught.value)


@pytest.mark.parametrize(("columns", "advice"), [(("text",), "Write `dataset_text_field: text`"), (("a", "b"), "Name one of")])
def test_a_text_field_that_is_not_there(columns, advice):
    with pytest.raises(RecipeError, match=f"`dataset_text_field: content` names no column of it; it has .*{advice}"):
        arrange(Dataset.from_list([dict.fromkeys(columns, "x")]), "the train set", "content")


def test_liger_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("bl_trainer.training.refusals.is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match=r"Cannot use `use_liger_kernel: true`: .* Run `pip install liger-kernel`"):
        BLConfig(use_cpu=True, bf16=False, report_to="none", use_liger_kernel=True)


@pytest.mark.parametrize(
    ("row", "options", "targets"),
    [
        (PAIR, {"completion_only_loss": True}, "...de<end>"),
        (PAIR, {"completion_only_loss": False}, "abcde<end>"),
        (CHAT, {"assistant_only_loss": True}, ".....de<end>"),
        (CHAT, {"assistant_only_loss": False}, "<user>abc<end>de<end>"),
        (IDS, {}, [5, 6, 7, 8]),
        ({**IDS, "text": "abc", "attention_mask": [1] * 4}, {}, [5, 6, 7, 8]),
        ({**IDS, "completion_mask": [0, 0, 1, 1]}, {"completion_only_loss": True}, [-100, -100, 7, 8]),
        ({**IDS, "completion_mask": [0, 0, 1, 1]}, {"completion_only_loss": False}, [5, 6, 7, 8]),
        ({**GOOD, "completion_mask": [0, 0, 1, 1]}, {"completion_only_loss": False}, [-100, 6, 7, 8]),
        ({**IDS, "assistant_masks": [0, 0, 1, 1]}, {}, [-100, -100, 7, 8]),
        ({**GOOD, "seq_lengths": [2, 2]}, {"padding_free": True}, [-100, 6, 7, 8]),
        ({**GOOD, "attention_mask": [1, 1, 1, 1], "special_tokens_mask": [0] * 4}, {}, [-100, 6, 7, 8]),
        ({"input_ids": [5, 6, 0, 0], "labels": [5, 6, -100, -100], "attention_mask": [1, 1, 0, 0]}, {}, [5, 6, -100, -100]),
    ],
    ids=str,
)  # fmt: skip
def test_what_has_an_effect_is_taken(row, options, targets, tokenizer, tmp_path):
    for streamed in (False, True):
        prepared = build(BLTrainer, tokenizer, as_data([row] * 8, streamed), tmp_path, **options).train_dataset
        for example in prepared:
            shown = ["." if label == -100 else tokenizer.convert_ids_to_tokens(label) for label in example["labels"]]
            assert ("".join(shown) if isinstance(targets, str) else example["labels"]) == targets


def test_a_prepared_set_may_be_evaluated_again(tokenizer, pair_data, tmp_path):
    options = {"eval_data": pair_data, "completion_only_loss": True}
    trainer = build(BLTrainer, tokenizer, pair_data, tmp_path, **options)
    assert trainer.evaluate(trainer.train_dataset)["eval_nll"] == pytest.approx(trainer.evaluate()["eval_nll"], rel=1e-6)


def results_of(rows, tokenizer, data, tmp_path, **options):
    """Yield the metrics, or the refusal, of a set given to the constructor, to `evaluate`, in a mapping, to `predict`."""
    calls = {
        "eval": lambda: build(BLTrainer, tokenizer, data, tmp_path, eval_data=rows, **options).evaluate(),
        "evaluate": lambda: build(BLTrainer, tokenizer, data, tmp_path, **options).evaluate(rows),
        "one": lambda: build(BLTrainer, tokenizer, data, tmp_path, **options).evaluate({"one": rows}),
        "test": lambda: build(BLTrainer, tokenizer, data, tmp_path, **options).predict(rows).metrics,
    }
    for name, call in calls.items():
        try:
            found = {key.split("_", 1)[-1].removeprefix("one_"): value for key, value in call().items()}
            yield {key: found[key] for key in ("loss", "nll", "kept_fraction")}
        except RecipeError as error:
            yield str(error).replace(f"{'eval' if name == 'evaluate' else name} set", "eval set")


PACKED = {"packing": True, "max_length": 32, "packing_strategy": "bfd"}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({**GOOD, "token_weight": [0.0, 1.0, 0.3, 2.0]}, {}, None),
        ({**GOOD, "token_weight": [0.0, -1.0, 0.3, 2.0]}, {}, "`token_weight` of row 0 of the eval set"),
        ({**IDS, "completion_mask": [0, 0, 1, 1]}, {}, "has no effect without its key"),
        ({**IDS, "completion_mask": [0, 0, 1, 1]}, {"completion_only_loss": False}, None),
        ({**GOOD, "seq_lengths": [2, 2]}, {}, "packed examples would see each other"),
        ({**GOOD, "seq_lengths": [2, 2]}, {"padding_free": True}, None),
        ({**GOOD, "position_ids": [0, 1, 0, 1]}, {}, "The column `position_ids` of the eval set has no effect"),
        ({**GOOD, "objectiv_weight": 1.0}, {}, "Did you mean `objective_weight`"),
        ({"input_ids": [5, 6, 7, 4000]}, {}, "and the model has embeddings for 0 to"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {}, None),
        ({"question": "a", "answer": "b"}, {}, "TRL can't make a training text of its columns"),
        ({"prompt": "a", "completion": "bcd"}, {}, None),
        ({"text": "abcdefgh"}, PACKED, None),
        ({**IDS, "assistant_masks": [0, 0, 1, 1]}, {"dataset_kwargs": {"skip_prepare_dataset": True}}, "Add `labels`"),
    ],
    ids=str,
)  # fmt: skip
def test_a_set_that_comes_later_is_treated_as_the_evaluation_set(row, options, message, tokenizer, text_data, tmp_path):
    data = as_data([GOOD] * 8) if "dataset_kwargs" in options else text_data
    first, *others = results_of(as_data([row] * 4), tokenizer, data, tmp_path, **options)
    assert message in first if message else isinstance(first, dict)
    for found in others:
        assert found == first if message else found == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("streamed", [False, True])
def test_packed_examples_are_not_packed_again(streamed, tokenizer, text_data, tmp_path):
    data = text_data.to_iterable_dataset() if streamed else text_data
    trainer = build(BLTrainer, tokenizer, data, tmp_path, eval_data=data, **PACKED)
    nll = trainer.evaluate()["eval_nll"]
    for found in (
        trainer.evaluate(trainer.eval_dataset)["eval_nll"], trainer.evaluate(trainer.train_dataset)["eval_nll"],
        trainer.evaluate({"one": data})["eval_one_nll"], trainer.predict(trainer.eval_dataset).metrics["test_nll"],
    ):  # fmt: skip
        assert found == pytest.approx(nll, rel=1e-5)


class TestLabels:
    WRONG = [
        ({**IDS, "labels": [7, 8]}, "`labels` has 2 numbers for 4 tokens. Give one number for each of `input_ids`"),
        ({**IDS, "labels": [5, 6, 7, 8, 9]}, "`labels` has 5 numbers for 4 tokens"),
        ({**IDS, "labels": None}, "`labels` has None for 4 tokens"),
        ({**IDS, "assistant_masks": [1]}, "`assistant_masks` has 1 numbers for 4 tokens"),
        ({"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}, "its `attention_mask` hides tokens and is not read"),
        ({**GOOD, "attention_mask": [0, 1, 1, 1]}, "its `attention_mask` hides tokens"),
    ]

    @kinds
    @pytest.mark.parametrize(("row", "message"), WRONG, ids=str)
    def test_of_a_wrong_length(self, row, message, streamed, tokenizer, tmp_path):
        fine = {**IDS, **{key: [1] * 4 for key in row if key != "input_ids"}}
        rows = [fine] * 6 + [row] + [fine]
        message = f"Cannot train on row 6 of the train set, counted from 0: {message}"
        refused(tokenizer, tmp_path, rows, message, streamed, trains=streamed)

    def test_of_a_wrong_length_among_thousands(self, tokenizer, tmp_path):
        rows = Dataset.from_list([GOOD] * 2500 + [{**IDS, "labels": [7]}])
        with pytest.raises(RecipeError, match="row 2500 of the train set"):
            BLTrainer("no-such-model", BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), train_dataset=rows)
        order = [2500, *range(2500)]
        with pytest.raises(RecipeError, match="row 0 of the train set"):  # of a view the rows as they are seen
            BLTrainer(
                "no-such-model", BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), train_dataset=rows.select(order)
            )

    @kinds
    def test_of_a_wrong_length_in_a_set_that_is_not_prepared(self, streamed, tokenizer, tmp_path):
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        rows = [GOOD] * 7 + [{**IDS, "labels": [7, 8]}]
        message = "Cannot train on .*: `labels` has 2 numbers for 4 tokens"
        refused(tokenizer, tmp_path, rows, message, streamed, trains=streamed, **options)

    def test_that_a_collator_makes(self, tokenizer, tmp_path):
        trainer = build(BLTrainer, tokenizer, as_data([GOOD] * 8), tmp_path)
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: {**(batch := collate(rows)), "labels": batch["labels"][:, :3]}
        with pytest.raises(ValueError, match=r"labels of shape \(8, 3\) .* tokens of shape \(8, 4\)"):
            trainer.train()

    def test_in_the_verb(self, checkpoint, tmp_path, capsys):
        message = "Cannot train on row 1 of the train set, counted from 0: `labels` has 2 numbers for 4 tokens"
        verb_refuses(tmp_path, checkpoint, [GOOD, {**IDS, "labels": [7, 8]}], message, capsys)


BY_TOKEN = [0.0, 1.0, 2.0, 3.0]
AS_IT_IS = {"dataset_kwargs": {"skip_prepare_dataset": True}}


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (0.5, {}),
        (0.5, {"packing": True, "max_length": 16}),
        (BY_TOKEN, {"max_length": 3}),
        (0.5, AS_IT_IS),
        (BY_TOKEN, AS_IT_IS),
    ],
    ids=str,
)
def test_formats_of_a_set_change_nothing(weight, options, tokenizer, tmp_path):
    data = as_data([{**GOOD, "objective_weight": weight}, {**IDS, "labels": [5, 6, -100, 8], "objective_weight": weight}] * 4)
    found = []
    formatted = [each.with_format(kind) for each in (data, data.to_iterable_dataset()) for kind in ("torch", "numpy")]
    for given in (data, data.to_iterable_dataset(), *formatted):
        gradients = Gradients()
        train(BLTrainer, tokenizer, given, tmp_path, callbacks=[gradients], optim="sgd", shuffle_dataset=False, **options)
        found.append(gradients.first)
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-4, atol=1e-6)


def test_a_format_hides_columns(tokenizer, tmp_path):
    data = as_data([{**GOOD, "objective_weight": 0.0}] * 8).with_format("numpy", columns=["input_ids", "labels"])
    trainer = train(BLTrainer, tokenizer, data, tmp_path)
    assert trainer.state.log_history[0]["gradient_weight"] == pytest.approx(1)
    assert np.isfinite(trainer.state.log_history[0]["loss"])


class TestNames:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"modules_to_save": ["lm_haed"]},
                "Cannot apply `lora_modules_to_save`: 'lm_haed' matches nothing in Llama",
            ),
            (
                {"target_modules": ["query_key_value", "w_proj"]},
                "Cannot apply `lora_target_modules`: 'query_key_value, w_proj' matches nothing in LlamaForCausalLM. Write some "
                "of its linear layers, down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or `all-linear`",
            ),
            ({"target_modules": r".*\.9\.self_attn"}, "Cannot apply `lora_target_modules`: .* matches nothing"),
            ({"target_parameters": ["mlp.gate_proj.weigth"]}, "Cannot apply `lora_target_parameters`: 'mlp.gate_proj.weigth'"),
        ],
        ids=str,
    )
    def test_that_match_nothing(self, config, message, tokenizer, text_data, tmp_path):
        config = LoraConfig(**{"target_modules": ["q_proj"], **config})
        refused(tokenizer, tmp_path, text_data, message, peft_config=config)

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            (
                {"target_modules": ["q_proj", "query_key_value"]},
                "`lora_target_modules`: 'query_key_value' matches nothing in LlamaForCausalLM",
            ),
            ({"exclude_modules": ["lm_haed"]}, "`exclude_modules`: 'lm_haed' matches nothing"),
            (
                {"target_modules": "all-linear", "exclude_modules": ".*vision.*"},
                "`exclude_modules`: '.*vision.*' matches nothing",
            ),
        ],
        ids=str,
    )
    def test_of_which_others_match_are_warned_of(self, config, said, tokenizer, text_data, tmp_path, caplog):
        config = LoraConfig(**{"target_modules": ["q_proj"], **config})
        build(BLTrainer, tokenizer, text_data, tmp_path, peft_config=config)
        assert said in caplog.text

    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": "all-linear"},
            {"target_modules": r".*\.(q|k)_proj"},
            {"target_modules": ["self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
            {"modules_to_save": ["lm_head", "embed_tokens"]},
            {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
            {"target_parameters": ["mlp.gate_proj.weight"]},
        ],
        ids=str,
    )
    def test_that_match(self, config, tokenizer, text_data, tmp_path):
        build(BLTrainer, tokenizer, text_data, tmp_path, peft_config=LoraConfig(**{"target_modules": ["q_proj"], **config}))

    @pytest.mark.parametrize(
        ("key", "value"), [("lora_modules_to_save", "lm_haed"), ("lora_target_modules", ["query_key_value", "w_proj"])]
    )
    def test_in_the_verb(self, key, value, checkpoint, tmp_path, capsys):
        changes = {"use_peft": True, "lora_target_modules": ["q_proj"], key: value}
        verb_refuses(tmp_path, checkpoint, [PAIR] * 8, f"Cannot apply `{key}`: ", capsys, **changes)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_longer_than_the_models_positions(packing, tokenizer, tmp_path, caplog):
    rows = as_data([{"input_ids": [5 + i % 30 for i in range(n)]} for n in (6, 20, 9, 6)])
    learnt = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2))
    options = {"max_length": 64, "packing": packing, "padding_free": False}
    message = "has 20 tokens, GPT2LMHeadModel was made for 16, whose positions it has learnt. Write `max_length: 16`"
    if not packing:
        with pytest.raises(RecipeError, match=message):
            build(BLTrainer, tokenizer, rows, tmp_path, model=learnt, **options)
        build(BLTrainer, tokenizer, rows, tmp_path, model=learnt, **{**options, "max_length": 16})
    build(BLTrainer, tokenizer, rows, tmp_path, model=make_llama(tokenizer, max_position_embeddings=20), **options)
    assert "was made for" not in caplog.text
    build(BLTrainer, tokenizer, rows, tmp_path, model=make_llama(tokenizer, max_position_embeddings=16), **options)
    assert "has 20 tokens, LlamaForCausalLM was made for 16. Write `max_length: 16`" in caplog.text


class TestHeadAdapter:
    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
            {"target_modules": ["q_proj", "lm_head"], "exclude_modules": "lm_.*"},
            {"target_modules": ".*(q_proj|lm_head)", "exclude_modules": ["lm_head"]},
        ],
        ids=str,
    )
    def test_an_excluded_head_trains_without_one(self, config, tokenizer, text_data, tmp_path):
        """As TRL's does, whose head is checked when the model is built."""
        losses = [
            train(
                trainer_class, tokenizer, text_data, tmp_path, peft_config=LoraConfig(**config), max_steps=2
            ).state.log_history[1]["loss"]
            for trainer_class in (SFTTrainer, BLTrainer)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["k_proj"]},
            {"target_modules": ".*(q_proj|lm_head)", "exclude_modules": "head"},
            {"target_modules": ["base.lm_head"]},
        ],
        ids=str,
    )
    def test_another_exclusion_is_none(self, config):
        with pytest.raises(ValueError, match="A PEFT adapter on `lm_head` would not train"):
            BLTrainer("no-such-model", peft_config=LoraConfig(**config))


def test_rows_of_a_generator_are_read_when_they_come(tokenizer, tmp_path):
    """A stream's first rows are looked at before training, the rest as they are trained on."""
    read = []

    def rows():
        for i in range(64):
            read.append(i)
            yield {**GOOD, "labels": [-100, 6, 7, 8] if i != 40 else [7]}

    trainer = build(BLTrainer, tokenizer, IterableDataset.from_generator(rows), tmp_path, max_steps=8)
    assert max(read) < 8
    with pytest.raises(RecipeError, match="Cannot train on row 40 of the train set, counted from 0: `labels` has 1 numbers"):
        trainer.train()


def make_llama4(tokenizer):
    torch.manual_seed(0)
    sizes_of = sizes(tokenizer, head_dim=8, intermediate_size_mlp=32, num_local_experts=4, interleave_moe_layer_step=1)
    return Llama4ForCausalLM._from_config(Llama4TextConfig(**sizes_of), experts_implementation="eager")


def make_dense_granite(tokenizer):
    torch.manual_seed(0)
    hybrid = {"layer_types": ["attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 32, "mamba_n_heads": 2}
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**sizes(tokenizer, **hybrid)))


@pytest.mark.parametrize("make", [make_llama4, make_dense_granite])
def test_an_auxiliary_loss_is_the_models_own_or_none(make, tokenizer, text_data, tmp_path):
    trainer = train(BLTrainer, tokenizer, text_data, tmp_path, make(tokenizer))
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["nll"], rel=1e-5)  # the classes' coefficients are not 0
    assert log.get("aux_loss", 0.0) == 0.0


def test_an_auxiliary_loss_that_a_model_has_not_is_refused(tokenizer, text_data, tmp_path):
    with pytest.raises(RecipeError, match=r"Llama4ForCausalLM has none of its own. Remove `router_aux_loss_coef: 0.5`"):
        build(BLTrainer, tokenizer, text_data, tmp_path, make_llama4(tokenizer), router_aux_loss_coef=0.5)


def make_jetmoe(tokenizer, **options):
    """Make a mixture of experts whose own forward reads another name of the coefficient."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    return JetMoeForCausalLM(JetMoeConfig(**sizes(tokenizer, **experts, **options)))


def test_an_auxiliary_loss_whose_coefficient_has_another_name_is_refused(tokenizer, text_data, tmp_path):
    model = make_jetmoe(tokenizer, output_router_logits=True, aux_loss_coef=0.1)
    message = "the configuration of JetMoeForCausalLM has no `router_aux_loss_coef`. Write it in the recipe, 0 to train without"
    with pytest.raises(RecipeError, match=re.escape(message)):
        build(BLTrainer, tokenizer, text_data, tmp_path, model)
    for each, coefficient in ((make_jetmoe(tokenizer), None), (model, 0.0), (model, 0.1)):  # it asks for none by default
        log = train(BLTrainer, tokenizer, text_data, tmp_path, each, router_aux_loss_coef=coefficient).state.log_history[0]
        assert log["loss"] - log["nll"] == pytest.approx((coefficient or 0.0) * log.get("aux_loss", 0.0), abs=1e-5)
        assert bool(log.get("aux_loss")) == bool(coefficient)


def test_an_auxiliary_loss_that_needs_more_is_refused(tokenizer, text_data, tmp_path):
    torch.manual_seed(0)
    model = DogeForCausalLM(DogeConfig(**sizes(tokenizer, is_moe=True, num_experts=4, num_experts_per_tok=2)))
    with pytest.raises(RecipeError, match="DogeForCausalLM with its auxiliary loss"):
        build(BLTrainer, tokenizer, text_data, tmp_path, model)
