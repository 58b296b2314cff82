"""`BLTrainer` against `SFTTrainer`, against plain transformers, and against itself with the batch cut up in other ways."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from bl_trainer import BLConfig, BLTrainer, Objective, Threshold
from bl_trainer.errors import RecipeError
from bl_trainer.head.patch import add_scoring
from bl_trainer.objectives.pricing import METRICS
from bl_trainer.tokens.row_hash import sample_of
from bl_trainer.training.checkpoints import RECORD_FILE
from bl_trainer.training.loss import ObjectiveLoss, TRLHead
from bl_trainer.training.resume import _warn_of_other_rows
from conftest import gap_near, make_double, make_llama, make_mixtral
from ways import LORA, WAYS, Gradients, Ordered, build, relative_difference, resolve, train, weights

SPECS = ["nll", "neg_p", {"name": "power", "alpha": 10}, {"name": "power", "alpha": -0.5}, "log_one_minus_p"]


AS_DFT = ["full", "mixture_of_experts", "vision_language", "lora", "packing_bfd", "padding_free", "completion_only", "bf16"]
PAIRS = [("nll", "nll", way) for way in WAYS] + [("neg_p", "dft", way) for way in AS_DFT]


@pytest.mark.parametrize(("ours", "theirs", "way"), PAIRS, ids=map("-".join, PAIRS))
def test_trains_as_trl_does(ours, theirs, way, tokenizer, tmp_path, request):
    """Bit for bit under TRL's own head; of `dft` near, with an `adam_epsilon` that keeps rounding small."""
    processor, data, options = resolve(way, tokenizer, request)
    make = options.pop("make")
    options |= {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_grad_norm": 1.0}
    options |= {"adam_epsilon": 1e-3}
    reference = train(SFTTrainer, processor, data, tmp_path, model=make(processor), loss_type=theirs, **options)
    trainer = train(BLTrainer, processor, data, tmp_path, model=make(processor), objective=ours, loss_head="trl", **options)
    start, expected, actual = dict(make(processor).named_parameters()), weights(reference), weights(trainer)
    moved = [name for name, p in expected.items() if name not in start or not torch.equal(p, start[name])]
    assert moved, "the reference didn't train"
    for name, p in expected.items():
        if ours == "nll":
            assert torch.equal(actual[name], p), name
        else:  # p log p in float32 rounds differently from -expm1
            torch.testing.assert_close(actual[name], p, rtol=1e-3, atol=1e-3 if way == "bf16" else 1e-5)
    if ours == "nll":
        assert [x["loss"] for x in trainer.state.log_history if "loss" in x] == [
            x["loss"] for x in reference.state.log_history if "loss" in x
        ]


def test_says_what_trains_in_one_line(tokenizer, text_data, tmp_path, capsys):
    build(BLTrainer, tokenizer, text_data, tmp_path, max_steps=1).train()
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("Training:")]
    tokens = sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in text_data)
    what = "Training: objective nll, no threshold, loss head bl_trainer's own"
    assert lines == [f"{what}; 32 rows of {tokens:,} tokens, 1 step on 1 cpu process."]
    build(BLTrainer, tokenizer, text_data, tmp_path, max_steps=1, loss_head="trl").train()
    assert "loss head TRL's, since `loss_head: trl` asks for it; " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cp", "sp", "tp", None])
def test_head_of_sequences_shared_out_by_others_is_trls(kind, tokenizer, text_data, tmp_path, monkeypatch):
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path)
    sizes = SimpleNamespace(**{f"{name}_size": 1 + (name == kind) for name in ("cp", "sp", "tp")})
    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", sizes)
    assert (trainer._why_reference_head() is None) is (kind != "sp")


def first_gradient(tokenizer, data, tmp_path, model=None, **options):
    """Train a step in float64, or with the model given, and return the gradient."""
    seen = Gradients()
    train(Ordered, tokenizer, data, tmp_path, make_double(tokenizer) if model is None else model, callbacks=[seen], **options)
    return seen.first


@pytest.fixture(scope="session")
def band(tokenizer, text_data):
    """Return a threshold near the two probabilities, with no token near it."""
    p = reference_tokens(make_double(tokenizer), tokenizer, text_data["text"])[2]
    return lambda above, below: {"above": gap_near(p, above), "below": gap_near(p, below)}


CUTS = [(2, 4), (1, 8)]


def cut_up(make, tokenizer, text_data, tmp_path, **options):
    """Return the gradient of a batch of 8, and those of the same batch cut into micro-batches."""
    return (
        first_gradient(
            tokenizer, text_data, tmp_path, make(tokenizer), per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, **options,
        )
        for size, steps in [(8, 1), *CUTS]
    )  # fmt: skip


@pytest.mark.parametrize("is_cut", [False, True], ids=["all", "band"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradient_does_not_depend_on_accumulation(spec, is_cut, tokenizer, text_data, tmp_path, band):
    threshold = band(0.01, 0.3) if is_cut else None
    whole, *parts = cut_up(make_double, tokenizer, text_data, tmp_path, objective=spec, threshold=threshold)
    assert whole.norm() > 0
    for part in parts:
        assert relative_difference(part, whole) < 1e-9


def test_gradient_in_float32_hardly_depends_on_accumulation(tokenizer, text_data, tmp_path, band):
    whole, *parts = cut_up(make_llama, tokenizer, text_data, tmp_path, objective="neg_p", threshold=band(0.01, 0.3))
    for part in parts:
        assert relative_difference(part, whole) < 1e-4


def test_a_schedule_does_not_depend_on_accumulation(tokenizer, text_data, tmp_path):
    """Where alpha is in each step, that is to say, which is not where it was in the last."""
    logs, objective = [], {"name": "power", "alpha": {"from": 0, "to": 4}}
    for size, steps in ((8, 1), (2, 4)):
        trainer = train(
            BLTrainer, tokenizer, text_data, tmp_path / str(size), make_double(tokenizer), objective=objective,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=4, learning_rate=1e-3,
            logging_steps=1, adam_epsilon=1e-3,
        )  # fmt: skip
        logs.append([log for log in trainer.state.log_history if "gradient_weight" in log][:4])
    for whole, cut in zip(*logs, strict=True):
        assert cut["gradient_weight"] == pytest.approx(whole["gradient_weight"], rel=1e-9)
        assert cut["nll"] == pytest.approx(whole["nll"], rel=1e-9)
    assert logs[0][0]["gradient_weight"] == 1
    assert all(a["gradient_weight"] > b["gradient_weight"] for a, b in itertools.pairwise(logs[0]))


LAYOUTS = [
    {"pad_to_multiple_of": 64},
    {"padding_free": True},
    {"packing": True, "max_length": 64, "per_device_train_batch_size": 64},
    {"packing": True, "max_length": 64, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 64},
]


def laid_out(make, spec, options, tokenizer, text_data, tmp_path, band):
    """Return the gradients of one step over the whole set, so that packing can't change which examples it sees."""
    common = {"objective": spec, "threshold": band(0.001, 0.5), "per_device_train_batch_size": 32}
    return (first_gradient(tokenizer, text_data, tmp_path, make(tokenizer), **{**common, **more}) for more in ({}, options))


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("spec", ["nll", {"name": "power", "alpha": 10}, f"{__name__}:uses_everything"], ids=str)
def test_gradient_does_not_depend_on_padding_or_packing(spec, options, tokenizer, text_data, tmp_path, band):
    assert relative_difference(*laid_out(make_double, spec, options, tokenizer, text_data, tmp_path, band)) < 1e-9


@pytest.mark.parametrize("options", LAYOUTS[1:3], ids=str)
def test_gradient_in_float32_hardly_depends_on_packing(options, tokenizer, text_data, tmp_path, band):
    assert relative_difference(*laid_out(make_llama, "neg_p", options, tokenizer, text_data, tmp_path, band)) < 1e-4


# Objectives of our own, found by import path


def uses_everything(logp, entropy, log_sum_sq_probs, is_top1, label, progress):
    weight = (0.1 + entropy.detach()) * log_sum_sq_probs.exp() * (1 + is_top1) * (1 + label) * (1 + progress)
    return -logp * weight


def pushes_entropy(logp, entropy):
    return -torch.expm1(logp) - 0.1 * entropy


def test_config_records_a_function_by_its_import_path(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    args = BLConfig(objective=uses_everything, **options)
    assert args.objective == args.to_dict()["objective"] == f"{__name__}:uses_everything"
    assert args.parsed_objective.function is uses_everything
    assert BLConfig(objective=Objective("nll"), **options).objective == {"name": "nll"}
    with pytest.raises(RecipeError, match="it is a lambda, so it cannot be imported"):
        BLConfig(objective=lambda logp: -logp, **options)


def reference_tokens(model, tokenizer, texts, prompts=None):
    """Return the target tokens' log-probabilities over the vocabulary, labels, and p, from a plain forward of each text."""
    logp, labels = [], []
    for i, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        start = len(tokenizer(prompts[i])["input_ids"]) if prompts else 1
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        logp.append(rows[start - 1 : -1])
        labels.append(torch.tensor(ids[start:]))
    rows, labels = torch.cat(logp), torch.cat(labels)
    return rows, labels, rows.gather(1, labels[:, None])[:, 0].exp()


def reference_metrics(model, tokenizer, texts, objective, threshold, prompts=None):
    rows, labels, p = reference_tokens(model, tokenizer, texts, prompts)
    logp = p.log()
    kept = threshold.keep(logp)
    cost = torch.where(kept, objective(logp), 0)
    metrics = {
        "nll": -logp,
        "target_prob": p,
        "kept_fraction": kept.double(),
        "gradient_weight": torch.where(kept, objective.gradient_weight(logp), 0),
        "entropy": -(rows.exp() * rows).sum(-1),
        "mean_token_accuracy": (rows.argmax(-1) == labels).double(),
        "loss": cost,
    }
    means = {name: values.mean().item() for name, values in metrics.items()}
    if threshold.normalize == "kept":
        means["loss"] /= means["kept_fraction"]
    return means


@pytest.mark.parametrize("threshold", [None, 0.01, {"above": 0.01, "normalize": "kept"}], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_evaluation_is_exact_over_the_whole_set(spec, threshold, tokenizer, pair_data, tmp_path):
    model = make_double(tokenizer)
    data = pair_data.select(range(11))  # the last batch is smaller than the others
    texts = [row["prompt"] + row["completion"] for row in data]
    if threshold is not None:
        kept = threshold if isinstance(threshold, dict) else {}
        threshold = {**kept, "above": gap_near(reference_tokens(model, tokenizer, texts, data["prompt"])[2], 0.01)}
    trainer = build(
        BLTrainer, tokenizer, data, tmp_path, model, eval_data=data, objective=spec, threshold=threshold,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    actual = trainer.evaluate()
    expected = reference_metrics(model, tokenizer, texts, Objective.parse(spec), Threshold.parse(threshold), data["prompt"])
    expected["perplexity"] = math.exp(expected["nll"])
    for name, value in expected.items():
        assert actual[f"eval_{name}"] == pytest.approx(value, rel=1e-9), name
    assert trainer.state.log_history[-1].items() >= {k: actual[k] for k in ("eval_nll", "eval_entropy")}.items()


def test_evaluation_in_float32_is_near(tokenizer, pair_data, tmp_path):
    options = {"eval_data": pair_data, "objective": "neg_p", "per_device_eval_batch_size": 4}
    found = build(BLTrainer, tokenizer, pair_data, tmp_path, **options).evaluate()
    wide = build(BLTrainer, tokenizer, pair_data, tmp_path, make_double(tokenizer), **options).evaluate()
    for name in ("loss", *METRICS):
        assert found[f"eval_{name}"] == pytest.approx(wide[f"eval_{name}"], rel=1e-4), name


def test_training_metrics_are_token_weighted_over_micro_batches_and_steps(tokenizer, text_data, tmp_path, band):
    threshold = band(0.01, 0.9)
    trainer = train(
        Ordered, tokenizer, text_data, tmp_path, make_double(tokenizer), objective="neg_p", threshold=threshold,
        learning_rate=0.0, max_steps=4, logging_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3,
    )  # fmt: skip
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for i, log in enumerate(logs):
        texts = [row["text"] for row in text_data.select(range(12 * i, 12 * i + 12))]
        parsed = Objective.parse("neg_p"), Threshold.parse(threshold)
        expected = reference_metrics(make_double(tokenizer), tokenizer, texts, *parsed)
        for name in ("nll", "target_prob", "kept_fraction", "gradient_weight", "entropy", "mean_token_accuracy"):
            assert log[name] == pytest.approx(expected[name], rel=1e-9), name


def test_evaluation_loss_of_a_mixture_of_experts_has_the_auxiliary_loss(tokenizer, text_data, tmp_path):
    options = {"eval_data": text_data, "per_device_eval_batch_size": 32}
    ours, theirs = (
        build(trainer_class, tokenizer, text_data, tmp_path, make_mixtral(tokenizer), **options).evaluate()
        for trainer_class in (BLTrainer, SFTTrainer)
    )
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)  # one batch: TRL's is exact too
    assert ours["eval_loss"] - ours["eval_nll"] == pytest.approx(0.5 * theirs["eval_aux_loss"], rel=1e-4)


def test_auxiliary_loss_comes_to_the_device_of_the_loss(tokenizer, monkeypatch):
    """As where `device_map` spreads layers over devices: the routers' loss is made where the first layer is."""
    model, ids, there = make_mixtral(tokenizer), torch.arange(5, 13)[None], torch.device("meta")
    add_scoring(model)
    monkeypatch.setattr("bl_trainer.head.patch._aux_loss", lambda *args: SimpleNamespace(to=lambda place: place))
    found = model(ids, labels=ids, output_router_logits=True, use=lambda *parts: None)
    assert found.aux_loss == model.lm_head.weight.device
    outputs = {name: torch.zeros(1, 7, device=there) for name in ("log_probs", "entropy")}
    flags = {name: torch.ones(1, 7, dtype=torch.bool, device=there) for name in ("label_mask", "is_top1")}
    trls = lambda **inputs: SimpleNamespace(**outputs, **flags, aux_loss=torch.tensor(0.5))  # noqa: E731
    tokens = ObjectiveLoss(Objective.parse("neg_p"), Threshold(), TRLHead())(trls, {"input_ids": ids, "labels": ids}, 0.0)
    assert tokens.aux_loss.device == tokens.cost.device == there


@pytest.mark.parametrize("name", ["nll", "entropy", "loss", "perplexity", "num_tokens", "objective_alpha", "eval_nll"])
def test_a_metric_of_the_users_own_does_not_take_a_name_of_ours(name, tokenizer, text_data, tmp_path):
    objective = {"name": "power", "alpha": {"from": 0, "to": 1}}
    options = {"eval_data": text_data.select(range(4)), "compute_metrics": lambda prediction: {name: 42.0}}
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path, objective=objective, **options)
    with pytest.raises(
        RecipeError, match=f"`compute_metrics` returns `{name}`, a name of the trainer's own metrics. Rename it"
    ):
        trainer.evaluate()
    trainer.compute_metrics = lambda prediction: {"own": 42.0}
    assert trainer.evaluate()["eval_own"] == 42.0


def test_several_evaluation_sets_have_metrics_of_their_own(tokenizer, text_data, tmp_path):
    parts = {"a": text_data.select(range(9)), "b": text_data.select(range(9, 20))}
    trainer = train(
        BLTrainer, tokenizer, text_data, tmp_path, make_double(tokenizer), eval_data=parts, eval_strategy="steps",
        eval_steps=1, learning_rate=0.0, per_device_eval_batch_size=4, load_best_model_at_end=True, save_strategy="steps",
        save_steps=1, metric_for_best_model="eval_b_nll",
    )  # fmt: skip
    logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    for name, part in parts.items():
        expected = reference_metrics(
            make_double(tokenizer), tokenizer, part["text"], Objective.parse("nll"), Threshold.parse(None)
        )
        assert logs[f"eval_{name}_nll"] == pytest.approx(expected["nll"], rel=1e-9)
        assert logs[f"eval_{name}_entropy"] == pytest.approx(expected["entropy"], rel=1e-9)
    assert trainer.state.best_metric == logs["eval_b_nll"]
    assert not {f"eval_{metric}" for metric in METRICS} & logs.keys()


@pytest.mark.parametrize(
    ("options", "metric", "greater"),
    [
        ({}, "loss", False),
        ({"objective": {"name": "nll"}}, "loss", False),
        ({"objective": "neg_p"}, "eval_nll", False),
        ({"objective": {"name": "nll", "floor": 0.5}}, "eval_nll", False),
        ({"threshold": 0.2}, "eval_nll", False),
        ({"objective": "dft", "metric_for_best_model": "eval_target_prob"}, "eval_target_prob", True),
    ],
    ids=str,
)
@pytest.mark.parametrize("needs", [{"load_best_model_at_end": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}], ids=str)
def test_best_model_is_chosen_by_nll_unless_the_loss_is_it(needs, options, metric, greater, tmp_path):
    config = BLConfig(output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", **needs, **options)
    assert (config.metric_for_best_model, config.greater_is_better) == (metric, greater)


def test_no_metric_is_chosen_where_none_is_needed(tmp_path):
    assert BLConfig(output_dir=str(tmp_path), use_cpu=True, objective="neg_p").metric_for_best_model is None


@pytest.mark.parametrize("metric", ["eval_nll", "nll", "eval_perplexity"])
def test_best_model_has_the_lowest_nll(metric, tmp_path):
    assert BLConfig(output_dir=str(tmp_path), metric_for_best_model=metric, use_cpu=True).greater_is_better is False
    assert BLConfig(output_dir=str(tmp_path), metric_for_best_model="eval_target_prob", use_cpu=True).greater_is_better


def test_statistics_reach_the_objective_aligned(tokenizer, pair_data, tmp_path):
    data, model = pair_data.select(range(8)), make_double(tokenizer)
    gradient = first_gradient(tokenizer, data, tmp_path, objective=f"{__name__}:uses_everything")
    total, count = 0.0, 0
    for row in data:
        prompt, ids = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
        ids = torch.tensor([*ids, tokenizer.eos_token_id])
        rows = model(ids[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        label = ids[len(prompt) :]
        logp = rows.gather(1, label[:, None])[:, 0]
        entropy, sum_sq = -(rows.exp() * rows).sum(-1), (2 * rows).exp().sum(-1).detach()
        total = total + uses_everything(logp, entropy, sum_sq.log(), rows.argmax(-1) == label, label, 0.0).sum()
        count += len(label)
    (total / count).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert relative_difference(gradient, expected) < 1e-9


def test_gradient_flows_through_the_entropy(tokenizer, text_data, tmp_path):
    gradient = first_gradient(tokenizer, text_data, tmp_path, objective=f"{__name__}:pushes_entropy")
    plain = first_gradient(tokenizer, text_data, tmp_path, objective="neg_p")
    assert relative_difference(gradient, plain) > 0.01
    parts = first_gradient(
        tokenizer, text_data, tmp_path, objective=f"{__name__}:pushes_entropy", per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    assert relative_difference(parts, gradient) < 1e-9


def test_only_what_the_objective_names_is_computed(tokenizer, text_data, tmp_path):
    for spec, expected in (("neg_p", False), (f"{__name__}:uses_everything", True)):
        trainer = build(BLTrainer, tokenizer, text_data, tmp_path, objective=spec)
        batch = next(iter(trainer.get_train_dataloader()))
        outputs = trainer.model(**batch, fused_lm_head=True)
        assert (outputs.log_sum_sq_probs is not None) is expected


seen_labels = []


def remembers_labels(logp, label):
    seen_labels.append(label)
    return -logp


@pytest.mark.parametrize("head", ["trl", "auto"])
@pytest.mark.parametrize("virtual_tokens", [0, 5])
def test_labels_are_aligned_with_virtual_tokens(virtual_tokens, head, tokenizer, text_data, tmp_path):
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens) if virtual_tokens else None
    seen_labels.clear()
    trainer = build(
        BLTrainer, tokenizer, text_data, tmp_path, peft_config=peft_config, objective=f"{__name__}:remembers_labels",
        loss_head=head,
    )  # fmt: skip
    seen_labels.clear()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(batch))
    (labels,) = seen_labels
    given = batch["labels"] if virtual_tokens else batch["labels"][:, 1:]
    if head == "trl":
        assert torch.equal(labels[:, max(virtual_tokens - 1, 0) :], given.clamp(min=0))
    else:
        assert torch.equal(labels, given[given != -100])


seen_progress = []


def remembers_progress(logp, progress):
    seen_progress.append(progress)
    return -logp


def test_progress_runs_from_0_to_1(tokenizer, text_data, tmp_path):
    seen_progress.clear()
    trainer = train(
        BLTrainer, tokenizer, text_data, tmp_path, objective=f"{__name__}:remembers_progress", max_steps=4,
        gradient_accumulation_steps=2, eval_data=text_data.select(range(4)),
    )  # fmt: skip
    steps = seen_progress[-8:]
    assert steps == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    trainer.evaluate()
    assert seen_progress[-1] == 1


def test_normalising_by_kept_tokens_weighs_micro_batches_alike(tokenizer, text_data, tmp_path):
    """As the paper's code: the mean over micro-batches of sum over kept f / number of kept tokens."""
    model = make_double(tokenizer)
    above = gap_near(reference_tokens(model, tokenizer, text_data["text"][:8])[2], 0.01)
    gradient = first_gradient(
        tokenizer, text_data, tmp_path, objective="neg_p", threshold={"above": above, "normalize": "kept"},
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    loss = 0.0
    for start in range(0, 8, 2):
        costs = []
        for text in text_data[start : start + 2]["text"]:
            ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
            p = model(ids[None]).logits[0, :-1].softmax(-1).gather(1, ids[1:, None])[:, 0]
            costs.append((1 - p)[p >= above])
        loss = loss + torch.cat(costs).mean() / 4
    loss.backward()
    assert relative_difference(gradient, torch.cat([p.grad.flatten() for p in model.parameters()])) < 1e-9


@pytest.mark.parametrize("normalize", ["tokens", "kept"])
def test_a_batch_with_nothing_to_train_on_is_a_finite_connected_zero(normalize, tokenizer, text_data, tmp_path, caplog):
    trainer = train(
        BLTrainer, tokenizer, text_data, tmp_path, threshold={"above": 1.0, "normalize": normalize}, max_steps=2,
        optim="sgd",
    )  # fmt: skip
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [0, 0]
    for name, p in make_llama(tokenizer).named_parameters():
        assert torch.equal(dict(trainer.model.named_parameters())[name], p), name
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch).backward()
    for name, p in trainer.model.named_parameters():
        assert p.grad is not None, name
        assert not p.grad.any(), name


def test_a_run_that_keeps_nothing_says_so(tokenizer, text_data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.training.guards.logger.warning", said.append)
    train(BLTrainer, tokenizer, text_data, tmp_path, threshold=0.01)
    assert not said
    train(BLTrainer, tokenizer, text_data, tmp_path, threshold=1.0, max_steps=3, logging_steps=1)
    assert len(said) == 1  # of three logs
    assert said[0].startswith("Nothing trains: since the last log no target token was within `threshold: 1.0` (kept_fraction 0")


def test_a_run_that_ends_with_an_evaluation_reports_its_last_steps(tokenizer, text_data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.training.guards.logger.warning", said.append)
    trainer = train(
        BLTrainer, tokenizer, text_data, tmp_path, max_steps=4, logging_steps=10, eval_strategy="steps", eval_steps=4,
        eval_data=text_data.select(range(4)), threshold=1.0,
    )  # fmt: skip
    assert trainer.state.log_history[-1]["kept_fraction"] == 0
    assert len(said) == 1  # from training, not from the evaluation
    assert trainer.token_metrics.is_empty


def test_a_diverged_model_shows_in_the_loss(tokenizer, text_data, tmp_path):
    for trainer_class in (SFTTrainer, BLTrainer):
        model = make_llama(tokenizer)
        model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = math.nan
        trainer = build(trainer_class, tokenizer, text_data, tmp_path, model, eval_data=text_data, logging_nan_inf_filter=False)
        trainer.train()
        assert math.isnan(trainer.state.log_history[0]["loss"])
        assert math.isnan(trainer.evaluate()["eval_loss"])


def test_an_infinite_gradient_is_said(tokenizer, text_data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.training.guards.logger.warning", said.append)
    model = make_llama(tokenizer)
    model.lm_head.weight.data *= 20
    train(
        BLTrainer, tokenizer, text_data, tmp_path, model=model, objective={"name": "power", "alpha": -1}, max_grad_norm=1.0
    )  # fmt: skip
    assert said[0].startswith("grad_norm is inf: this step changes nothing")


def test_config_is_serialisable(tmp_path):
    args = BLConfig(output_dir=str(tmp_path), use_cpu=True, objective=Objective.parse("neg_p"), threshold=Threshold(0.2))
    assert json.loads(args.to_json_string())["objective"] == {"name": "neg_p"}


def test_a_step_without_a_target_does_not_break_the_metrics(tokenizer, tmp_path):
    rows = [{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}] * 8 + [{"input_ids": [4, 5, 6], "labels": [-100] * 3}] * 8
    trainer = train(Ordered, tokenizer, Dataset.from_list(rows), tmp_path, objective="neg_p", max_steps=2)
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] > 0
    assert second["loss"] == 0
    assert math.isnan(second["nll"])


@pytest.mark.parametrize("objective", [f"{__name__}:uses_everything", "anneal"])
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(objective, tokenizer, text_data, tmp_path):
    options = {
        "objective": objective, "threshold": 0.005, "max_steps": 6, "save_strategy": "steps",
        "save_steps": 3, "logging_steps": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear",
    }  # fmt: skip
    for peft_config in (None, LORA):
        folder = tmp_path / str(peft_config is None)
        whole = train(BLTrainer, tokenizer, text_data, folder, peft_config=peft_config, **options)
        again = build(BLTrainer, tokenizer, text_data, folder, peft_config=peft_config, **options)
        again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-3"))
        for name, p in weights(whole).items():
            assert torch.equal(weights(again)[name], p), name


@pytest.mark.parametrize("change", [{"learning_rate": 0.5}, {"weight_decay": 0.5}, {"adam_beta1": 0.1}, {"adam_epsilon": 1.0}])
def test_a_run_is_not_resumed_by_settings_that_its_optimizer_would_not_take(change, tokenizer, text_data, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    train(BLTrainer, tokenizer, text_data, tmp_path, max_steps=1, **options)
    again = build(BLTrainer, tokenizer, text_data, tmp_path, max_steps=2, **options, **change)
    (key,) = change
    with pytest.raises(ValueError, match=f"Cannot resume from .*checkpoint-1: its optimizer keeps .*{key}.* is asked for"):
        again.train(resume_from_checkpoint=True)


def test_a_longer_run_goes_on_by_its_own_schedule_and_intervals(tokenizer, text_data, tmp_path):
    """Its first step has the learning rate of the new schedule, not the 0 at which the shorter one ended."""
    short = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear", "logging_steps": 3}
    train(BLTrainer, tokenizer, text_data, tmp_path, **short)
    again = build(BLTrainer, tokenizer, text_data, tmp_path, **{**short, "max_steps": 6, "save_steps": 1, "logging_steps": 1})
    again.train(resume_from_checkpoint=True)
    rates = {entry["step"]: entry["learning_rate"] for entry in again.state.log_history if "learning_rate" in entry}
    assert [rates[step] for step in (4, 5, 6)] == pytest.approx([again.args.learning_rate * part / 6 for part in (3, 2, 1)])
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (3, 4, 5, 6)}


def test_other_rows_are_told_on_resuming(tokenizer, text_data, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 1}
    train(BLTrainer, tokenizer, text_data, tmp_path, max_steps=1, **options)
    same = build(BLTrainer, tokenizer, text_data, tmp_path, max_steps=2, **options)
    same.train(resume_from_checkpoint=True)
    assert "The training set has changed" not in caplog.text
    other = build(BLTrainer, tokenizer, text_data.select(range(len(text_data) - 1)), tmp_path, max_steps=3, **options)
    other.train(resume_from_checkpoint=True)
    count = len(text_data)
    assert (
        f"The training set has changed since {tmp_path / 'out' / 'checkpoint-2'}: it had {count} rows, and has {count - 1}"
        in (caplog.text)
    )


def test_other_targets_are_told_on_resuming_where_the_record_has_them(tmp_path, caplog):
    before, now = (
        Dataset.from_list([{"input_ids": [5, 6, 7], "labels": labels}]) for labels in ([-100, 6, 7], [-100, -100, 7])
    )
    rows = sample_of(before)
    for recorded, is_told in ((rows, True), ({key: rows[key] for key in ("count", "hash")}, False)):
        caplog.clear()
        (tmp_path / RECORD_FILE).write_text(json.dumps({"rows": recorded}))
        _warn_of_other_rows(tmp_path, now)
        assert ("The training set has changed" in caplog.text) is is_told


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 64}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}, {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}}, {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_is_not_resumed_by_another_configuration(change, tokenizer, text_data, tmp_path):
    """Its weights would fit, and be read at another scale."""
    lora, options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}, {"save_strategy": "steps", "save_steps": 1}
    train(BLTrainer, tokenizer, text_data, tmp_path, peft_config=LoraConfig(**lora), **options)
    again = build(
        BLTrainer, tokenizer, text_data, tmp_path, peft_config=LoraConfig(**{**lora, **change}), max_steps=2, **options
    )
    (key,) = change
    with pytest.raises(ValueError, match=f"Cannot resume from .*checkpoint-1: its adapter has `{key}` .*, the trainer's"):
        again.train(resume_from_checkpoint=True)


def test_a_finished_run_is_not_trained_on(tokenizer, text_data, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    first = train(BLTrainer, tokenizer, text_data, tmp_path, **options)
    again = build(BLTrainer, tokenizer, text_data, tmp_path, **options)
    assert again.train(resume_from_checkpoint=True).global_step == 3
    for name, p in weights(first).items():
        assert torch.equal(weights(again)[name], p), name
    assert not (tmp_path / "out" / "checkpoint-4").exists()


def test_recipe_is_recorded_and_another_one_is_not_resumed(tokenizer, text_data, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(
        BLTrainer, tokenizer, text_data, tmp_path, objective={"name": "power", "alpha": 2}, threshold=0.01, **options
    )  # fmt: skip
    out = tmp_path / "out"
    for folder in (out / "checkpoint-1", out / "checkpoint-2"):
        record = json.loads((folder / RECORD_FILE).read_text())
        assert record["objective"] == {"name": "power", "alpha": 2}
        assert record["threshold"] == {"above": 0.01, "below": 1.0, "normalize": "tokens"}
        assert {"bl_trainer", "trl", "transformers", "torch"} <= record["versions"].keys()
    card = (out / "README.md").read_text()
    assert 'objective: {"name": "power", "alpha": 2}' in card
    assert "2510.00526" in card
    for other, message in (
        ({"objective": "neg_p", "threshold": 0.01}, "was trained with objective {'name': 'power', 'alpha': 2}, the recipe"),
        ({"objective": {"name": "power", "alpha": 2}}, "was trained with threshold"),
    ):
        trainer = build(BLTrainer, tokenizer, text_data, tmp_path, **other, **options)
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=True)


def test_plain_sft_config_means_nll(tokenizer, text_data, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = BLTrainer(make_llama(tokenizer), args, train_dataset=text_data, processing_class=tokenizer)
    assert trainer.parsed_objective == Objective("nll")


class TestRefusals:
    """Whatever would train something else than the objective is refused by name before the model loads."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"objective": "negp"}, "Unknown objective 'negp'"),
            ({"threshold": 2}, "must be a probability between 0 and 1, got 2"),
            ({"loss_type": "dft"}, "`loss_type: dft` would change the objective. .*`objective: neg_p` has the gradient of dft"),
            ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor: 0.1` would replace the objective"),
            (
                {"liger_kernel_config": {"fused_linear_cross_entropy": True}},
                r"`liger_kernel_config: \{fused_linear_cross_entropy: true\}` is a cross-entropy of its own",
            ),
            ({"liger_kernel_config": {"cross_entropy": True}}, "is a cross-entropy of its own"),
            ({"eval_packing": True, "max_length": 64}, "`eval_packing: true` without `packing` would evaluate"),
            ({"dataset_kwargs": {"add_special_tokens": False}}, r"`dataset_kwargs: \{add_special_tokens: ...\}` has no effect"),
            ({"model_init_kwargs": {"torch_dtype": "bfloat16"}}, "`torch_dtype` in `model_init_kwargs` has no effect"),
            ({"truncation_mode": "keep_end", "packing": True}, "`truncation_mode: keep_end` has no effect with `packing`"),
            ({"metric_for_best_model": "eval_loss", "threshold": 0.2}, "`metric_for_best_model: eval_loss`"),
            ({"metric_for_best_model": "loss", "objective": "neg_p"}, "`metric_for_best_model: loss`.* Write .*eval_nll"),
        ],
        ids=str,
    )
    def test_config(self, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            BLConfig(output_dir=str(tmp_path / "out"), use_cpu=True, **options)
        assert not (tmp_path / "out").exists()

    def test_sequence_parallelism(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
        with pytest.raises(ValueError, match=r"DeepSpeed sequence parallelism \(sp_size = 2\) trains the model's own"):
            BLConfig(output_dir=str(tmp_path), use_cpu=True)

    def test_plain_config(self, tmp_path):
        args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, loss_type="dft")
        with pytest.raises(ValueError, match="`loss_type: dft` would change the objective"):
            BLTrainer("no-such-model", args)

    def test_trl_without_a_head_for_this_device(self, monkeypatch):
        monkeypatch.setattr("bl_trainer.training.setup.version", lambda package: "1.15.0")
        monkeypatch.setattr("bl_trainer.training.setup.find_spec", lambda package: None)
        with pytest.raises(ValueError, match=r"TRL 1\.15\.0 computes the loss with Triton, which is not installed here"):
            BLTrainer("no-such-model")

    def test_other_head(self, tmp_path):
        with pytest.raises(ValueError, match=r"`loss_head: TRL` is unknown\. Write `auto` or `trl`"):
            BLConfig(output_dir=str(tmp_path), use_cpu=True, loss_head="TRL")

    def test_compute_loss_func(self):
        with pytest.raises(ValueError, match="`compute_loss_func` would replace the objective"):
            BLTrainer("no-such-model", compute_loss_func=lambda *args, **kwargs: 0)

    @pytest.mark.parametrize(
        "targets",
        [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": "lm_head"}, {"target_modules": ".*(q_proj|lm_head)"}],
        ids=str,
    )
    def test_lm_head_adapter(self, targets):
        with pytest.raises(ValueError, match="A PEFT adapter on `lm_head` would not train"):
            BLTrainer("no-such-model", peft_config=LoraConfig(**targets))

    def test_an_adapter_that_starts_at_random_directions_of_the_base(self):
        """Loaded again, it would stand on another base model than it was trained on."""
        with pytest.raises(ValueError, match="Cannot train with `init_lora_weights: pissa_niter_4`: it takes random"):
            BLTrainer("no-such-model", peft_config=LoraConfig(init_lora_weights="pissa_niter_4"))

    def test_lm_head_adapter_of_a_loaded_model(self, tokenizer, text_data, tmp_path):
        model = get_peft_model(make_llama(tokenizer), LoraConfig(target_modules=["lm_head"]))
        with pytest.raises(ValueError, match="lm_head"):
            build(BLTrainer, tokenizer, text_data, tmp_path, model=model)


def test_evaluation_does_not_depend_on_packing(tokenizer, text_data, tmp_path):
    """And in TRL it does where packing is for the evaluation alone, which is why that is refused."""
    common = {"eval_data": text_data, "max_length": 64}
    plain, alone, both = (
        build(trainer_class, tokenizer, text_data, tmp_path, make_double(tokenizer), **common, **options).evaluate()[
            "eval_loss"
        ]
        for trainer_class, options in ((BLTrainer, {}), (SFTTrainer, {"eval_packing": True}), (BLTrainer, {"packing": True}))
    )
    assert both == pytest.approx(plain, rel=1e-9)
    assert alone != pytest.approx(plain, rel=1e-3)


@pytest.fixture
def communicated(monkeypatch):
    """The names of accelerate's methods that have been called to communicate between processes."""
    called = []
    for name in ("gather", "gather_for_metrics", "reduce"):
        inner = getattr(Accelerator, name)
        monkeypatch.setattr(Accelerator, name, lambda *a, name=name, inner=inner, **k: called.append(name) or inner(*a, **k))
    return called


def test_synchronises_with_the_device_once_per_log(tokenizer, text_data, tmp_path, communicated):
    """Operations that make the host wait for a GPU, counted on a CPU: of TRL's, none of each micro-batch; one copy per log.

    Our head waits three times for a micro-batch of one block: which tokens are targets, whether their labels exist, and
    which rows train; counted as five operations.
    """
    waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
    options = {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 2}
    micro_batches, of_trl = 4 * 2, 5  # two `> 0` and three `.item()`
    counts = {}
    for trainer_class, head in ((SFTTrainer, "trl"), (BLTrainer, "trl"), (BLTrainer, "auto")):
        own = (
            {"objective": f"{__name__}:uses_everything", "threshold": 0.01, "loss_head": head}
            if trainer_class is BLTrainer
            else {}
        )
        model = make_llama(tokenizer, num_hidden_layers=1)
        trainer = build(trainer_class, tokenizer, text_data, tmp_path, model, **options, **own)
        communicated.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            trainer.train()
        counts[trainer_class, head] = sum(event.count for event in profile.key_averages() if event.key in waits)
        if trainer_class is BLTrainer:
            assert communicated == ["reduce"] * 2  # one per log, and none for the last, of the whole run
        else:
            assert len(communicated) >= 4 * micro_batches
    unavoidable = counts[SFTTrainer, "trl"] - of_trl * micro_batches
    assert unavoidable > 0
    assert counts[BLTrainer, "trl"] <= unavoidable
    assert counts[BLTrainer, "auto"] <= unavoidable + 5 * micro_batches
