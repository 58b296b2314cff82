"""Composed objectives: each piece, and all of them together, against formulas in float64 and a plain loop over examples."""

import copy
import json
import math
import re

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import PromptTuningConfig

from bl_trainer import BLConfig, BLTrainer, Objective, Threshold
from bl_trainer.diagnosis.continuum import objective_name
from bl_trainer.errors import RecipeError
from bl_trainer.objectives.composition import Schedule, spell
from bl_trainer.objectives.pricing import masked_cost, price
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.tokens.columns import check_weights
from conftest import gap_near, make_double, write_recipe
from test_trainer import first_gradient
from ways import Gradients, Ordered, build, relative_difference, train, weights

LOGP = torch.cat([torch.linspace(-12, -0.01, 40, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
TO_TWO = {"from": 0, "to": 2, "over": [0.3, 1.0]}


def power(logp, alpha):
    return -logp if alpha == 0 else -torch.expm1(alpha * logp) / alpha


def slope_of(f, logp):
    leaf = logp.clone().requires_grad_()
    return torch.autograd.grad(f(leaf).sum(), leaf)[0]


# Schedules


def test_a_schedule_goes_from_one_value_to_the_other_and_stays():
    linear = Schedule.parse("alpha", TO_TWO)
    for progress, value in ((0, 0), (0.3, 0), (0.65, 1), (0.475, 0.5), (1, 2)):
        assert linear.at(progress) == pytest.approx(value, abs=1e-12)
    assert (linear.at(0), linear.at(0.3), linear.at(1)) == (0, 0, 2)  # exactly
    early = Schedule.parse("alpha", {"from": 3, "to": -1, "over": [0, 0.5], "shape": "cosine"})
    for progress in (0, 0.1, 0.25, 0.4):
        assert early.at(progress) == pytest.approx(1 + 2 * math.cos(2 * math.pi * progress))
    assert early.at(0.5) == early.at(1) == -1
    jump = Schedule.parse("alpha", {"from": 0, "to": 1, "over": [0.5, 0.5]})
    assert [jump.at(progress) for progress in (0, 0.499, 0.5, 1)] == [0, 0, 1, 1]


@pytest.mark.parametrize("progress", [0, 0.3, 0.3 + 1e-12, 0.30001, 0.5, 0.65, 0.99, 1])
def test_a_scheduled_power_is_the_power_of_the_moment(progress):
    objective = Objective.parse({"name": "power", "alpha": TO_TWO})
    alpha = max(0, (progress - 0.3) / 0.7) * 2
    torch.testing.assert_close(objective(LOGP, progress=progress), power(LOGP, alpha), rtol=1e-5, atol=0)
    torch.testing.assert_close(objective.gradient_weight(LOGP, progress=progress), (alpha * LOGP).exp())
    assert objective.at(progress)(LOGP).equal(objective(LOGP, progress=progress))
    assert objective.at(progress).statistics == ()
    assert objective.statistics == ("progress",)


def test_a_power_passes_through_nll_from_either_side():
    objective = Objective.parse({"name": "power", "alpha": {"from": -1, "to": 1}})
    for progress in (0.5 - 1e-9, 0.5, 0.5 + 1e-9):
        torch.testing.assert_close(objective(LOGP, progress=progress), -LOGP, rtol=1e-7, atol=0)
        torch.testing.assert_close(objective.gradient_weight(LOGP, progress=progress), torch.ones_like(LOGP), rtol=1e-6, atol=0)
    assert objective(LOGP, progress=0.5).equal(-LOGP)


def test_a_schedule_wants_to_know_the_progress():
    with pytest.raises(TypeError, match="This objective is scheduled: give it `progress`"):
        Objective.parse({"name": "power", "alpha": TO_TWO})(LOGP)


# A floor

ENTROPY = torch.linspace(0.1, 3, len(LOGP), dtype=torch.float64)
FLOORED = [
    ("neg_p", lambda logp, entropy: -torch.expm1(logp)),
    ({"name": "power", "alpha": 3}, lambda logp, entropy: power(logp, 3)),
    ({"name": "power", "alpha": -0.5}, lambda logp, entropy: power(logp, -0.5)),
    ("log_one_minus_p", lambda logp, entropy: torch.log1p(1e-3 - logp.exp())),
    ("test_objectives:gated", lambda logp, entropy: -logp * (-entropy).exp()),
    ("test_trainer:pushes_entropy", lambda logp, entropy: -torch.expm1(logp) - 0.1 * entropy),
    ({"name": "neg_p", "mix": {"nll": 0.05}}, lambda logp, entropy: -torch.expm1(logp) - 0.05 * logp),
]


@pytest.mark.parametrize("floor", [0, 0.1, 1])
@pytest.mark.parametrize(("spec", "f"), FLOORED, ids=[str(spec) for spec, _ in FLOORED])
def test_a_floor_is_the_smallest_weight(spec, f, floor):
    spec = spec if isinstance(spec, dict) else {"name": spec}
    objective = Objective.parse({**spec, "floor": floor})
    given = {"entropy": ENTROPY.clone().requires_grad_()} if "entropy" in objective.statistics else {}
    weight = -slope_of(lambda logp: f(logp, ENTROPY), LOGP)
    leaf = LOGP.clone().requires_grad_()
    cost = objective(leaf, **given)
    torch.testing.assert_close(cost, f(LOGP, ENTROPY) - (floor - weight).clamp(min=0) * LOGP)
    (slope,) = torch.autograd.grad(cost.sum(), leaf, retain_graph=True)
    torch.testing.assert_close(-slope, weight.clamp(min=floor))
    torch.testing.assert_close(objective.gradient_weight(LOGP, **given), weight.clamp(min=floor))
    if given:  # what the entropy's gradient is, a floor leaves alone
        (own,) = torch.autograd.grad(cost.sum(), given["entropy"], allow_unused=True)
        expected = -0.1 if "pushes" in objective.name else None
        assert own is None if expected is None else own.eq(expected).all()
    with torch.no_grad():
        again = objective(LOGP, **given)
    assert not again.requires_grad
    assert again.equal(cost)


def test_a_floor_and_impossible_tokens():
    objective = Objective.parse({"name": "power", "alpha": -1, "floor": 0.5})  # whose weight is never below
    assert objective.gradient_weight(torch.tensor([-math.inf])).isfinite().all()
    assert not objective(torch.tensor([-math.inf, 0.0]))[1].isnan()


# Mixtures


def test_a_mixture_adds_costs_and_gradients():
    spec = {"name": "neg_p", "mix": [{"name": "nll", "weight": 0.1}, {"name": "power", "alpha": 10, "weight": TO_TWO}]}
    objective = Objective.parse(spec)
    for progress, weight in ((0, 0), (0.65, 1), (1, 2)):

        def f(logp, weight=weight):
            return -torch.expm1(logp) - 0.1 * logp + weight * power(logp, 10)

        torch.testing.assert_close(objective(LOGP, progress=progress), f(LOGP))
        torch.testing.assert_close(objective.gradient_weight(LOGP, progress=progress), -slope_of(f, LOGP))
    same = Objective.parse({"name": "neg_p", "mix": {"nll": 0.1}})
    assert same == Objective.parse({"name": "neg_p", "mix": [{"name": "nll", "weight": 0.1}]})
    with_entropy = Objective.parse({"name": "nll", "mix": {"test_objectives:gated": 1}})
    assert with_entropy.statistics == ("entropy",)
    torch.testing.assert_close(with_entropy(LOGP, entropy=ENTROPY), -LOGP * (1 + (-ENTROPY).exp()))


# Tokens of their own objective, and weights


def test_special_tokens_keep_theirs_whatever_the_threshold():
    objective = Objective.parse({"name": "neg_p", "special_tokens": {"name": "power", "alpha": 0.5}})
    special = torch.arange(len(LOGP)) % 3 == 0
    expected = torch.where(special, power(LOGP, 0.5), -torch.expm1(LOGP))
    torch.testing.assert_close(objective(LOGP, is_special=special), expected)
    torch.testing.assert_close(objective(LOGP), -torch.expm1(LOGP))  # nobody said which are
    threshold = Threshold(above=0.2)
    priced = price(objective, threshold, {"logp": LOGP, "is_special": special})
    kept = special | (LOGP.exp() >= 0.2)
    assert priced.kept.equal(kept)
    torch.testing.assert_close(priced.cost, torch.where(kept, expected, 0))
    torch.testing.assert_close(priced.weight, kept * torch.where(special, (0.5 * LOGP).exp(), LOGP.exp()))


def test_neither_objective_sees_the_others_tokens():
    objective = Objective.parse({"name": "nll", "special_tokens": "neg_p", "floor": 0.1})
    logp = torch.tensor([-math.inf, -1.0], requires_grad=True)
    cost = objective(logp, is_special=torch.tensor([True, False]))
    assert cost.tolist() == [1, 1]
    assert torch.autograd.grad(cost.sum(), logp)[0].tolist() == [0, -1]


@pytest.mark.parametrize("spec", ["neg_p", "test_trainer:pushes_entropy", {"name": "power", "alpha": 2, "floor": 0.3}], ids=str)
def test_example_weights_multiply_cost_and_gradients(spec):
    objective, threshold = Objective.parse(spec), Threshold(above=0.01)
    given = {"entropy": ENTROPY} if objective.statistics else {}
    scale = torch.arange(len(LOGP)) % 4 * 0.5
    plain = price(objective, threshold, {"logp": LOGP, **given})
    priced = price(objective, threshold, {"logp": LOGP, "objective_weight": scale, **given})
    assert priced.kept.equal(plain.kept)
    torch.testing.assert_close(priced.cost, plain.cost * scale)
    torch.testing.assert_close(priced.weight, plain.weight * scale)
    if given and plain.entropy_slope is not None:
        torch.testing.assert_close(priced.entropy_slope, plain.entropy_slope * scale)
    impossible = torch.tensor([-math.inf, -1.0], dtype=torch.float64)
    zero = {"entropy": ENTROPY[:2]} if given else {}
    cost, weight = masked_cost(objective, torch.tensor([True, True]), impossible, torch.tensor([0.0, 1.0]), **zero)
    assert cost[0] == weight[0] == 0


# All together

ALL = {
    "name": "power",
    "alpha": {"from": 0, "to": 2, "over": [0.2, 0.8], "shape": "cosine"},
    "floor": {"from": 0.3, "to": 0.1},
    "mix": [{"name": "neg_p", "weight": 0.5}, {"name": "test_trainer:pushes_entropy", "weight": {"from": 0.2, "to": 0}}],
    "special_tokens": {"name": "nll", "mix": {"neg_p": 0.25}},
}


def weight_of_all(logp, is_special, progress):
    """The weight on the NLL gradient, and the slope in the entropy, in closed form."""
    share = min(1, max(0, (progress - 0.2) / 0.6))
    alpha, floor, third = 1 - math.cos(math.pi * share), 0.3 - 0.2 * progress, 0.2 * (1 - progress)
    ordinary = ((alpha * logp).exp() + (0.5 + third) * logp.exp()).clamp(min=floor)
    return torch.where(is_special, 1 + 0.25 * logp.exp(), ordinary), -0.1 * third * (~is_special).double()


@pytest.mark.parametrize("progress", [0, 0.2, 0.37, 0.5, 0.8, 1])
def test_everything_composed_has_the_gradient_of_the_formula(progress):
    objective = Objective.parse(ALL)
    special = torch.arange(len(LOGP)) % 2 == 0
    known = {"logp": LOGP, "entropy": ENTROPY, "is_special": special, "progress": progress}
    priced = price(objective, Threshold(), known)
    weight, slope = weight_of_all(LOGP, special, progress)
    torch.testing.assert_close(priced.weight, weight)
    torch.testing.assert_close(priced.entropy_slope, slope)
    given = {"is_special": special, "progress": progress}
    smooth = Objective.parse({key: value for key, value in ALL.items() if key != "floor"})  # a floor's value has another slope
    leaves = LOGP[:-1].clone().requires_grad_(), ENTROPY[:-1].clone().requires_grad_()
    given["is_special"] = special[:-1]
    assert torch.autograd.gradcheck(lambda logp, entropy: smooth(logp, entropy=entropy, **given), leaves)
    assert objective.at(progress)(LOGP, entropy=ENTROPY, is_special=special).equal(
        objective(LOGP, entropy=ENTROPY, is_special=special, progress=progress)
    )


@pytest.mark.parametrize("spec", [ALL, {"name": "power", "alpha": TO_TWO}, {"name": "neg_p", "floor": 0.1}], ids=str)
def test_a_composed_spec_survives_json(spec):
    objective = Objective.parse(spec)
    assert Objective.parse(objective.to_dict()) == objective
    assert Objective.parse(json.dumps(objective.to_dict())) == objective
    assert json.loads(json.dumps(objective.to_dict())) == objective.to_dict()


def test_schedules_have_names():
    assert list(Objective.parse(ALL).schedules) == ["alpha", "floor", "mix_pushes_entropy"]
    two = [{"name": "power", "alpha": TO_TWO, "weight": 1}, {"name": "power", "alpha": 1, "weight": TO_TWO}]
    spec = {"name": "nll", "mix": two, "special_tokens": {"name": "power", "alpha": TO_TWO}}
    assert list(Objective.parse(spec).schedules) == ["mix_power_2", "mix_power_1_alpha", "special_tokens_alpha"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "power", "alpha": 0.5}, "power 0.5"),
        ({"name": "power", "alpha": TO_TWO}, "power 0 to 2 over 0.3 to 1"),
        ({"name": "power", "alpha": {"from": 0.5, "to": 2, "shape": "cosine"}}, "power 0.5 to 2 cosine"),
        ({"name": "neg_p", "mix": {"nll": 0.1}, "floor": 0.1}, "neg_p + 0.1 nll, floor 0.1"),
        ({"name": "neg_p", "special_tokens": {"name": "power", "alpha": 0.5}}, "neg_p, special tokens power 0.5"),
    ],
    ids=str,
)
def test_people_read_a_composed_objective(spec, words):
    given = Objective.parse(spec).to_dict()
    assert spell(given) == words
    assert objective_name({"objective": given, "threshold": Threshold(0.2).to_dict()}) == f"{words}, p >= 0.2"


# Training, against a loop over examples that knows of every character who made it

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}a:{% generation %}{{ message['content'] + '<end>' }}{% endgeneration %}.:"
    "{% else %}{{ '<user>u' + message['content'] + '<end>' }}{% endif %}"
    "{% endfor %}"
)
ROUNDING = {"auto": 1e-9, "trl": 1e-6}  # of the heads, in float64; TRL's adds some of it in float32


@pytest.fixture(scope="module")
def chatty(tokenizer):
    """A tokenizer whose chat template has characters of its own, which content has too."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def weighted_chats(chat_data):
    return Dataset.from_list([{**row, "objective_weight": (i % 4) * 0.5} for i, row in enumerate(chat_data.select(range(16)))])


def pieces(row):
    """The texts that make up a conversation, and whether the template made them."""
    for message in row["messages"]:
        before, after = ("a:", "<end>.:") if message["role"] == "assistant" else ("<user>u", "<end>")
        yield from ((before, True), (message["content"], False), (after, True))


def tokens_of(model, tokenizer, data, cut=slice(None)):
    """Yield each conversation's row, log p and entropy of its tokens, and which of them the template made."""
    for row in data:
        parts = [(tokenizer(text)["input_ids"], is_special) for text, is_special in pieces(row)]
        ids = torch.tensor([i for part, _ in parts for i in part])[cut]
        special = torch.tensor([is_special for part, is_special in parts for _ in part])[cut][1:]
        rows = model(ids[None]).logits[0, :-1].log_softmax(-1)
        yield row, rows.gather(1, ids[1:, None])[:, 0], -(rows.exp() * rows).sum(-1), special


def expected_gradient(tokenizer, data, threshold, progress=0.0, cut=slice(None)):
    total, count, model = 0.0, 0, make_double(tokenizer)
    for row, logp, entropy, special in tokens_of(model, tokenizer, data, cut):
        p = logp.detach().exp()
        kept = special | ((p >= threshold["above"]) & (p <= threshold["below"]))
        weight, slope = weight_of_all(logp.detach(), special, progress)
        total = total + (row.get("objective_weight", 1) * kept * (slope * entropy - weight * logp)).sum()
        count += len(logp)
    (total / count).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def threshold(chatty, weighted_chats):
    """Two probabilities with no token near them."""
    with torch.no_grad():
        p = torch.cat([logp.exp() for _, logp, _, _ in tokens_of(make_double(chatty), chatty, weighted_chats)])
    return {"above": gap_near(p, 0.001), "below": gap_near(p, 0.5)}


CUTS = [
    {"per_device_train_batch_size": 16},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 16, "pad_to_multiple_of": 64},
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "padding_free": True},
    {"per_device_train_batch_size": 16, "packing": True, "max_length": 256},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "packing": True, "max_length": 128},
    {"per_device_train_batch_size": 16, "max_length": 20},
    {"per_device_train_batch_size": 16, "max_length": 20, "truncation_mode": "keep_end"},
    {"per_device_train_batch_size": 16, "max_length": 20, "packing": True},
    {"per_device_train_batch_size": 16, "shuffle_dataset": True, "stop_on_nan": True},
]


@pytest.mark.parametrize("head", ["auto", "trl"])
@pytest.mark.parametrize("options", CUTS, ids=str)
def test_training_follows_every_token(options, head, chatty, weighted_chats, threshold, tmp_path):
    options, cut = {**options, "loss_head": head}, slice(None)
    if options.get("max_length") == 20:
        cut = slice(-20, None) if "truncation_mode" in options else slice(20)
    expected = expected_gradient(chatty, weighted_chats, threshold, cut=cut)
    given = {"objective": ALL, "threshold": threshold, **options}
    assert relative_difference(first_gradient(chatty, weighted_chats, tmp_path, **given), expected) < ROUNDING[head]


@pytest.mark.parametrize("head", ["auto", "trl"])
def test_weights_of_examples_matter(head, chatty, weighted_chats, threshold, tmp_path):
    plain = weighted_chats.remove_columns("objective_weight")
    options = {"objective": ALL, "threshold": threshold, "per_device_train_batch_size": 16, "loss_head": head}
    actual = first_gradient(chatty, plain, tmp_path, **options)
    assert relative_difference(actual, expected_gradient(chatty, plain, threshold)) < ROUNDING[head]
    assert relative_difference(actual, expected_gradient(chatty, weighted_chats, threshold)) > 0.01


@pytest.mark.parametrize(("steps", "head"), [(4, "trl"), (5, "auto")])
def test_later_steps_go_by_their_progress(steps, head, chatty, weighted_chats, threshold, tmp_path):
    seen = Gradients()
    train(
        Ordered, chatty, weighted_chats, tmp_path, make_double(chatty), callbacks=[seen], objective=ALL, threshold=threshold,
        learning_rate=0.0, per_device_train_batch_size=16, max_steps=steps, loss_head=head,
    )  # fmt: skip
    for i, actual in enumerate(seen.all):
        expected = expected_gradient(chatty, weighted_chats, threshold, progress=i / steps)
        assert relative_difference(actual, expected) < ROUNDING[head]
    assert relative_difference(seen.all[-1], seen.all[0]) > 0.01


def test_streams_follow_every_token_too(chatty, weighted_chats, tmp_path):
    expected = first_gradient(chatty, weighted_chats, tmp_path, objective=ALL, per_device_train_batch_size=16)
    stream = weighted_chats.to_iterable_dataset()
    actual = first_gradient(chatty, stream, tmp_path, objective=ALL, per_device_train_batch_size=16)
    assert relative_difference(actual, expected) < 1e-9


def test_end_tokens_of_plain_texts_are_special(tokenizer, pair_data, tmp_path):
    """A prior-leaning objective that is exempt of them alone: nothing but end tokens trains."""
    spec = {"name": "nll", "special_tokens": "nll"}
    options = {"objective": spec, "threshold": {"above": 1.0}, "eval_data": pair_data, "per_device_eval_batch_size": 5}
    metrics = build(BLTrainer, tokenizer, pair_data, tmp_path, **options).evaluate()
    targets = sum(len(tokenizer(row["completion"])["input_ids"]) + 1 for row in pair_data)
    assert metrics["eval_kept_fraction"] == pytest.approx(len(pair_data) / targets)
    assert metrics["eval_gradient_weight"] == pytest.approx(len(pair_data) / targets)


def test_evaluation_weighs_by_its_own_column(tokenizer, text_data, tmp_path):
    data = text_data.select(range(8))
    doubled = data.add_column("objective_weight", [2.0] * 8)
    for eval_data, factor in ((data, 1), (doubled, 2)):
        trainer = build(BLTrainer, tokenizer, doubled, tmp_path, eval_data=eval_data, objective="neg_p")
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(factor * (1 - metrics["eval_target_prob"]), rel=1e-5)
        assert metrics["eval_gradient_weight"] == pytest.approx(factor * metrics["eval_target_prob"], rel=1e-5)
        again = trainer.evaluate(eval_data)  # which is prepared then
        assert again["eval_loss"] == pytest.approx(metrics["eval_loss"])


def test_a_resumed_run_goes_on_in_the_middle_of_a_schedule(chatty, weighted_chats, tmp_path):
    options = {
        "objective": ALL, "threshold": 0.005, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1,
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
    }  # fmt: skip
    whole = train(BLTrainer, chatty, weighted_chats, tmp_path, **options)
    again = build(BLTrainer, chatty, weighted_chats, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    for name, p in weights(whole).items():
        assert torch.equal(weights(again)[name], p), name
    record = json.loads((tmp_path / "out" / "checkpoint-3" / "bl_trainer.json").read_text())
    assert Objective.parse(record["objective"]) == Objective.parse(ALL)
    other = build(BLTrainer, chatty, weighted_chats, tmp_path, **{**options, "objective": {**ALL, "floor": 0.2}})
    with pytest.raises(ValueError, match=r"was trained with objective .*'floor': {'from': 0.3, 'to': 0.1"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))


def test_the_alpha_of_anneal_is_logged(tokenizer, text_data, tmp_path):
    trainer = train(
        BLTrainer, tokenizer, text_data, tmp_path, objective="anneal", max_steps=4, eval_data=text_data.select(range(4)),
        eval_strategy="steps", eval_steps=1, learning_rate=0.0,
    )  # fmt: skip
    logs = trainer.state.log_history
    assert [entry["objective_alpha"] for entry in logs if "loss" in entry] == [0.5, 0.5, 0.5, 2.75]
    assert [entry["eval_objective_alpha"] for entry in logs if "eval_loss" in entry] == [0.5, 0.5, 2.75, 5]
    assert Objective.parse({"name": "anneal", "end": {"from": 1, "to": 3}}).scheduled_at(0.75) == {"end": 2.5, "alpha": 1.5}


def test_what_is_within_an_objective_has_its_alpha_logged_too():
    """At any depth."""
    mixed = {"name": "nll", "mix": [{"name": "nll", "weight": 1, "mix": {"anneal": 0.5}}], "special_tokens": "anneal"}
    at = Objective.parse(mixed).scheduled_at(0.75)
    assert at == {"mix_nll_mix_anneal_alpha": 2.75, "special_tokens_alpha": 2.75}


def test_numbers_of_a_composition_may_be_in_quotes():
    quoted = {"name": "power", "alpha": {"from": "0", "to": "2", "over": ["0.3", "1"]}, "floor": "0.1", "mix": {"nll": "0.5"}}
    plain = {"name": "power", "alpha": {"from": 0, "to": 2, "over": [0.3, 1]}, "floor": 0.1, "mix": {"nll": 0.5}}
    assert Objective.parse(quoted) == Objective.parse(plain)


def test_the_values_of_the_moment_are_logged(tokenizer, text_data, tmp_path):
    spec = {"name": "power", "alpha": {"from": 0, "to": 2, "over": [0.5, 1.0]}, "floor": 0.1}
    trainer = train(
        BLTrainer, tokenizer, text_data, tmp_path, objective=spec, max_steps=4, eval_data=text_data.select(range(4)),
        eval_strategy="steps", eval_steps=1, learning_rate=0.0,
    )  # fmt: skip
    logs = trainer.state.log_history
    assert [entry["objective_alpha"] for entry in logs if "loss" in entry] == [0, 0, 0, 1]  # by which the step was made
    assert logs[-1]["objective_alpha"] == 1  # the summary's
    for entry in logs:
        if "loss" in entry:
            assert (entry["loss"] == pytest.approx(entry["nll"])) == (entry["objective_alpha"] == 0)
    assert [entry["eval_objective_alpha"] for entry in logs if "eval_loss" in entry] == [0, 0, 1, 2]
    assert not any("objective_floor" in entry for entry in logs)
    losses = [entry["eval_loss"] for entry in logs if "eval_loss" in entry]
    assert losses[0] == losses[1] != losses[2] != losses[3]


# Mistakes

SCHEDULED = {"name": "power", "alpha": {"from": 0, "to": 1}}
BAD = [
    ({"name": "power", "alpha": {"from": 0, "too": 2}}, "Unknown key 'too' in the schedule of `alpha`. Did you mean 'to'"),
    ({"name": "power", "alpha": {"from": 0}}, "`to` in the schedule of `alpha` must be a finite number, it is missing"),
    ({"name": "power", "alpha": {"from": "low", "to": 2}}, "`from` in the schedule of `alpha` must be a finite number, got '"),
    ({"name": "power", "alpha": {"from": 0, "to": True}}, "`to` in the schedule of `alpha` must be a finite number, got True"),
    ({"name": "power", "alpha": {"from": 0, "to": math.inf}}, "must be a finite number, got inf"),
    *(
        ({"name": "power", "alpha": {"from": 0, "to": 1, "over": over}}, "`over` in the schedule of `alpha` must be two shares")
        for over in ([0.5, 0.3], [0, 1.5], [-0.1, 1], [0.5], 0.5, ["a", "b"])
    ),
    ({"name": "power", "alpha": {"from": 0, "to": 1, "shape": "step"}}, "`shape` in the schedule of `alpha` must be one"),
    ({"name": "log_one_minus_p", "epsilon": {"from": 1, "to": 0}}, "`epsilon` of objective 'log_one_minus_p' must be positive"),
    ({"name": {"from": 0, "to": 1}}, "must be a name or a mapping with `name`"),
    ({"name": f"{__name__}:in_words", "mode": {"from": 0, "to": 1}}, "can't be scheduled: it is no number, its default is"),
    ({"name": "test_objectives:worded", "mode": {"from": 0, "to": 1}, "gamma": 1}, "failed when tried on a few tokens"),
    ({"name": f"{__name__}:has_a_floor"}, "has a parameter 'floor', which in a recipe means the same for every objective"),
    ({"name": "neg_p", "floor": 1.5}, "`floor` must be a number between 0 and 1, or a schedule of such, got 1.5"),
    ({"name": "neg_p", "floor": -0.1}, "`floor` must be a number between 0 and 1"),
    ({"name": "neg_p", "floor": "low"}, "`floor` must be a number between 0 and 1, or a schedule of such, got 'low'"),
    ({"name": "neg_p", "floor": {"from": 0, "to": 2}}, "`floor` must be a number between 0 and 1"),
    ({"name": "neg_p", "flor": 0.1}, "takes no parameters of its own: 'flor' is not one of them. Did you mean 'floor'?"),
    ({"name": "neg_p", "mix": {}}, "`mix` must be objectives with their weights, got {}. Write `mix: {nll: 0.1}`"),
    ({"name": "neg_p", "mix": "nll"}, "`mix` must be objectives with their weights, got 'nll'"),
    ({"name": "neg_p", "mix": {"nil": 0.1}}, "In `mix` of the objective: Unknown objective 'nil'. Did you mean 'nll'"),
    ({"name": "neg_p", "mix": {"nll": -0.1}}, "such, got -0.1. It is that of 'nll' in `mix`"),
    ({"name": "neg_p", "mix": {"power": {"alpha": 2}}}, "`mix` with an objective's parameters must be a list, got {'power'"),
    ({"name": "neg_p", "mix": {"name": "power", "alpha": 2, "weight": 1}}, "must be a list, got {'name': 'power', 'al"),
    ({"name": "neg_p", "mix": [{"name": "nll", "wieght": 1}]}, "got {'name': 'nll', 'wieght': 1}. Did you mean 'weight'?"),
    ({"name": f"{__name__}:has_a_weight"}, "has a parameter 'weight', which in a recipe means the same for every objective"),
    ({"name": f"{__name__}:begins_at_once"}, "is not finite at log p = -50 and progress 0. It must be"),
    ({"name": "power", "alpha": 0, 5: None}, "A decimal comma must be a point: write e.g. `0.5`, not `0,5`."),  # `alpha: 0,5`
    ({"name": "anneal", "over": [0.2, 1]}, "'over' is not one of them. For another schedule give `start` and `end` the"),
    ({"name": "focal", "gamma": "2"}, "`gamma` of objective 'focal' must be a finite number, got '2'. Leave out the qu"),
    ({"name": "neg_p", "special_tokens": True}, "it must be a name or a mapping with `name`, got True. Write `special_t"),
    ({"name": "neg_p", "mix": [{"name": "nll"}]}, "Each of `mix` must have a `name` and a `weight`, got {'name': 'nll'}"),
    ({"name": "neg_p", "mix": [{"name": "nll", "weight": 1, "special_tokens": "nll"}]}, "`special_tokens` within `mix`"),
    ({"name": "neg_p", "special_tokens": "nil"}, "In `special_tokens` of the objective: Unknown objective 'nil'"),
    ({"name": "neg_p", "special_tokens": {"name": "nll", "special_tokens": "nll"}}, "`special_tokens` within `special_tokens`"),
    ({"name": "neg_p", "special_tokens": {"from": 0, "to": 1}}, "In `special_tokens` of the objective: it must be a name"),
    ({"name": "neg_p", "flor": 0.1}, "takes no parameters of its own: 'flor' is not one of them. Did you mean 'floor'?"),
    ({"name": "neg_p", "mix": {"power": 0.1}}, "'alpha' is missing. Write `mix: {nll: 0.1}`, or with parameters `mix: ["),
    ({"name": "neg_p", "special_tokens": "power"}, "'alpha' is missing. Write `special_tokens: {name: power, alpha: ...}`."),
    ({"name": "neg_p", "floor": {"from": 0, "to": 1, "shape": "log"}}, "got 'log'. Write e.g. `{from: 0, to: 1, over: [0.3"),
    ({"name": "focal", "gamma": {"from": 0, "to": -2}}, "`gamma` of objective 'focal' must be at least 0, got -2"),
    ({"name": "power", "alpha": {"start": 0, "end": 2}}, "{'start': 0, 'end': 2}. Write a schedule as `{from: 0, to: 1"),
    ({"name": "power", "alpha": [0, 2]}, "must be a finite number, got [0, 2]. Write a schedule as `{from: 0, to: 1"),
]  # fmt: skip


def in_words(logp, mode="slow"):
    return -logp


def has_a_floor(logp, floor=0.1):
    return -logp


def has_a_weight(logp, weight):
    return -weight * logp


def begins_at_once(logp, progress):
    """What is 0 / 0 at the first step."""
    return -torch.expm1(3 * progress * logp) / (3 * progress)


@pytest.mark.parametrize(("spec", "message"), BAD, ids=[str(spec) for spec, _ in BAD])
def test_a_wrong_composition_says_what_to_write(spec, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        Objective.parse(spec)


@pytest.mark.parametrize("objective", [SCHEDULED, "anneal"], ids=["schedule", "anneal"])
def test_the_best_checkpoint_is_not_chosen_by_a_moving_loss(objective, tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "objective": objective}
    with pytest.raises(ValueError, match=r"Cannot choose by `metric_for_best_model: eval_loss`.* Write .*eval_nll"):
        BLConfig(**options, metric_for_best_model="eval_loss")
    BLConfig(**options, metric_for_best_model="eval_nll")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "is -1.0: it must be a number, 0 or above"),
        (math.nan, "is nan: it"),
        (math.inf, "is inf: it"),
        (1e40, r"is 1e\+40: it must be at most 3.4e\+38"),
        (None, "is missing"),
    ],
    ids=str,
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_wrong_weight_names_its_row(value, message, streamed, tokenizer, text_data, tmp_path):
    data = text_data.select(range(8)).add_column("objective_weight", [1.0, 0.0, value] + [1.0] * 5)
    message = f"`objective_weight` of row 2 of the train set, counted from 0, {message}"
    if streamed:
        with pytest.raises(ValueError, match=message):
            train(BLTrainer, tokenizer, data.to_iterable_dataset(), tmp_path)
    else:  # before the model loads
        with pytest.raises(ValueError, match=message):
            BLTrainer("no-such-model", BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), train_dataset=data)
        with pytest.raises(ValueError, match=message.replace("train", "eval")):
            build(BLTrainer, tokenizer, text_data, tmp_path, eval_data=data)


@pytest.mark.parametrize("name", ["objective_weights", "objectiveweight", "Objective_weight"])
def test_a_misspelt_weight_is_no_weight(name, text_data, tmp_path):
    args = BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    data = text_data.add_column(name, [1.0] * len(text_data))
    message = f"The column '{name}' of the train set would be ignored. Did you mean `objective_weight`"
    with pytest.raises(RecipeError, match=message):
        BLTrainer("no-such-model", args, train_dataset=data)


def test_weights_are_said_to_be_used(tokenizer, text_data, tmp_path, capsys):
    train(BLTrainer, tokenizer, text_data, tmp_path)
    assert "Weights:" not in capsys.readouterr().out
    train(BLTrainer, tokenizer, text_data.add_column("objective_weight", [1.0] * len(text_data)), tmp_path / "b")
    assert (
        "Weights: `objective_weight`, and those of messages and tokens, multiply the costs of tokens."
        in capsys.readouterr().out
    )


NUMBER = "it must be a finite number, 0 or above"


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1.0, -1.0, 1.0], f"is -1: {NUMBER}"),
        ([1.0, math.nan, 1.0], f"is nan: {NUMBER}"),
        (math.inf, f"is inf: {NUMBER}"),
        (None, "is None. Give every example a number, or one for each token"),
        ([1.0, None, 1.0], r"is \[1.0, None, 1.0\]. Give every example"),
        ("heavy", "is 'heavy'. Give every example"),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [False, True])
def test_a_wrong_weight_of_a_stream_that_is_not_prepared(weight, message, first, tokenizer, tmp_path):
    tokens = {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}
    rows = [{**tokens, "objective_weight": 0.5}, {**tokens, **({} if weight is None else {"objective_weight": weight})}]
    data = IterableDataset.from_generator(lambda: iter(rows[::-1] * 4 if first else rows * 4))
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = build(BLTrainer, tokenizer, data, tmp_path, **options)
    with pytest.raises(RecipeError, match=f"`objective_weight` of an example {message}"):
        trainer.train()


class TestWhatCanNotTell:
    SPEC = {"name": "neg_p", "special_tokens": "nll"}

    def test_token_ids(self, tokenizer, tmp_path):
        data = Dataset.from_list([{"input_ids": [4, 5, 6]}] * 8)
        args = BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, objective=self.SPEC)
        with pytest.raises(
            ValueError, match="which tokens the chat template made, and the train set can't tell: it holds token ids"
        ):
            BLTrainer("no-such-model", args, train_dataset=data)

    def test_tool_calls(self, chatty, chat_data, tmp_path):
        rows = [dict(row) for row in chat_data.select(range(4))]
        rows[2]["messages"] = [{**message, "reasoning": "x"} for message in rows[2]["messages"]]
        with pytest.raises(ValueError, match=r"can't tell the chat template's tokens from content in row 2 of the train set"):
            build(BLTrainer, chatty, Dataset.from_list(rows), tmp_path, objective=self.SPEC)

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"formatting_func": lambda row: row["text"]}, "`formatting_func` renders the examples"),
            ({"data_collator": lambda features: {}}, "the `data_collator` is your own"),
        ],
        ids=["formatting_func", "data_collator"],
    )
    def test_ones_own_code(self, options, why, tokenizer, text_data, tmp_path):
        args = BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, objective=self.SPEC)
        with pytest.raises(ValueError, match=f"`special_tokens` needs to follow tokens .* can't here: {why}. Remove it."):
            BLTrainer("no-such-model", args, train_dataset=text_data, processing_class=tokenizer, **options)

    def test_images(self, image_data, tmp_path):
        data = image_data.add_column("objective_weight", [1.0] * len(image_data))
        args = BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
        with pytest.raises(
            ValueError, match=r"`objective_weight` needs to follow .*: the data set has images. Remove the column"
        ):
            BLTrainer("no-such-model", args, train_dataset=data)

    def test_context_parallelism(self, text_data, tmp_path, monkeypatch):
        args = BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, objective=self.SPEC)
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
        args.pad_to_multiple_of = 4
        with pytest.raises(ValueError, match="can't here: context parallelism cuts sequences up"):
            BLTrainer("no-such-model", args, train_dataset=text_data)


def test_a_set_of_a_folder_may_have_weights_for_itself(checkpoint, tmp_path):
    """Loading gives both sets the column, filled with None."""
    data = tmp_path / "text"  # also the name of a format
    data.mkdir()
    rows = [{"prompt": f"a{i}", "completion": "bc", "objective_weight": i % 3} for i in range(8)]
    bare = [{key: row[key] for key in ("prompt", "completion")} for row in rows]
    for split, part in (("train", rows), ("test", bare)):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    path = write_recipe(tmp_path, checkpoint, data, eval_strategy="epoch", max_steps=1)
    train_set, test_set = Recipe.read(["--config", str(path)]).load_datasets()
    assert train_set["objective_weight"][:] == [row["objective_weight"] for row in rows]
    assert "objective_weight" not in test_set.column_names
    (data / "train.jsonl").write_text("".join(json.dumps({**row, "objective_weight": None}) + "\n" for row in rows[:1]))
    with (data / "train.jsonl").open("a") as file:
        file.write(json.dumps(rows[1]) + "\n")
    with pytest.raises(RecipeError, match="`objective_weight` of row 0 of the train set, counted from 0, is missing"):
        Recipe.read(["--config", str(path)]).load_datasets()


def test_the_test_set_of_a_folder_may_have_them_alone(checkpoint, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": f"a{i}", "completion": "bc", "objective_weight": i % 3} for i in range(8)]
    bare = [{key: row[key] for key in ("prompt", "completion")} for row in rows]
    for split, part in (("train", bare), ("test", rows)):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    path = write_recipe(tmp_path, checkpoint, data, eval_strategy="epoch", max_steps=1)
    train_set, test_set = Recipe.read(["--config", str(path)]).load_datasets()
    assert train_set.to_list() == bare
    assert test_set.to_list() == rows
    rows[0]["other"] = 1
    (data / "test.jsonl").write_text("".join(json.dumps({**row, "other": 1}) + "\n" for row in rows))
    with pytest.raises(RecipeError, match="column names don't match"):
        Recipe.read(["--config", str(path)]).load_datasets()


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
def test_weights_of_tokens_are_cut_with_them(truncation_mode, tokenizer, tmp_path):
    ids = tokenizer("a question and its answer<end>")["input_ids"]
    row = {"input_ids": ids, "labels": ids, "objective_weight": [i / 10 for i in range(len(ids))]}
    options = {"max_length": 12, "truncation_mode": truncation_mode}
    data = build(BLTrainer, tokenizer, Dataset.from_list([row, row]), tmp_path, **options).train_dataset
    kept = slice(12) if truncation_mode == "keep_start" else slice(-12, None)
    assert data[1]["input_ids"] == ids[kept]
    assert data[1]["objective_weight"] == row["objective_weight"][kept]
    cut = {"input_ids": ids[kept], "labels": ids[kept], "objective_weight": row["objective_weight"][kept]}
    whole, short = (
        first_gradient(tokenizer, Dataset.from_list([each] * 2), tmp_path, objective="neg_p", **options) for each in (row, cut)
    )
    assert torch.equal(whole, short)


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        (None, False),
        (-1.0, False),
        (math.nan, False),
        (math.inf, True),
        (True, False),
        ("1", False),
        ([], True),
        ([1.0, None], True),
        ([1.0, -1.0], True),
        ([1.0, 2.0], False),
    ],
    ids=str,
)
def test_the_row_of_a_wrong_weight_is_found_in_any_batch(value, tokens):
    good = [1.0] if isinstance(value, list) else value if isinstance(value, (str, bool)) else 1
    columns = {"input_ids": [[5]] * 2100} if tokens else {"text": ["a"] * 2100}
    given = [good] * 1500 + [value] + [good] * 599
    row = 0 if isinstance(value, (str, bool)) or (isinstance(value, list) and not tokens) else 1500
    with pytest.raises(RecipeError, match=f"`objective_weight` of row {row} of the train set, counted from 0, is"):
        check_weights(Dataset.from_dict({**columns, "objective_weight": given}), "train")


def test_right_weights_are_read_in_batches(monkeypatch):
    monkeypatch.setattr("bl_trainer.tokens.columns._check_weight", lambda *args: pytest.fail("row by row"))
    for given in ([0, 1, 2], [0.0, 0.5, 1e9], [[0.5], [1.0, 2.0], [0.0]]):
        data = Dataset.from_dict({"input_ids": [[5], [5, 6], [7]], "objective_weight": given})
        assert check_weights(data, "train") is data


def test_a_row_of_text_has_one_weight(tokenizer, text_data, tmp_path):
    data = text_data.select(range(2)).add_column("objective_weight", [[1.0, 2.0], [1.0]])
    with pytest.raises(RecipeError, match=r"row 0 of the train set, counted from 0, is \[1.0, 2.0\]: it must be a number"):
        build(BLTrainer, tokenizer, data, tmp_path)


def test_weights_that_are_all_zero_are_told(tokenizer, text_data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.training.guards.logger.warning", said.append)
    for weight, warned in ((0.5, 0), (0.0, 1)):
        train(BLTrainer, tokenizer, text_data.add_column("objective_weight", [weight] * len(text_data)), tmp_path)
        assert len(said) == warned
    assert said[0].startswith("Nothing trains: since the last log every target token had the weight 0")


@pytest.mark.parametrize("head", ["trl", "auto"])
def test_weights_of_tokens_stand_beside_them_after_virtual_tokens(head, tokenizer, tmp_path):
    """Which predict the first token: what trains on tokens one by one adds up to what trains on all."""
    ids = tokenizer("a question")["input_ids"]
    chosen = [[float(i == j) for i in range(len(ids))] for j in range(len(ids))]
    data = Dataset.from_list([{"input_ids": ids, "labels": ids, "objective_weight": weight} for weight in chosen])
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = build(BLTrainer, tokenizer, data, tmp_path, peft_config=peft_config, loss_head=head)
    found = [trainer.objective_loss(trainer.model, trainer.data_collator([row]), 0.0) for row in trainer.train_dataset]
    for j, each in enumerate(found):
        assert each.cost[0].nonzero().flatten().tolist() == [each.cost.shape[1] - len(ids) + j]
    whole = torch.stack([each.cost for each in found]).sum(0)
    torch.testing.assert_close(whole[0, -len(ids) :], -found[0].logp[0, -len(ids) :])
