"""The published objectives against their formulas in float64, and `ref_logp` from the base model and from a column."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from bl_trainer import BLConfig, BLTrainer, Objective, Threshold
from bl_trainer.errors import RecipeError
from bl_trainer.head.lm_head import Head
from bl_trainer.head.ops import objective_head
from bl_trainer.objectives.objective import OBJECTIVES
from bl_trainer.objectives.pricing import price
from bl_trainer.objectives.published import PUBLISHED
from bl_trainer.training.record import RunRecord
from conftest import make_double
from ways import Gradients, Ordered, build, relative_difference, train

GRID = torch.cat([-torch.logspace(math.log10(50), -7, 2000), torch.zeros(1)])  # log p from -50 to 0, float32
GENERATOR = torch.Generator().manual_seed(0)
STATISTICS = {
    "entropy": torch.rand(len(GRID), generator=GENERATOR) * 5,
    "log_sum_sq_probs": -torch.rand(len(GRID), generator=GENERATOR) * 5,
    "ref_logp": (GRID + torch.randn(len(GRID), generator=GENERATOR)).clamp(-50, 0),
}


def cut(gate):
    return torch.where(gate > 0, gate, 0.0)


def anchored(logp, ref, weight=0.1):
    """With the tangent in place of e^r - r - 1 beyond r = 10."""
    r = ref - logp
    near = r.clamp(max=10)
    k3 = torch.where(r > 10, near.exp() - near - 1 + (r - near) * (math.exp(10) - 1), r.clamp(max=11).exp() - r - 1)
    return -logp.exp().detach() * logp + weight * k3


def clipped(logp, ref, low, high):
    r = (logp - ref).exp()
    return -torch.minimum(r, r.clamp(1 - low, 1 + high))


# Spec, f(log p, statistics) as the paper or its code writes it
FORMULAS = [
    ("dft", lambda x, s: -x.exp().detach() * x),
    ({"name": "dft", "min_weight": 0.1}, lambda x, s: -x.exp().clamp(min=0.1).detach() * x),
    ({"name": "talr", "tau": 2.5}, lambda x, s: -(x.exp() ** 0.4).clamp(min=0.01).detach() * x),
    ("trsft", lambda x, s: torch.where(x.exp() >= 0.1, -x, (0.1 - x.exp()) / 0.1 - math.log(0.1))),
    ({"name": "profit", "tau": 0.3}, lambda x, s: -(x.exp() > 0.3).double() * x),
    (
        "infosft",
        lambda x, s: -cut(x.exp() * (1 - (x - (-torch.expm1(x)).log()) / math.log(0.93 / 0.07))).detach() * x,
    ),
    ("chord_phi", lambda x, s: -(x.exp() * -torch.expm1(x)).detach() * x),
    ("focal", lambda x, s: -((-torch.expm1(x)) ** 2).detach() * x),
    ({"name": "focal", "gamma": 0.5}, lambda x, s: -((-torch.expm1(x)) ** 0.5).detach() * x),
    ({"name": "focal", "stop_gradient": False}, lambda x, s: -((-torch.expm1(x)) ** 2) * x),
    ("eaft", lambda x, s: -(s["entropy"] / math.log(20)).clamp(max=1) * x),
    ({"name": "eaft", "alpha": 2}, lambda x, s: -((s["entropy"] / math.log(20)).clamp(max=1) ** 2) * x),
    ("mile", lambda x, s: -(1 + s["entropy"]) * x),
    ({"name": "mile", "gamma": 0.5}, lambda x, s: -((1 + s["entropy"]) ** 0.5) * x),
    ("deft", lambda x, s: -torch.expm1(s["log_sum_sq_probs"].exp() * x) / s["log_sum_sq_probs"].exp()),
    ({"name": "deft_cayley", "mean_p": 0.6}, lambda x, s: cayley(x, 0.3)),
    ({"name": "deft_cayley", "mean_p": 0}, lambda x, s: cayley(x, 0.0)),
    ("asft", lambda x, s: anchored(x, s["ref_logp"])),
    ({"name": "asft", "kl_weight": 0.5}, lambda x, s: anchored(x, s["ref_logp"], 0.5)),
    ("psft", lambda x, s: clipped(x, s["ref_logp"], 0.2, 0.28)),
    ({"name": "psft", "clip_high": 2}, lambda x, s: clipped(x, s["ref_logp"], 0.2, 2)),
]
SPECS = [spec for spec, _ in FORMULAS]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_target_of_no_probability_has_a_value_and_a_weight(spec):
    """Infinite ones where the formula says so, and none that is no number."""
    logp = torch.tensor([-math.inf, -1.0]).requires_grad_()
    statistics = {"entropy": torch.ones(2), "log_sum_sq_probs": -torch.ones(2), "ref_logp": -torch.ones(2)}
    cost = Objective.parse(spec)(logp, **statistics)
    (slope,) = torch.autograd.grad(cost.sum(), logp)
    assert not cost.isnan().any()
    assert not slope.isnan().any()
    assert slope[1].isfinite()


def cayley(logp, offset):
    p = logp.exp().detach()
    a = (offset + (1 - offset) * p / (2 - p)).clamp(0.001, 1)
    return -torch.expm1(a * logp) / a


def given(objective, dtype=torch.float32, **changes):
    return {name: value.to(dtype) for name, value in {**STATISTICS, **changes}.items() if name in objective.statistics}


@pytest.mark.parametrize(("spec", "formula"), FORMULAS, ids=map(str, SPECS))
def test_value_and_gradient_are_the_formula(spec, formula):
    objective = Objective.parse(spec)
    cost, weight = objective(GRID, **given(objective)), objective.gradient_weight(GRID, **given(objective))
    logp = GRID.double().requires_grad_()
    expected = formula(logp, {name: value.double() for name, value in STATISTICS.items()})
    (slope,) = torch.autograd.grad(expected.sum(), logp)
    assert cost.dtype == weight.dtype == torch.float32
    tiny = {"asft": 1e-7, "deft": 1e-15}.get(objective.name, 1e-30)  # what cancels, in ours and in the formula
    slope = torch.where(slope.isnan(), 0.0, slope)  # 0 x infinity of the formula at p = 1
    torch.testing.assert_close(cost.double(), expected.nan_to_num(0).detach(), rtol=2e-6, atol=tiny)
    torch.testing.assert_close(weight.double(), -slope, rtol=2e-6, atol=tiny)


def test_every_published_objective_has_a_formula():
    assert {Objective.parse(spec).name for spec in SPECS} == set(PUBLISHED)
    assert set(PUBLISHED) < set(OBJECTIVES)


@pytest.mark.parametrize("reference", [-50.0, -10.0, -0.5, 0.0])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_finite_whatever_the_statistics(spec, reference):
    objective = Objective.parse(spec)
    for entropy, squares in ((0.0, 0.0), (12.0, -12.0), (1e-8, -1e-8)):
        changes = {"entropy": entropy, "log_sum_sq_probs": squares, "ref_logp": reference}
        statistics = given(objective, **{name: torch.full_like(GRID, value) for name, value in changes.items()})
        assert objective(GRID, **statistics).isfinite().all()
        assert objective.gradient_weight(GRID, **statistics).isfinite().all()


# Where f has its weight from p under stop-gradient, f is not what the gradient is of
@pytest.mark.parametrize("spec", ["trsft", {"name": "focal", "stop_gradient": False}, "eaft", "mile", "deft", "psft"], ids=str)
def test_gradcheck(spec):
    objective = Objective.parse(spec)
    logp = torch.linspace(-5, -0.01, 30, dtype=torch.float64, requires_grad=True)
    statistics = {name: value[:30] for name, value in given(objective, torch.float64, ref_logp=GRID * 0 - 1.01).items()}
    assert torch.autograd.gradcheck(lambda x: objective(x, **statistics), logp)


def weight(spec, **changes):
    objective = Objective.parse(spec)
    return objective.gradient_weight(GRID.double(), **given(objective, torch.float64, **changes))


def constant(value):
    return torch.full((len(GRID),), value, dtype=torch.float64)


P = GRID.double().exp()
IDENTITIES = {
    "dft has the gradient of neg_p": (weight("dft"), weight("neg_p")),
    "talr is power above its floor": (
        weight({"name": "talr", "tau": 4, "min_weight": 0}),
        weight({"name": "power", "alpha": 0.25}),
    ),
    "talr never weighs less than its floor": (weight({"name": "talr", "tau": 1}), P.clamp(min=0.01)),
    "talr of tau 1 is dft with a floor": (weight({"name": "talr", "tau": 1}), weight({"name": "dft", "min_weight": 0.01})),
    "trsft": (weight({"name": "trsft", "a": 0.2}), (P / 0.2).clamp(max=1)),
    "trsft of a 1 is neg_p": (weight({"name": "trsft", "a": 1}), weight("neg_p")),
    "profit of tau 0 is nll": (weight({"name": "profit", "tau": 0}), weight("nll")),
    "focal of gamma 0 is nll": (weight({"name": "focal", "gamma": 0}), weight("nll")),
    "focal and neg_p add up to nll": (weight({"name": "focal", "gamma": 1}) + weight("neg_p"), weight("nll")),
    "chord_phi is the pull of neg_p": (weight("chord_phi"), Objective.parse("neg_p").weight(GRID.double())),
    "infosft is half of nll at p 1/2": (weight("infosft")[P.sub(0.5).abs() < 1e-3], P[P.sub(0.5).abs() < 1e-3]),
    "infosft is zero from P on": (weight("infosft")[P >= 0.93], 0 * P[P >= 0.93]),
    "eaft of a uniform distribution is nll": (weight("eaft", entropy=constant(math.log(32_000))), weight("nll")),
    "eaft of alpha 0 is nll": (weight({"name": "eaft", "alpha": 0}), weight("nll")),
    "eaft of a sure model is nothing": (weight("eaft", entropy=constant(0.0)), 0 * P),
    "mile of gamma 0 is nll": (weight({"name": "mile", "gamma": 0}), weight("nll")),
    "mile of a sure model is nll": (weight("mile", entropy=constant(0.0)), weight("nll")),
    "deft of a sure model is neg_p": (weight("deft", log_sum_sq_probs=constant(0.0)), weight("neg_p")),
    "deft of 4 even tokens is power 1/4": (
        weight("deft", log_sum_sq_probs=constant(-math.log(4))),
        weight({"name": "power", "alpha": 0.25}),
    ),
    "asft of no anchor is dft": (weight({"name": "asft", "kl_weight": 0}), weight("dft")),
    "asft at the reference is dft": (weight("asft", ref_logp=GRID), weight("dft")),
    "psft at the reference is nll": (weight("psft", ref_logp=GRID), weight("nll")),
    "psft beyond its clip is nothing": (weight("psft", ref_logp=GRID - 0.25), 0 * P),
    "psft below it is p over the reference's": (weight("psft", ref_logp=constant(0.0)), P),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity(name):
    actual, expected = IDENTITIES[name]
    tolerance = 1e-3 if "half" in name else 1e-12
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-14)


FALLING = ("trsft", "focal", "deft_cayley", "psft")  # in p, whatever else holds


@pytest.mark.parametrize("name", FALLING)
def test_cost_falls_with_p_whatever_the_reference(name):
    spec = {"name": name, **({"mean_p": 0.5} if name == "deft_cayley" else {})}
    objective = Objective.parse(spec)
    for ref_logp in (-0.1, -1, -8):
        assert (objective(GRID, **given(objective, ref_logp=0 * GRID + ref_logp)).diff() <= 0).all()


def test_infosft_peaks_where_its_authors_say():
    p = torch.linspace(0.001, 0.999, 9981, dtype=torch.float64)
    values = Objective.parse("infosft").gradient_weight(p.log())
    assert p[values.argmax()].item() == pytest.approx(0.568, abs=1e-3)
    assert values.max().item() == pytest.approx(0.508, abs=1e-3)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
def test_eaft_is_near_the_papers_by_the_bound_that_it_gives(scale):
    logp = (scale * torch.randn(200, 500, dtype=torch.float64, generator=GENERATOR)).log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    top = logp.topk(20).values
    mass = top.exp().sum(1).clamp(max=1)
    top = top.log_softmax(1)
    top_entropy = -(top.exp() * top).sum(1)
    coin = -torch.xlogy(mass, mass) - torch.xlogy(1 - mass, 1 - mass)
    bound = coin + (1 - mass) * max(math.log(20), math.log(480))
    assert (top_entropy <= math.log(20) + 1e-12).all()
    assert ((entropy - top_entropy).abs() <= bound + 1e-12).all()
    gate = Objective.parse("eaft").gradient_weight(logp[:, 0], entropy=entropy)
    assert ((gate - top_entropy / math.log(20)).abs() <= bound / math.log(20) + 1e-12).all()


BAD = [
    ({"name": "dft", "min_weight": 1.5}, "`min_weight` of objective 'dft' must be at least 0 and at most 1, got 1.5"),
    ({"name": "dft", "min_weight": "x"}, "`min_weight` of objective 'dft' must be a finite number, got 'x'"),
    ("talr", "Objective 'talr' takes tau, min_weight: 'tau' is missing"),
    ({"name": "talr", "tau": 0}, "`tau` of objective 'talr' must be above 0, got 0"),
    ({"name": "talr", "tau": 1, "min_weight": -1}, "`min_weight` of objective 'talr' must be at least 0"),
    ({"name": "trsft", "a": 0}, "`a` of objective 'trsft' must be above 0 and at most 1, got 0"),
    ({"name": "profit", "tau": 2}, "`tau` of objective 'profit' must be at least 0 and below 1"),
    ({"name": "infosft", "P": 0.5}, "`P` of objective 'infosft' must be above 0.5 and below 1, got 0.5"),
    ({"name": "infosft", "P": 1}, "`P` of objective 'infosft' must be above 0.5 and below 1, got 1"),
    ({"name": "focal", "gamma": -1}, "`gamma` of objective 'focal' must be at least 0, got -1"),
    ({"name": "focal", "stop_gradient": 1}, "`stop_gradient` of objective 'focal' must be true or false, got 1"),
    ({"name": "eaft", "alpha": -1}, "`alpha` of objective 'eaft' must be at least 0"),
    ({"name": "mile", "gamma": -1}, "`gamma` of objective 'mile' must be at least 0"),
    ({"name": "deft_cayley", "mean_p": 2}, "`mean_p` of objective 'deft_cayley' must be at least 0 and at most 1"),
    ({"name": "asft", "kl_weight": -1}, "`kl_weight` of objective 'asft' must be at least 0"),
    ({"name": "psft", "clip_high": -1}, "`clip_high` of objective 'psft' must be at least 0"),
    ({"name": "asft", "ref_logp": -1}, "'ref_logp' is a statistic that the trainer supplies"),
]


@pytest.mark.parametrize(("spec", "message"), BAD, ids=[str(spec) for spec, _ in BAD])
def test_wrong_parameters_say_what_is_allowed(spec, message):
    with pytest.raises(RecipeError, match=message):
        Objective.parse(spec)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_head_gives_the_gradient_of_full_logits(spec, monkeypatch):
    """In blocks of 4 rows, so that what is given per token must be cut up with them."""
    monkeypatch.setattr("bl_trainer.head.blocks.BLOCK_BYTES", {"cpu": 4 * 7 * 8, "other": 4 * 7 * 8})
    objective = Objective.parse(spec)
    hidden = torch.randn(11, 5, dtype=torch.float64, generator=GENERATOR, requires_grad=True)
    matrix = torch.randn(7, 5, dtype=torch.float64, generator=GENERATOR, requires_grad=True)
    target = torch.randint(7, (11,), generator=GENERATOR)
    ref_logp = -3 * torch.rand(11, dtype=torch.float64, generator=GENERATOR)
    rows = (hidden @ matrix.t()).log_softmax(1)
    statistics = {
        "entropy": -(rows.exp() * rows).sum(1),
        "log_sum_sq_probs": (2 * rows).logsumexp(1).detach(),
        "ref_logp": ref_logp,
    }
    logp = rows.gather(1, target[:, None])[:, 0]
    expected = objective(logp, **statistics)
    costs = objective_head(
        hidden, Head(matrix, None, 1.0, None), target, lambda known: price(objective, Threshold(), known),
        ("log_sum_sq_probs",), {"ref_logp": ref_logp},
    )  # fmt: skip
    torch.testing.assert_close(costs.cost, expected)
    actual, expected = (torch.autograd.grad(cost.sum(), (hidden, matrix)) for cost in (costs.cost, expected))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# The reference, with an adapter


def make_adapted(tokenizer, dropout=0.0, **changes):
    """A tiny model with a LoRA adapter that does something already."""
    model = make_double(tokenizer, attention_dropout=dropout)
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": "all-linear", "lora_dropout": dropout, "init_lora_weights": False, **changes}
    return get_peft_model(model, LoraConfig(**options))


def encoded(tokenizer, text):
    return torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])


def logp_of(model, ids):
    return model(ids[None]).logits[0, :-1].log_softmax(1).gather(1, ids[1:, None])[:, 0]


def loop(tokenizer, data, objective):
    """Return cost and gradient of the formula, example by example, the reference being another model."""
    model, base = make_adapted(tokenizer).eval(), make_double(tokenizer).eval()
    total, count = 0.0, 0
    for text in data["text"]:
        ids = encoded(tokenizer, text)
        with torch.no_grad():
            ref_logp = logp_of(base, ids)
        logp = logp_of(model, ids)
        total, count = total + objective(logp, ref_logp=ref_logp).sum(), count + len(logp)
    (total / count).backward()
    return (total / count).item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Seen(Gradients):
    """The gradient of the first step, while the adapter is on again."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
        assert model.training


ROUNDING = {"auto": 1e-9, "trl": 1e-6}  # of the heads, in float64; TRL's adds some of it in float32
CUTS = {
    "whole": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "padding_free": {"padding_free": True},
    "padded": {"pad_to_multiple_of": 32},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointing_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize("head", ["auto", "trl"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("spec", ["asft", "psft"])
def test_gradient_with_the_base_as_reference_is_that_of_a_loop(spec, cut, head, tokenizer, text_data, tmp_path):
    data, seen = text_data.select(range(8)), Seen()
    trainer = train(
        Ordered,
        tokenizer,
        data,
        tmp_path,
        model=make_adapted(tokenizer),
        objective=spec,
        callbacks=[seen],
        loss_head=head,
        **CUTS[cut],
    )
    cost, gradient = loop(tokenizer, data, Objective.parse(spec))
    assert relative_difference(seen.first, gradient) < ROUNDING[head]
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(cost, rel=1e-6)


def with_column(tokenizer, data, model=None):
    """Tokens of `data` with log p under `model`; the first has no number."""
    model = make_double(tokenizer).eval() if model is None else model
    rows = []
    for text in data["text"]:
        ids = encoded(tokenizer, text)
        with torch.no_grad():
            rows.append({"input_ids": ids.tolist(), "ref_logprobs": [None, *logp_of(model, ids).tolist()]})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("head", ["auto", "trl"])
@pytest.mark.parametrize("cut", ["accumulated", "padding_free", "padded"])
def test_column_is_the_same_as_the_base_model(cut, head, tokenizer, text_data, tmp_path):
    data, seen = text_data.select(range(8)), Seen()
    train(
        Ordered, tokenizer, with_column(tokenizer, data), tmp_path, model=make_adapted(tokenizer), objective="asft",
        callbacks=[seen], loss_head=head, **CUTS[cut],
    )  # fmt: skip
    assert relative_difference(seen.first, loop(tokenizer, data, Objective.parse("asft"))[1]) < 1e-6  # of a float32 column


@pytest.mark.parametrize("stop_on_nan", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 12},
        {"max_length": 64, "packing": True},
        {"max_length": 12, "packing": True},
    ],
    ids=str,
)
def test_column_stays_with_its_tokens(options, stop_on_nan, tokenizer, text_data, tmp_path):
    """Told by numbers that are functions of token and place, through every way in which TRL cuts and joins."""
    rows = []
    for text in text_data["text"]:
        ids = encoded(tokenizer, text).tolist()
        values = [-(token + position / 100) for position, token in enumerate(ids)]
        labels = [-100, -100, *ids[2:]]
        rows.append({"input_ids": ids, "labels": labels, "ref_logprobs": values})
    trainer = build(Ordered, tokenizer, Dataset.from_list(rows), tmp_path, objective="asft", stop_on_nan=stop_on_nan, **options)
    plain = build(Ordered, tokenizer, Dataset.from_list(rows).remove_columns("ref_logprobs"), tmp_path, **options)
    batches, expected = list(trainer.get_train_dataloader()), list(plain.get_train_dataloader())
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch["input_ids"], other["input_ids"])
        assert torch.equal(batch["labels"], other["labels"])
        used = batch["labels"] != -100
        assert torch.equal((-batch["ref_logprobs"]).floor()[used].long(), batch["input_ids"][used])


def test_streamed_column(tokenizer, text_data, tmp_path):
    data, seen = text_data.select(range(8)), Seen()
    streamed = with_column(tokenizer, data).to_iterable_dataset()
    train(BLTrainer, tokenizer, streamed, tmp_path, model=make_adapted(tokenizer), objective="asft", callbacks=[seen])
    assert relative_difference(seen.first, loop(tokenizer, data, Objective.parse("asft"))[1]) < 1e-6


@pytest.mark.parametrize("source", ["adapter", "column"])
def test_evaluation_is_exact(source, tokenizer, text_data, tmp_path, capsys):
    data = text_data.select(range(7))
    shown = with_column(tokenizer, data) if source == "column" else data
    trainer = build(
        BLTrainer, tokenizer, shown, tmp_path, model=make_adapted(tokenizer), eval_data=shown, objective="asft",
        per_device_eval_batch_size=2, learning_rate=0.0,
    )  # fmt: skip
    cost, _ = loop(tokenizer, data, Objective.parse("asft"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(cost, rel=1e-6)
    trainer.train()
    what = "the column `ref_logprobs`" if source == "column" else "the model without its adapter"
    assert f"Reference: {what}.\n" in capsys.readouterr().out
    assert trainer.evaluate()["eval_loss"] == pytest.approx(cost, rel=1e-6)


def test_reference_has_no_dropout_and_leaves_the_random_numbers_alone(tokenizer, text_data, tmp_path):
    """With the base as reference a dropout model draws as many numbers as under a column."""
    data = text_data.select(range(8))
    gradients = []
    for shown in (data, with_column(tokenizer, data)):
        seen = Seen()
        train(
            Ordered, tokenizer, shown, tmp_path, model=make_adapted(tokenizer, dropout=0.3), objective="asft",
            callbacks=[seen], neftune_noise_alpha=5.0,
        )  # fmt: skip
        gradients.append(seen.first)
    assert relative_difference(*gradients) < 1e-6


@pytest.mark.parametrize("changes", [{"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"trainable_token_indices": [5, 6]}])
@pytest.mark.parametrize("head", ["auto", "trl"])
def test_reference_is_the_base_whatever_the_adapter_is_of(head, changes, tokenizer, text_data, tmp_path):
    if "modules_to_save" not in changes or "trainable_token_indices" in changes:
        changes = {"target_modules": ["q_proj", "v_proj"], **changes}
    data, model = text_data.select(range(4)), make_adapted(tokenizer, **{"target_modules": ["q_proj"], **changes})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=GENERATOR)
    trainer = build(Ordered, tokenizer, data, tmp_path, model=model, objective=f"{__name__}:remembers", loss_head=head)
    trainer.train()
    base = make_double(tokenizer).eval()
    with torch.no_grad():
        expected = torch.cat([logp_of(base, encoded(tokenizer, text)) for text in data["text"]])
    found = seen_references[-1]
    is_target = found.float() != torch.tensor(-math.log(2))  # what TRL's head shows of the others
    torch.testing.assert_close(found[is_target].double().sort().values, expected.sort().values, rtol=1e-6, atol=1e-6)


seen_references = []


def remembers(logp, ref_logp):
    seen_references.append(ref_logp.detach().flatten().clone())
    return -logp


def test_only_who_asks_pays(tokenizer, text_data, tmp_path):
    """An objective without a reference makes one forward pass, with one two."""
    for spec, passes in (("dft", 1), ("asft", 2)):
        model, count = make_adapted(tokenizer), []
        model.get_base_model().model.register_forward_hook(lambda *args, count=count: count.append(1))
        trainer = build(Ordered, tokenizer, text_data, tmp_path, model=model, objective=spec)
        count.clear()  # of the verification of the head
        trainer.train()
        assert len(count) == passes


def short(row):
    return {**row, "ref_logprobs": row["ref_logprobs"][:-1]}


def as_probabilities(row):
    return {**row, "ref_logprobs": [None if value is None else math.exp(value) for value in row["ref_logprobs"]]}


def with_a_hole(row):
    return {**row, "ref_logprobs": [*row["ref_logprobs"][:-1], None]}


def without(row):
    return {**row, "ref_logprobs": None}


def as_one_number(row):
    return {**row, "ref_logprobs": -1.5}


BAD_COLUMNS = [
    (
        short,
        r"`ref_logprobs` of row 0 of the train set, counted from 0, has \d+ numbers for \d+ tokens. Give one number for each",
    ),
    (as_probabilities, "of row 0 .* has 0.* for a target token. It must be log p, a finite number of at most 0"),
    (with_a_hole, "of row 0 .* has None for a target token"),
    (without, "of row 0 .* is missing. Give one number for each of `input_ids`"),
    (as_one_number, r"of row 0 .* is -1.5, no list. Give one number for each of `input_ids`"),
]
LOST = [
    ({"truncation_mode": "keep_end"}, "`truncation_mode: keep_end` cuts .* Write `truncation_mode: keep_start`"),
    ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy: wrapped` cuts .* Write `packing_strategy: bfd`"),
    ({"packing": True, "packing_strategy": "bfd_split"}, "`packing_strategy: bfd_split` cuts"),
]


@pytest.mark.parametrize(("options", "message"), LOST, ids=[str(options) for options, _ in LOST])
def test_cuts_that_take_the_context_away_are_refused_with_the_column(options, message, tokenizer, text_data, tmp_path):
    data = with_column(tokenizer, text_data.select(range(3)))
    with pytest.raises(RecipeError, match=message):
        build(BLTrainer, tokenizer, data, tmp_path, objective="asft", max_length=12, **options)


@pytest.mark.parametrize(("spoil", "message"), BAD_COLUMNS, ids=[f.__name__ for f, _ in BAD_COLUMNS])
def test_wrong_column_is_refused_with_the_row(spoil, message, tokenizer, text_data, tmp_path):
    data = with_column(tokenizer, text_data.select(range(3)))
    with pytest.raises(ValueError, match=message):
        build(BLTrainer, tokenizer, Dataset.from_list([spoil(row) for row in data]), tmp_path, objective="asft")


def test_wrong_column_of_a_set_that_is_not_prepared(tokenizer, text_data, tmp_path):
    rows = [short({**row, "labels": row["input_ids"]}) for row in with_column(tokenizer, text_data.select(range(8)))]
    trainer = build(
        BLTrainer, tokenizer, Dataset.from_list(rows), tmp_path, objective="asft", dataset_kwargs={"skip_prepare_dataset": True}
    )
    with pytest.raises(ValueError, match=r"`ref_logprobs` has \d+ numbers for \d+ tokens. Give one for each"):
        trainer.train()


def test_refusals_before_the_model_loads(tokenizer, text_data, tmp_path):
    column = with_column(tokenizer, text_data.select(range(3)))
    text = column.remove_columns("input_ids").add_column("text", text_data["text"][:3])
    lora = LoraConfig(bias="all", target_modules="all-linear")
    virtual = [PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), PrefixTuningConfig(num_virtual_tokens=3)]
    for data, options, message in [
        (text_data, {}, "'asft' needs a reference model .* there is none. Train an adapter .* or give the data set a column"),
        *((text_data, {"peft_config": config}, "prompt-learning PEFT makes none") for config in virtual),
        (text_data, {"peft_config": lora}, "adapter trains biases of the base model"),
        *(
            (text_data, {"peft_config": LoraConfig(init_lora_weights=start)}, f"`init_lora_weights: {start}` changes the base")
            for start in ("pissa", "olora")
        ),
        (column, {"eval_data": text_data}, "The set 'train' has a column `ref_logprobs`, and 'eval' has none"),
        (text_data, {"eval_data": {"a": column}}, "The set 'a' has a column `ref_logprobs`, and 'train' has none"),
        (text, {}, "column `ref_logprobs` of the set 'train' has no tokens beside it"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(BLTrainer, tokenizer, data, tmp_path, model="no/model", objective="asft", **options)
    with pytest.raises(ValueError, match="A `data_collator` of your own would lose the column"):
        BLTrainer("no/model", train_dataset=column, args=build_args(tmp_path), data_collator=lambda rows: rows)


def build_args(tmp_path):
    return BLConfig(output_dir=str(tmp_path), objective="asft", use_cpu=True, bf16=False)


def test_evaluation_set_without_the_column_is_refused(tokenizer, text_data, tmp_path):
    column = with_column(tokenizer, text_data.select(range(3)))
    trainer = build(BLTrainer, tokenizer, column, tmp_path, objective="asft")
    with pytest.raises(ValueError, match="Cannot evaluate: the data set has no column `ref_logprobs`"):
        trainer.evaluate(column.remove_columns("ref_logprobs").map(lambda row: {"labels": row["input_ids"]}))


@pytest.mark.parametrize("kind", ["cp", "sp"])
def test_column_of_sequences_that_are_cut_up_is_refused(kind, tokenizer, text_data, tmp_path, monkeypatch):
    monkeypatch.setattr(BLTrainer, "is_shared_out", lambda self, *kinds: kind in kinds)
    with pytest.raises(ValueError, match="goes with text, and with whole sequences on each device"):
        build(BLTrainer, tokenizer, with_column(tokenizer, text_data.select(range(3))), tmp_path, objective="asft")


def test_a_reference_is_found_for_what_is_deep_within(tokenizer, text_data, tmp_path):
    spec = {"name": "nll", "special_tokens": {"name": "nll", "mix": {"asft": 0.1}}}
    assert (
        build(BLTrainer, tokenizer, text_data, tmp_path, model=make_adapted(tokenizer), objective=spec).reference == "adapter"
    )
    with pytest.raises(RecipeError, match="Objective 'asft' needs a reference model"):
        build(BLTrainer, tokenizer, text_data, tmp_path, objective=spec)


def test_reference_and_objective_are_recorded(tokenizer, text_data, tmp_path):
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path, model=make_adapted(tokenizer), objective="psft")
    assert json.loads(json.dumps(RunRecord.of(trainer).objective)) == {"name": "psft", "clip_high": 0.28}
