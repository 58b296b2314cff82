"""Adapters: the gradient of `BLTrainer` from transformers' own trainer, and what each stack's adapter refuses."""

import json
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchStream
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import attached
from attached import CASES, Kept, options, rows
from bl_trainer.adapters import axolotl, llamafactory, swift, unsloth, verl
from bl_trainer.adapters.contract import REPEATED, refuse_settings, refuse_weights, with_targets
from bl_trainer.adapters.transformers import TrainerLoss, attach
from bl_trainer.errors import LossError, RecipeError
from bl_trainer.objectives import Objective, Threshold
from conftest import make_double, make_llama, make_mixtral
from forking import ranks
from ways import Ordered, relative_difference, train

ROOT = Path(__file__).parents[1]
PADDED = {"learning_rate": 0.0, "per_device_train_batch_size": 8, "max_steps": 2, "max_length": None}


def expected(tokenizer, tmp_path, case, model=None, **cut):
    """Train with `BLTrainer`, each step's rows in one batch unless `cut`; return its gradients and log."""
    seen = Kept()
    model = make_double(tokenizer) if model is None else model
    trainer = train(
        Ordered, tokenizer, Dataset.from_list(rows(len(tokenizer))), tmp_path / "own", model=model, callbacks=[seen],
        logging_steps=1, **{**PADDED, **cut}, **case,
    )  # fmt: skip
    return seen.all, trainer.state.log_history


def build(tokenizer, tmp_path, model=None, kind=Trainer, collator=None, **settings):
    """Return transformers' trainer of the same rows, four micro-batches of two a step."""
    seen = Kept()
    trainer = kind(
        model=make_double(tokenizer) if model is None else model,
        args=TrainingArguments(**{**options(tmp_path / "theirs"), **settings}),
        train_dataset=Dataset.from_list(rows(len(tokenizer))),
        eval_dataset=Dataset.from_list(rows(len(tokenizer))[:3]),
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer),
        callbacks=[seen],
    )
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer, seen


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_bltrainer(name, tokenizer, tmp_path):
    right, log = expected(tokenizer, tmp_path, CASES[name])
    trainer, seen = build(tokenizer, tmp_path)
    attach(trainer, **CASES[name])
    trainer.train()
    assert [relative_difference(a, b) < 1e-9 for a, b in zip(seen.all, right, strict=True)] == [True, True]
    for theirs, own in zip(trainer.state.log_history[:2], log[:2], strict=True):
        for metric in ("loss", "nll", "target_prob", "kept_fraction", "gradient_weight", "entropy", "mean_token_accuracy"):
            assert theirs[metric] == pytest.approx(own[metric], rel=1e-6), metric


def test_kept_tokens_divide_each_micro_batch_as_in_bltrainer(tokenizer, tmp_path):
    case = {"objective": "neg_p", "threshold": {"above": 0.01, "normalize": "kept"}}
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    right, _ = expected(tokenizer, tmp_path, case, **cut)
    trainer, seen = build(tokenizer, tmp_path)
    attach(trainer, **case)
    trainer.train()
    assert relative_difference(seen.first, right[0]) < 1e-9


def test_gradient_in_float32_differs_by_rounding(tokenizer, tmp_path):
    right, _ = expected(tokenizer, tmp_path, CASES["power"], make_llama(tokenizer))
    trainer, seen = build(tokenizer, tmp_path, make_llama(tokenizer))
    attach(trainer, **CASES["power"])
    trainer.train()
    assert relative_difference(seen.first, right[0]) < 1e-4


def test_gradient_on_two_processes(tokenizer, tmp_path):
    make_double(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    codes, said = ranks(tmp_path, attached.main, tmp_path)
    assert codes == [0, 0], said[0][-4000:]
    for name in ("neg_p", "anneal", "threshold"):
        right, _ = expected(tokenizer, tmp_path, CASES[name])
        found = torch.load(tmp_path / f"{name}.pt")
        assert [relative_difference(a, b) < 1e-9 for a, b in zip(found, right, strict=True)] == [True, True]


def test_evaluation_reports_what_bltrainer_does(tokenizer, tmp_path):
    trainer, _ = build(tokenizer, tmp_path, per_device_eval_batch_size=3)
    attach(trainer, "neg_p")
    logs = trainer.evaluate()
    assert {"eval_loss", "eval_nll", "eval_target_prob"} <= trainer.state.log_history[-1].keys()
    assert trainer.state.log_history[-1]["eval_target_prob"] == pytest.approx(1 - logs["eval_loss"])


@pytest.mark.parametrize("threshold", [None, {"above": 0.02, "normalize": "kept"}], ids=str)
def test_the_loss_of_an_evaluation_is_the_mean_over_its_tokens(threshold, tokenizer, tmp_path):
    """However many targets a batch has."""
    trainer, _ = build(tokenizer, tmp_path, per_device_eval_batch_size=1)
    attach(trainer, "neg_p", threshold)
    found, p = trainer.evaluate(), []
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = trainer.model(ids).logits[0, :-1]
        p.append(logits.softmax(-1)[torch.arange(len(labels)), labels.clamp(min=0)][labels != -100])
    assert len({len(each) for each in p}) > 1
    every = torch.cat(p)
    kept = every[every >= 0.02] if threshold else every
    assert found["eval_loss"] == pytest.approx(1 - kept.mean().item())
    assert trainer.state.log_history[-1]["eval_loss"] == found["eval_loss"]


def test_evaluation_leaves_out_what_nothing_predicts_and_what_predict_has_seen(tokenizer, tmp_path):
    tokens = [5, 6, 7, 8, 9, 10, 11, 12]
    packed = Dataset.from_list([{"input_ids": tokens, "position_ids": [0, 1, 2, 0, 1, 2, 3, 4], "labels": tokens}])
    trainer, _ = build(tokenizer, tmp_path, remove_unused_columns=False)
    trainer.data_collator = lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    attach(trainer, "neg_p")
    trainer.predict(trainer.train_dataset.select([0]))
    found = trainer.evaluate(packed)
    with torch.no_grad():
        logits = trainer.model(torch.tensor([tokens]), position_ids=torch.tensor([packed[0]["position_ids"]])).logits
    p = logits[0, :-1].softmax(-1)[torch.arange(7), torch.tensor(tokens[1:])][[0, 1, 3, 4, 5, 6]]
    assert found["eval_loss"] == pytest.approx(1 - p.mean().item())
    assert trainer.state.log_history[-1]["eval_target_prob"] == pytest.approx(p.mean().item())


def test_metrics_of_the_users_own_stay_as_they_are(tokenizer, tmp_path):
    """By whatever name, with several sets, and in a prediction."""
    trainer, _ = build(tokenizer, tmp_path)
    data = trainer.eval_dataset
    attach(trainer, "neg_p")
    trainer.compute_metrics = lambda prediction: {"eval_ce_loss": 42.0, "ce_loss": 41.0, "ce_runtime": 40.0}
    found = trainer.evaluate(eval_dataset=data, metric_key_prefix="eval")
    assert (found["eval_ce_loss"], found["eval_ce_runtime"]) == (41.0, 40.0)  # transformers adds the prefix to the latter two
    assert "eval_ce_nll" not in found
    assert found["eval_loss"] == pytest.approx(1 - found["eval_target_prob"])
    both = trainer.evaluate({"a": data, "b_loss": data})
    assert both["eval_a_nll"] == both["eval_b_loss_nll"] == found["eval_nll"]
    assert both["eval_a_loss"] == both["eval_b_loss_loss"] == found["eval_loss"]
    assert trainer.predict(data).metrics["test_nll"] == found["eval_nll"]


@pytest.mark.parametrize("name", ["nll", "eval_nll", "loss", "eval_loss", "entropy"])
def test_a_metric_of_two_meanings_is_refused(name, tokenizer, tmp_path):
    trainer, _ = build(tokenizer, tmp_path)
    attach(trainer, "neg_p")
    trainer.compute_metrics = compute = lambda prediction: {name: 42.0}
    with pytest.raises(RecipeError, match=f"Cannot report `{name}` twice: `compute_metrics` returns it too"):
        trainer.evaluate()
    assert trainer.compute_metrics is compute


def test_an_evaluation_on_two_processes_counts_each_row_once(tokenizer, tmp_path):
    """Of five rows, accelerate repeats some to fill the last batch."""
    make_double(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    codes, said = ranks(tmp_path, attached.evaluate, tmp_path)
    assert codes == [0, 0], said[0][-4000:]
    found = json.loads((tmp_path / "evaluations.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    unknown = {"joined", "stream"}
    assert {name: each["warned"] for name, each in found.items() if each["warned"]} == {name: [REPEATED] for name in unknown}
    for name in found.keys() - unknown:
        logp = []
        for row in map(attached.packed if name == "packed" else dict, rows(len(tokenizer))[:5]):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            labels[[i for i, at in enumerate(row.get("position_ids", [0])) if at == 0]] = -100
            with torch.no_grad():
                positions = {"position_ids": torch.tensor([row["position_ids"]])} if name == "packed" else {}
                scores = model(ids, use_cache=False, **positions).logits[0, :-1].log_softmax(-1)
            logp.append(scores[torch.arange(len(scores)), labels[1:].clamp(min=0)][labels[1:] != -100])
        every = torch.cat(logp)
        assert found[name]["eval_nll"] == pytest.approx(-every.mean().item()), name
        assert found[name]["eval_loss"] == pytest.approx(1 - every.exp().mean().item()), name


class Dividing(Trainer):
    loss_is_scaled_for_ga = False  # its own loss is a micro-batch's mean


def test_a_trainer_that_divides_by_its_micro_batches_does_not(tokenizer, tmp_path):
    right, _ = expected(tokenizer, tmp_path, CASES["neg_p"])
    trainer, seen = build(tokenizer, tmp_path, kind=Dividing)
    attach(trainer, **CASES["neg_p"])
    trainer.train()
    assert relative_difference(seen.first, right[0]) < 1e-9


class Other(Trainer):
    """Computes a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class Uncounting(Trainer):
    def _get_num_items_in_batch(self, *args):
        return None


def headless(tokenizer):
    """A model that leaves out its logits, as fused kernels do."""
    model = make_llama(tokenizer)
    model.register_forward_hook(lambda module, args, outputs: outputs.__class__(loss=outputs.loss))
    return model


def shifting(tokenizer):
    collate = DataCollatorForSeq2Seq(tokenizer)

    def shifted(features):
        batch = collate(features)
        return {**batch, "labels": torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)}

    return shifted


def unlabelled(tokenizer):
    collate = DataCollatorForSeq2Seq(tokenizer)
    return lambda features: {key: value for key, value in collate(features).items() if key != "labels"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": Other}, "Other computes a loss of its own"),
        ({"kind": Uncounting}, "did not count its targets"),
        ({"model": headless}, "no logits"),
        ({"model": make_mixtral}, "router's auxiliary loss"),
        ({"collator": shifting}, "`labels` are shifted already"),
        ({"collator": unlabelled}, "has no `labels`"),
    ],
)
def test_what_would_be_another_gradient_ends_training_before_the_first_step(given, message, tokenizer, tmp_path):
    made = {name: value(tokenizer) if name != "kind" else value for name, value in given.items()}
    trainer, seen = build(tokenizer, tmp_path, remove_unused_columns=False, **made)
    attach(trainer, "neg_p")
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not seen.all


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor: 0.1`"),
        ({"n_gpu": 2}, "DataParallel"),
        ({"world_size": 2, "average_tokens_across_devices": False}, "`average_tokens_across_devices: true`"),
    ],
)
def test_settings_that_change_the_loss_are_refused(settings, message):
    args = {
        "label_smoothing_factor": 0.0, "n_gpu": 1, "world_size": 1, "average_tokens_across_devices": True,
        "metric_for_best_model": None, "eval_strategy": "no", **settings,
    }  # fmt: skip
    with pytest.raises(RecipeError, match=message):
        refuse_settings(SimpleNamespace(**args), Objective.parse("nll"), Threshold())


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}


@pytest.mark.parametrize("objective", [{"threshold": 0.01}, {"objective": "neg_p"}], ids=str)
@pytest.mark.parametrize(
    "settings",
    [BEST, PLATEAU, {**BEST, "metric_for_best_model": "eval_a_loss"}, {**BEST, "metric_for_best_model": "loss"}],
    ids=["best", "plateau", "one of several sets", "by name"],
)
def test_a_loss_that_compares_no_models_chooses_none(settings, objective, tokenizer, tmp_path):
    trainer, _ = build(tokenizer, tmp_path, **settings)
    with pytest.raises(RecipeError, match=r"Cannot choose by `metric_for_best_model: .*loss`.* Set .*nll`"):
        attach(trainer, **{"objective": "nll", **objective})


def test_nll_chooses_the_best_checkpoint(tokenizer, tmp_path):
    """By its own loss, or by name; never the highest, which transformers takes by default."""
    attach(build(tokenizer, tmp_path, **BEST)[0], "nll")
    attach(build(tokenizer, tmp_path, metric_for_best_model="loss")[0], "neg_p")  # as ms-swift does without evaluation
    trainer, _ = build(tokenizer, tmp_path, **BEST, metric_for_best_model="eval_nll")
    with pytest.raises(RecipeError, match=r"Cannot choose by the highest `eval_nll`.* Set `greater_is_better: false`"):
        attach(trainer, "neg_p")
    settings = {"metric_for_best_model": "nll", "greater_is_better": False, "learning_rate": 0.1, "max_steps": 3}
    trainer, _ = build(tokenizer, tmp_path, **{**BEST, **settings}, eval_steps=1, save_steps=1)
    attach(trainer, "nll", 0.02)
    trainer.train()
    logs = {each["step"]: each["eval_nll"] for each in trainer.state.log_history if "eval_nll" in each}
    assert len(logs) == 3
    assert trainer.state.best_metric == min(logs.values())
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{min(logs, key=logs.get)}")


def test_two_losses_at_once_are_refused(tokenizer, tmp_path):
    trainer, _ = build(tokenizer, tmp_path)
    trainer.args.loss_type = "dft"  # as TRL's own trainer has it
    with pytest.raises(RecipeError, match="Cannot train two losses at once: `loss_type: dft` is another"):
        attach(trainer, "neg_p")
    trainer.args.loss_type = "nll"
    attach(trainer, "neg_p")
    with pytest.raises(RecipeError, match="`compute_loss_func` already"):
        attach(trainer, "nll")


@pytest.mark.parametrize("kind", [IterableDataset.from_generator, list], ids=["stream", "list"])
def test_columns_of_weights_are_refused_where_a_set_names_no_columns(kind, tokenizer, tmp_path):
    trainer, seen = build(tokenizer, tmp_path)
    plain = trainer.train_dataset
    weighted = (
        kind(lambda: ({**row, "objective_weight": 0.0} for row in plain))
        if kind is not list
        else [{**row, "objective_weight": 0.0} for row in plain]
    )
    trainer.train_dataset = weighted
    message = "Cannot use the column `objective_weight` of the train set: only `BLTrainer` weights"
    with pytest.raises(RecipeError, match=message):
        attach(trainer, "neg_p")
    trainer.train_dataset = plain
    attach(trainer, "neg_p")
    trainer.train_dataset = weighted
    with pytest.raises(RecipeError, match=message):
        trainer.train()
    assert not seen.all


class Sized(TorchStream):
    """A stream that knows its length, as TRL's own were."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter([{"a": 1}, {"a": 2}])


class Once(Sized):
    """A stream that can be read once only."""

    def __init__(self):
        self.rows = super().__iter__()

    def __iter__(self):
        return self.rows


def test_a_look_for_weights_takes_no_row():
    for data in (Sized(), Once(), Once().rows):
        refuse_weights(SimpleNamespace(train_dataset=data), set())
        assert [row["a"] for row in data] == [1, 2]


@pytest.mark.parametrize("column", ["objective_weight", "token_weight"])
def test_columns_of_weights_are_refused(column, tokenizer, tmp_path):
    """Also those that only the batch shows, and those of sets that come later."""
    trainer, seen = build(tokenizer, tmp_path)
    plain, weighted = trainer.train_dataset, trainer.train_dataset.add_column(column, [0.0] * len(trainer.train_dataset))
    for kind, sets in (("train", weighted), ("eval", weighted), ("eval", {"one": plain, "other": weighted})):
        trainer.train_dataset, trainer.eval_dataset = (sets, plain) if kind == "train" else (plain, sets)
        with pytest.raises(RecipeError, match=f"Cannot use the column `{column}` of the {kind} set: only `BLTrainer` weights"):
            attach(trainer, "neg_p")
    trainer.eval_dataset = plain
    attach(trainer, "neg_p")
    collate = trainer.data_collator
    trainer.data_collator = lambda features: {**(batch := collate(features)), column: torch.zeros(batch["labels"].shape)}
    for act in (trainer.train, trainer.evaluate):
        with pytest.raises(LossError, match=f"Cannot use `{column}` of a batch: only `BLTrainer` weights rows and tokens"):
            act()
    trainer.train_dataset, trainer.eval_dataset, trainer.data_collator = weighted, weighted, collate
    for act in (trainer.train, trainer.evaluate):
        with pytest.raises(RecipeError, match=f"Cannot use the column `{column}` of the .* set"):
            act()
    assert not seen.all


@pytest.mark.parametrize("kind", ["cp_enabled", "sp_enabled"])
def test_parallelism_that_splits_rows_is_refused(kind, tokenizer, tmp_path):
    trainer, _ = build(tokenizer, tmp_path)
    attach(trainer, "neg_p")
    trainer.accelerator.state.parallelism_config = SimpleNamespace(**{kind: True})
    with pytest.raises(RecipeError, match="`cp_size` and `sp_size` to 1"):
        trainer.get_batch_samples(iter([]), 1, "cpu")


def test_an_encoder_decoder_is_refused(tokenizer, tmp_path):
    trainer, _ = build(tokenizer, tmp_path)
    attach(trainer, "neg_p")
    trainer.model.config.is_encoder_decoder = True
    with pytest.raises(RecipeError, match="the model is an encoder-decoder"):
        trainer.get_batch_samples(iter([]), 1, "cpu")


TOKENS = torch.tensor([[5, 6, 7, 8, 9, 0]])


@pytest.mark.parametrize(
    ("column", "begins"),
    [
        ({}, [0]),
        ({"position_ids": [[0, 1, 2, 0, 1, 2]]}, [0, 3]),
        ({"attention_mask": [[1, 1, 2, 2, 2, 0]]}, [0, 2, 5]),
        ({"attention_mask": [[0, 1, 1, 1, 1, 1]]}, [0, 1]),
        ({"position_ids": [[[0, 1, 2, 0, 1, 2]]] * 3}, [0]),  # of three axes: no place in a row
    ],
)
def test_no_example_has_its_first_token_as_target(column, begins):
    batch = {"input_ids": TOKENS, "labels": TOKENS.clone(), **{name: torch.tensor(value) for name, value in column.items()}}
    labels = with_targets(batch)["labels"]
    assert (labels == -100).nonzero()[:, 1].tolist() == begins
    assert labels[labels != -100].equal(TOKENS[labels != -100])


def test_the_trainer_counts_the_labels_that_the_loss_sees():
    batch = {"input_ids": TOKENS, "labels": TOKENS.clone(), "shift_labels": TOKENS.clone()}
    assert "shift_labels" not in with_targets(batch)


def test_repeated_tokens_are_not_taken_for_shifted_labels():
    same = torch.full((2, 4), 7)
    assert with_targets({"input_ids": same, "labels": same})["labels"][:, 1:].equal(same[:, 1:])


# ---- stand-ins for stacks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "no `objective`"),
        ({"objective": "neg_q"}, "neg_q"),
        ({"objective": "neg_p", "threshold": 2}, "2"),
        ({"objective": "neg_p", "stage": "dpo"}, "stage 'dpo'"),
        ({"objective": "neg_p", "use_mca": True}, "`use_mca`"),
        ({"objective": "neg_p", "use_ray": True}, "`use_ray`"),
    ],
)
def test_llamafactory_recipes_that_would_train_something_else(recipe, message):
    with pytest.raises(ValueError, match=message):
        llamafactory.train(recipe)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no `objective`"),
        ({"bl_trainer": {"objectiv": "neg_p"}}, "no `objective`"),
        ({"bl_trainer": {"objective": "neg_p", "treshold": 0.2}}, "no key 'treshold'"),
        ({"bl_trainer": {"objective": "neg_q"}}, "neg_q"),
        ({"bl_trainer": {"objective": "neg_p"}, "use_eaft": True}, "`use_eaft`"),
        ({"bl_trainer": {"objective": "neg_p"}, "rl": "dpo"}, "`rl`"),
        ({"bl_trainer": {"objective": "neg_p"}, "context_parallel_size": 2}, "`context_parallel_size: 1`"),
    ],
)
def test_axolotl_configs_that_would_train_something_else(config, message):
    with pytest.raises(ValueError, match=message):
        axolotl.check(config)


def swift_trainer(**template):
    template = {"sequence_parallel_size": 1, "task_type": "causal_lm", **template}
    accelerator = SimpleNamespace(num_processes=2)
    return SimpleNamespace(
        template=SimpleNamespace(**template), get_batch_samples=None, compute_loss=None, log=None, evaluation_loop=None,
        prediction_step=None, accelerator=accelerator, model=SimpleNamespace(training=True), model_accepts_loss_kwargs=True,
    )  # fmt: skip


SWIFT = {
    "label_smoothing_factor": 0.0, "n_gpu": 1, "world_size": 1, "enable_dft_loss": False, "gradient_accumulation_steps": 1,
    "metric_for_best_model": "loss", "greater_is_better": False, "eval_strategy": "no",
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "args", "message"),
    [
        ({"sequence_parallel_size": 2}, {}, "`sequence_parallel_size: 1`"),
        ({"task_type": "embedding"}, {}, "`task_type: embedding`"),
        ({}, {"enable_dft_loss": True}, "`enable_dft_loss`"),
        ({}, {"label_smoothing_factor": 0.1}, "`label_smoothing_factor: 0.1`"),
        ({}, {"eval_strategy": "steps"}, "`metric_for_best_model: loss`"),
    ],
)
def test_swift_settings_that_would_train_something_else(template, args, message):
    with pytest.raises(RecipeError, match=message):
        swift.SwiftLoss(swift_trainer(**template), SimpleNamespace(**{**SWIFT, **args}), "neg_p")


def test_swift_registers_a_loss_that_scales_as_its_trainer_does_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.loss", SimpleNamespace(loss_map={}))
    swift.register("neg_p", name="mine")
    trainer = swift_trainer()
    trainer.args = SimpleNamespace(**SWIFT)
    loss = sys.modules["swift.loss"].loss_map["mine"](trainer.args, trainer)
    outputs, labels = SimpleNamespace(logits=torch.randn(1, 4, 9)), torch.tensor([[1, 2, 3, 4]])
    whole = loss(outputs, labels, num_items_in_batch=3)
    trainer.model_accepts_loss_kwargs = False
    assert loss(outputs, labels, num_items_in_batch=3) == 2 * whole
    with pytest.raises(LossError, match="`loss_scale: default`"):
        loss(outputs, labels, num_items_in_batch=3, loss_scale=torch.ones(1, 4))


def test_swift_keeps_4_bit_weights_trainable(monkeypatch):
    """Its trainer has no model yet when it makes its loss."""
    layer = torch.nn.Linear(2, 2)
    layer.support_avx512bf16_for_cpu = True  # as a layer of bitsandbytes has it
    for first in ("get_batch_samples", "evaluation_loop"):
        trainer = swift_trainer()
        del trainer.model
        trainer.get_batch_samples = trainer.evaluation_loop = lambda *args, **prefix: SimpleNamespace(metrics={})
        trainer.accelerator.parallelism_config, trainer.accelerator.reduce = None, lambda sums: sums
        swift.SwiftLoss(trainer, SimpleNamespace(**SWIFT), "neg_p")
        trainer.model, layer.support_avx512bf16_for_cpu = torch.nn.Sequential(layer), True
        getattr(trainer, first)([])
        assert layer.support_avx512bf16_for_cpu is False


def test_unsloth_needs_its_logits(monkeypatch, tokenizer, tmp_path):
    trainer, _ = build(tokenizer, tmp_path)
    monkeypatch.delenv("UNSLOTH_RETURN_LOGITS", raising=False)
    with pytest.raises(RecipeError, match="`UNSLOTH_RETURN_LOGITS=1`"):
        unsloth.attach(trainer, "neg_p")
    monkeypatch.setenv("UNSLOTH_RETURN_LOGITS", "1")
    trainer.args.loss_type = "dft"
    with pytest.raises(RecipeError, match="`loss_type: dft`"):
        unsloth.attach(trainer, "neg_p")
    trainer.args.loss_type = "nll"
    unsloth.attach(trainer, "neg_p")
    assert isinstance(trainer.compute_loss_func, TrainerLoss)


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def test_verl_loss_is_the_mean_over_targets_of_the_global_batch():
    torch.manual_seed(0)
    lengths, vocabulary = (5, 3, 4), 9
    tokens = [torch.randint(vocabulary, (length,)) for length in lengths]
    mask = [torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0, 1])]
    logits = [torch.randn(length, vocabulary, dtype=torch.float64, requires_grad=True) for length in lengths]
    # verl's log p of a row's last token is of the next row's first: nothing that counts
    following = [torch.cat([row[1:], row[:1]]) for row in tokens]
    logp = [x.log_softmax(-1).gather(1, y[:, None])[:, 0] for x, y in zip(logits, following, strict=True)]
    data = {"input_ids": nested(tokens), "loss_mask": nested(mask), "batch_num_tokens": 10, "dp_size": 2}
    loss, metrics = verl.SFTLoss("neg_p", 0.05)(None, {"log_probs": nested(logp)}, data)
    p = torch.cat([each[:-1][kept[1:].bool()] for each, kept in zip(logp, mask, strict=True)]).exp()
    assert loss.item() == pytest.approx((1 - p)[p >= 0.05].sum().item() / 10 * 2)
    assert metrics == {}
    loss.backward()
    assert all(each.grad is not None for each in logits)


def test_verl_takes_padded_responses():
    logp, mask = torch.tensor([[-1.0, -2.0, -50.0]]), torch.tensor([[1, 1, 0]])
    data = {"response_mask": mask, "batch_num_tokens": 4, "dp_size": 1}
    loss, _ = verl.SFTLoss("nll")(None, {"log_probs": logp}, data)
    assert loss.item() == pytest.approx(3 / 4)


def test_verl_refuses_what_it_cannot_know():
    with pytest.raises(ValueError, match="without training progress"):
        verl.SFTLoss("anneal")
    data = {"input_ids": nested([torch.tensor([1, 2])]), "loss_mask": nested([torch.tensor([1, 1])])}
    with pytest.raises(LossError, match="a row's first token"):
        verl.SFTLoss("nll")(None, {"log_probs": nested([torch.tensor([-1.0, -1.0])])}, data)


def test_verl_finds_the_loss_installed(monkeypatch):
    losses = SimpleNamespace(sft_loss=None)
    for name in ("verl", "verl.workers", "verl.workers.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["verl.workers.utils"].losses = losses
    verl.install("neg_p")
    assert isinstance(losses.sft_loss, verl.SFTLoss)


# ---- the pages ----------------------------------------------------------------------------------


def snippet(stack, language="python"):
    page = (ROOT / "docs" / "guide" / "adapters" / f"{stack}.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return found


@pytest.mark.parametrize("stack", ["transformers", "unsloth"])
def test_snippet_trains(stack, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_RETURN_LOGITS", "0")
    given = {
        "Trainer": Trainer, "model": make_llama(tokenizer), "args": TrainingArguments(**options(tmp_path)),
        "train_dataset": Dataset.from_list(rows(len(tokenizer))), "data_collator": DataCollatorForSeq2Seq(tokenizer),
    }  # fmt: skip
    exec(snippet(stack), {**given, "SFTTrainer": partial(Trainer, data_collator=given["data_collator"])}, found := {})
    assert found["trainer"].state.global_step == 2
    assert found["trainer"].state.log_history[0]["kept_fraction"] < 1


def test_snippets_are_those_of_the_files_that_runs_read():
    configs = ROOT / "configs" / "adapters"
    for stack in ("swift", "verl"):
        assert snippet(stack) in (configs / f"{stack}_objective.py").read_text(encoding="utf-8")
    config = yaml.safe_load(snippet("axolotl", "yaml"))
    axolotl.check(config)
    assert config.items() <= yaml.safe_load((configs / "axolotl.yaml").read_text(encoding="utf-8")).items()
    for page in (ROOT / "docs" / "guide" / "adapters").glob("*.md"):
        for path in re.findall(r"(?:\.\./)*((?:configs|studies)/[\w./]+)", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), path


def test_page_states_what_make_adapters_printed():
    page, results = ((ROOT / "docs" / "guide" / "adapters" / name).read_text() for name in ("README.md", "results.txt"))
    runs = re.findall(r"^(\S+): (.*); (double|single), (\d) process\(es\): (.*)$", results, re.MULTILINE)
    kinds = ("double", "1"), ("double", "2"), ("single", "1")
    wanted = [(stack, *kind) for stack in ("axolotl", "llamafactory", "swift") for kind in kinds]
    wanted += [("llamafactory-packed", "single", "1"), ("unsloth", "double", "1"), ("unsloth", "single", "1")]
    assert sorted((stack, dtype, count) for stack, _, dtype, count, _ in runs) == sorted(wanted)
    for _, _, dtype, _, differences in runs:
        assert max(float(each.split()[1]) for each in differences.split(", ")) < {"double": 1e-14, "single": 1e-5}[dtype]
    assert "In float64 the\nrelative difference was below 1e-14 in each case, in float32 below 1e-5." in page
    installs = re.findall(r"^install beside (\w+), .*: losses and adapters work\. ", results, re.MULTILINE)
    assert {*installs} == {"torch", "axolotl", "llamafactory", "swift", "unsloth", "verl"}
    tried = re.findall(r"^\| \[[\w-]+\]\((\w+)\.md\) \| [^|]+ \| ([\d.]+) \|", page, re.MULTILINE)
    assert len(tried) == 6
    assert all(version in results for stack, version in tried if stack != "transformers")
