"""Objectives and thresholds against their formulas in float64, and every mistake a spec can hold."""

import math
import pickle
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch

from bl_trainer.errors import DependencyError, LossError, RecipeError
from bl_trainer.objectives import neg_p, nll
from bl_trainer.objectives.objective import Objective
from bl_trainer.objectives.pricing import masked_cost
from bl_trainer.objectives.spec import named
from bl_trainer.objectives.threshold import Threshold

# spec, f(log p), weight on the NLL gradient -df/dlog p: the paper's formulas, written for float64
FORMULAS = [
    ("nll", lambda logp: -logp, torch.ones_like),
    ("neg_p", lambda logp: -torch.expm1(logp), torch.exp),
    *(
        (
            {"name": "power", "alpha": alpha},
            lambda logp, alpha=alpha: -torch.expm1(alpha * logp) / alpha,
            lambda logp, alpha=alpha: torch.exp(alpha * logp),
        )
        for alpha in (10, 1, 0.5, 0.1, 1e-6, -1e-3, -0.5, -0.79)
    ),
    *(
        (
            {"name": "log_one_minus_p", "epsilon": epsilon},
            lambda logp, epsilon=epsilon: torch.log1p(epsilon - logp.exp()),
            lambda logp, epsilon=epsilon: logp.exp() / (epsilon - torch.expm1(logp)),
        )
        for epsilon in (1e-3, 0.1)
    ),
]
SPECS = [spec for spec, *_ in FORMULAS]
GRID = torch.cat([-torch.logspace(2, -9, 3001), torch.zeros(1)])  # log p from -100 up to 0, float32


def relative_error(actual, expected):
    smallest = torch.finfo(torch.float32).tiny  # below it float32 itself has fewer digits
    return ((actual.double() - expected).abs() / expected.abs().clamp(min=smallest)).max().item()


@pytest.mark.parametrize(("spec", "f", "weight"), FORMULAS, ids=map(str, SPECS))
def test_value_and_gradient_match_float64(spec, f, weight):
    objective = Objective.parse(spec)
    cost = objective(GRID)
    assert cost.dtype == torch.float32
    assert relative_error(cost, f(GRID.double())) <= 1e-6
    assert relative_error(objective.gradient_weight(GRID), weight(GRID.double())) <= 1e-6


@pytest.mark.parametrize(("spec", "f", "weight"), FORMULAS, ids=map(str, SPECS))
def test_weight_is_the_papers_closed_form(spec, f, weight):
    p = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    torch.testing.assert_close(Objective.parse(spec).weight(p.log()), weight(p.log()) * (1 - p))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1, 5, 10])
def test_weight_of_power_peaks_where_the_paper_says(alpha):
    p = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:]
    peak = p[Objective.parse({"name": "power", "alpha": alpha}).weight(p.log()).argmax()]
    assert peak.item() == pytest.approx(alpha / (1 + alpha), abs=2e-5)  # paper, section 3


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradcheck(spec):
    logp = torch.linspace(-5, -0.01, 30, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Objective.parse(spec), logp)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradient_on_the_labels_logit_is_the_weight(spec):
    objective = Objective.parse(spec)
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (7, 1))
    logp = logits.log_softmax(-1).gather(1, labels).squeeze(1)
    (grad,) = torch.autograd.grad(objective(logp).sum(), logits)
    torch.testing.assert_close(-grad.gather(1, labels).squeeze(1), objective.weight(logp))


def test_power_is_continuous_through_zero():
    for alpha in (1e-3, 1e-9, 1e-15, 1e-17, 0, -1e-17, -1e-15, -1e-9, -1e-3):
        cost = Objective.parse({"name": "power", "alpha": alpha})(GRID.double())
        # (1 - p^alpha) / alpha = -log p (1 + alpha log p / 2 + ...)
        assert relative_error(cost, -GRID.double()) <= 1e-6 + abs(alpha) * 60
    at_zero = Objective.parse({"name": "power", "alpha": 0})
    assert torch.equal(at_zero(GRID), -GRID)


def test_power_one_is_neg_p():
    one, neg_p = Objective.parse({"name": "power", "alpha": 1}), Objective.parse("neg_p")
    torch.testing.assert_close(one(GRID), neg_p(GRID), rtol=2e-7, atol=0)
    torch.testing.assert_close(one.gradient_weight(GRID), neg_p.gradient_weight(GRID), rtol=2e-7, atol=1e-38)


@pytest.mark.parametrize("alpha", [-0.5, -1, -3, -100])
def test_negative_alpha_is_more_prior_averse_and_finite(alpha):
    objective = Objective.parse({"name": "power", "alpha": alpha})
    logp = torch.tensor([-100.0, -20.0, -3.0, -0.1])
    assert objective(logp).isfinite().all()
    weight = objective.gradient_weight(logp)
    assert weight.isfinite().all()
    assert (weight > 1).all()  # NLL has 1
    dense = torch.linspace(-100, 0, 5001)
    assert (objective(dense).diff() <= 0).all()  # goes on falling in p where it is continued


def test_impossible_tokens_have_the_limit():
    impossible = torch.tensor([-math.inf])
    assert Objective.parse("neg_p")(impossible).item() == 1
    assert Objective.parse({"name": "power", "alpha": 0.5})(impossible).item() == 2
    for spec in ("neg_p", {"name": "power", "alpha": 0.5}, "log_one_minus_p"):
        assert Objective.parse(spec).gradient_weight(impossible).item() == 0


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_spec_survives_pickle_and_dict(spec):
    objective = Objective.parse(spec)
    objective(GRID)
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert Objective.parse(objective.to_dict()) == objective


def test_numbers_may_come_as_text():
    assert Objective.parse({"name": "power", "alpha": "1e-3"}).parameters == {"alpha": 1e-3}  # YAML reads 1e-3 as text
    assert Objective.parse('{"name": "power", "alpha": 10}') == Objective("power", {"alpha": 10})
    assert Threshold.parse("0.2") == Threshold.parse(0.2) == Threshold.parse({"above": "2e-1"}) == Threshold(above=0.2)


ENDS = [{}, {"start": 0, "end": 0}, {"start": 0, "end": 3}, {"start": 2.5, "end": 0.5}]


@pytest.mark.parametrize("parameters", ENDS, ids=str)
def test_anneal_matches_float64(parameters):
    anneal = Objective.parse({"name": "anneal", **parameters})
    start, end = parameters.get("start", 0.5), parameters.get("end", 5)
    alphas = {
        0.0: start,
        0.3: start,
        0.5: start,
        0.5 + 1e-12: start,
        0.75: (start + end) / 2,
        0.9: 0.2 * start + 0.8 * end,
        1.0: end,
    }
    for progress, alpha in alphas.items():
        for entropy in (0.0, 0.4, 3.0, 11.0):
            given = {"progress": progress, "entropy": torch.full_like(GRID, entropy)}
            cost, weight = anneal(GRID, **given), anneal.gradient_weight(GRID, **given)
            a = alpha * math.exp(-given["entropy"][0].item())
            for x, f, w in zip(GRID.tolist(), cost.tolist(), weight.tolist(), strict=True):
                assert f == pytest.approx(-math.expm1(a * x) / a if a else -x, rel=1e-6, abs=1e-30)
                assert w == pytest.approx(math.exp(a * x), rel=1e-6, abs=1e-37)


@pytest.mark.parametrize("parameters", ENDS, ids=str)
def test_anneal_gradcheck(parameters):
    objective = Objective.parse({"name": "anneal", **parameters})
    logp = torch.linspace(-5, -0.01, 30, dtype=torch.float64, requires_grad=True)
    entropy = torch.linspace(0, 9, 30, dtype=torch.float64)
    for progress in (0.0, 0.7, 1.0):
        assert torch.autograd.gradcheck(lambda x, progress=progress: objective(x, progress=progress, entropy=entropy), logp)


def test_anneal_has_no_gradient_through_the_entropy():
    logp, entropy = GRID.clone().requires_grad_(), torch.full_like(GRID, 0.5, requires_grad=True)
    cost = Objective.parse("anneal")(logp, progress=0.7, entropy=entropy).sum()
    of_logp, of_entropy = torch.autograd.grad(cost, (logp, entropy), allow_unused=True)
    assert of_entropy is None
    assert (of_logp[GRID > -1] < 0).all()


def test_anneal_of_an_unknown_entropy_is_unknown():
    unknown = Objective.parse("anneal")(torch.tensor([-1.0]), progress=0.7, entropy=torch.tensor([math.nan]))
    assert unknown.isnan().all()


def test_anneal_is_a_schedule_of_power_where_the_model_is_sure():
    schedule = Objective.parse({"name": "power", "alpha": {"from": 0.5, "to": 5, "over": [0.5, 1]}})
    for progress in (0.0, 0.2, 0.5, 0.6, 0.85, 1.0):
        given = {"progress": progress, "entropy": torch.zeros_like(GRID)}
        torch.testing.assert_close(Objective.parse("anneal")(GRID, **given), schedule(GRID, **given))
        weights = (Objective.parse(each).gradient_weight(GRID, **given) for each in ("anneal", schedule.to_dict()))
        torch.testing.assert_close(*weights, rtol=1e-6, atol=0)


def test_anneal_with_one_alpha_is_near_deft():
    """Where one token has all of the probability s = e^-H, and where the distribution is even."""
    for size in (1, 2, 50):
        given = {"entropy": torch.full_like(GRID, math.log(size)), "log_sum_sq_probs": torch.full_like(GRID, -math.log(size))}
        same = Objective.parse({"name": "anneal", "start": 1, "end": 1})
        torch.testing.assert_close(same(GRID, progress=0.7, **given), Objective.parse("deft")(GRID, **given))


def test_anneal_of_an_impossible_token():
    impossible, sure = torch.tensor([-math.inf]), torch.zeros(1)
    anneal = Objective.parse("anneal")
    assert anneal(impossible, progress=1.0, entropy=sure).item() == pytest.approx(1 / 5)
    assert anneal.gradient_weight(impossible, progress=1.0, entropy=sure).item() == 0
    begins = Objective.parse({"name": "anneal", "start": 0})
    assert begins.gradient_weight(impossible, progress=0.5, entropy=sure).item() == 1
    assert begins(impossible, progress=0.5, entropy=sure).item() == math.inf


def test_statistics_that_are_not_given_are_named():
    with pytest.raises(TypeError, match="Objective 'anneal' looks at more than p: give it entropy, progress too"):
        Objective.parse("anneal").gradient_weight(torch.tensor([-1.0]))


# A user's own objectives, found by import path


def gated(logp, entropy, *, gamma=1.0):
    return -logp * torch.exp(-gamma * entropy.detach())


def every_statistic(logp, entropy, log_sum_sq_probs, is_top1, label, progress, scale):
    return scale * (-logp * is_top1 + entropy * log_sum_sq_probs.exp() + label + progress)


HERE = __name__


def closure():
    def within(logp):
        return -logp

    return within


def test_a_function_is_recorded_by_its_import_path():
    given = {"name": gated, "gamma": 2, "mix": {nll: 0.1}, "special_tokens": Objective.parse("neg_p")}
    written = {"name": f"{HERE}:gated", "gamma": 2, "mix": {"nll": 0.1}, "special_tokens": {"name": "neg_p"}}
    assert named(given) == written
    assert Objective.parse(given) == Objective.parse(written)
    assert Objective.parse(neg_p).name == "neg_p"
    assert Objective.parse(gated).function is gated
    with pytest.raises(RecipeError, match="'within' in a checkpoint: it is defined within another function"):
        Objective.parse(closure())


def test_arrays_in_arrays_out():
    logp = np.log(np.linspace(0.1, 0.9, 5))
    for dtype in (np.float64, np.float32):
        found = Objective.parse("neg_p").weight(logp.astype(dtype))
        assert isinstance(found, np.ndarray)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, np.exp(logp) * (1 - np.exp(logp)), rtol=1e-5)
    np.testing.assert_allclose(Objective.parse("nll")(logp), -logp)
    entropy = np.full(5, 0.3)
    np.testing.assert_allclose(Objective.parse(gated)(logp, entropy=entropy), -logp * np.exp(-0.3))
    assert Objective.parse("neg_p").gradient_weight(-1) == pytest.approx(np.exp(-1.0))
    assert isinstance(Objective.parse("neg_p")(torch.tensor([-1.0])), torch.Tensor)


@pytest.mark.parametrize("p", [torch.tensor([0.5, 0.0]), np.array([0.5]), 1])
def test_p_in_place_of_log_p_is_refused(p):
    objective = Objective.parse("neg_p")
    for method in (objective.weight, objective.gradient_weight):
        with pytest.raises(LossError, match=r"Cannot take (0.5|1) for a log-probability: .* Give `log\(p\)` in place of p"):
            method(p)


def by_layout(logp):
    return -logp * logp.dim()


def by_batch_mean(logp):
    return -logp / (-logp).mean().detach()


def no_gradient(logp):
    return -logp.detach()


def reduced(logp):
    return -logp.mean()


def raises(logp):
    raise RuntimeError("out of ideas")


def infinite(logp):
    return logp / 0


def wrong_first(p, alpha):
    return p


def any_parameters(logp, **parameters):
    return -logp * parameters["scale"]


def above_the_mean(logp):
    return -logp * (logp.detach() > logp.detach().mean())


def above_the_median(logp):
    return torch.where(logp >= logp.median(), -logp, 0 * logp)


def by_mean_entropy(logp, entropy):
    return -logp * entropy / entropy.mean()


def infinite_at_certainty(logp):
    return torch.log(-torch.expm1(logp))


def naive_power(logp):
    return (1 - logp.exp() ** 0.1) / 0.1


def infinite_slope(logp):
    return torch.sqrt(-torch.expm1(logp))


def misspelt_statistic(logp, entrop):
    return -logp * entrop


def worded(logp, mode, gamma):
    assert mode == "1"
    return -logp * gamma


def random_half(logp):
    return -logp * (torch.rand_like(logp) < 0.5)


NOT_A_FUNCTION = 3


def test_own_function_gets_what_it_names():
    path = f"{__name__}:every_statistic"
    objective = Objective.parse({"name": path, "scale": 2})
    assert objective.statistics == ("entropy", "log_sum_sq_probs", "is_top1", "label", "progress")
    logp = torch.tensor([-1.0, -2.0])
    statistics = {
        "entropy": torch.tensor([0.5, 1.0]),
        "log_sum_sq_probs": torch.tensor([-0.5, -0.1]),
        "is_top1": torch.tensor([True, False]),
        "label": torch.tensor([3, 4]),
        "progress": 0.25,
    }
    expected = every_statistic(logp, **statistics, scale=2)
    assert torch.equal(objective(logp, **statistics), expected)
    assert torch.equal(objective.gradient_weight(logp, **statistics), torch.tensor([2.0, 0.0]))
    assert Objective.parse({"name": f"{__name__}:gated", "gamma": 0}).statistics == ("entropy",)
    assert Objective.parse({"name": f"{__name__}:any_parameters", "scale": 3}).parameters == {"scale": 3}
    assert Objective.parse({"name": f"{__name__}:worded", "mode": "1", "gamma": "1e-3"}).parameters["gamma"] == 1e-3
    assert Objective.parse(f"{__name__}:naive_power").statistics == ()
    assert Objective.parse(f"{__name__}:random_half").name.endswith("random_half")  # per token, so allowed


BAD_OBJECTIVES = [
    ({"name": "anneal", "start": -1}, r"`start` of objective 'anneal' must not be negative, got -1; 0 is `nll`"),
    ({"name": "anneal", "start": {"from": -1, "to": 1}}, r"`start` of objective 'anneal' must not be negative, got -1"),
    ({"name": "anneal", "end": -1}, r"`end` of objective 'anneal' must not be negative, got -1; 0 is `nll`"),
    ({"name": "anneal", "end": "much"}, r"`end` of objective 'anneal' must be a finite number, got 'much'"),
    ({"name": "anneal", "alpha": 4}, r"takes start, end: 'alpha' is not one of them"),
    ({"name": "anneal", "progress": 1}, "'progress' is a statistic that the trainer supplies"),
    (None, "`objective` must be a name or a mapping with `name`, got None"),
    ("", "must be a name or a mapping"),
    (3, "must be a name or a mapping with `name`, got 3"),
    (max, "Cannot record the objective <built-in function max> in a checkpoint: no import path leads to it"),
    (lambda logp: -logp, "Cannot record the objective '<lambda>' in a checkpoint: it is a lambda, so it cannot be imported"),
    ({"name": partial(gated, gamma=2)}, r"no import path leads to it. .* `\{\"name\": my_losses.gated, \"gamma\": 2\}`"),
    ({"name": "nll", "mix": {lambda logp: -logp: 0.1}}, "Cannot record the objective '<lambda>'"),
    ({"alpha": 3}, "must be a name or a mapping with `name`"),
    ('{"name": power}', "`objective` is not valid JSON"),
    ("negp", r"Unknown objective 'negp'. Did you mean 'neg_p'\? Built in: nll, neg_p, power, log_one_minus_p"),
    ("power", "Objective 'power' takes alpha: 'alpha' is missing. Write `objective: {name: power, alpha: ...}`"),
    (
        {"name": "power", "alpa": 3},
        r"takes alpha: 'alpa' is not one of them and 'alpha' is missing. Did you mean 'alpha'\?$",
    ),
    ({"name": "nll", "alpha": 3}, "takes no parameters of its own: 'alpha' is not one of them. Write `objective: nll`"),
    ({"name": "power", "alpha": "ten"}, "`alpha` of objective 'power' must be a finite number, got 'ten'"),
    ({"name": "power", "alpha": float("nan")}, "must be a finite number, got nan"),
    ({"name": "power", "alpha": True}, "must be a finite number, got True"),
    ({"name": "log_one_minus_p", "epsilon": 0}, "`epsilon` of objective 'log_one_minus_p' must be positive, got 0"),
    ("no_such_module:f", "Cannot import objective 'no_such_module:f': ModuleNotFoundError: No module named 'no_such_module'"),
    (f"{HERE}:gate", f"Module '{HERE}' has no 'gate'. Did you mean 'gated'"),
    (f"{HERE}:NOT_A_FUNCTION", "is a int, not a function"),
    (f"{HERE}:wrong_first", "first parameter of objective .* must be `logp`, got 'p'"),
    (f"{HERE}:misspelt_statistic", "'entrop' is missing. .* Statistics that a function may name: entropy, log_sum_sq_probs"),
    ({"name": f"{HERE}:gated", "entropy": 1}, "'entropy' is a statistic that the trainer supplies"),
    (f"{HERE}:by_layout", "depends on how tokens are laid out. It must give the same costs for `logp` of any shape"),
    (f"{HERE}:by_batch_mean", "makes the cost of one token depend on other tokens"),
    (f"{HERE}:above_the_mean", "makes the cost of one token depend on other tokens"),
    (f"{HERE}:above_the_median", "makes the cost of one token depend on other tokens"),
    (f"{HERE}:by_mean_entropy", "makes the cost of one token depend on other tokens"),
    (f"{HERE}:infinite_at_certainty", "or its gradient, is not finite at log p = 0. It must be from log p = -50 to 0"),
    (f"{HERE}:infinite_slope", "or its gradient, is not finite at log p = 0"),
    (f"{HERE}:no_gradient", "has no gradient with respect to `logp`"),
    (f"{HERE}:reduced", r"must return one float per token, of the shape of `logp`; .* it gave torch.float32 \(\)"),
    (f"{HERE}:raises", "failed when tried on a few tokens: RuntimeError: out of ideas"),
    (f"{HERE}:infinite", "or its gradient, is not finite at log p = -50"),
    ("builtins:max", "is not a function of `logp`"),
]


@pytest.mark.parametrize(
    ("spec", "message"), BAD_OBJECTIVES, ids=[re.sub(" at 0x\\w+", "", str(spec)) for spec, _ in BAD_OBJECTIVES]
)
def test_wrong_objective_says_what_to_write(spec, message):
    with pytest.raises(RecipeError, match=message) as caught:
        Objective.parse(spec)
    assert str(caught.value).startswith(("Unknown", "Objective", "`", "Can", "Module", "The first"))


@pytest.mark.parametrize(
    ("text", "error"), [("def f(logp:", "SyntaxError"), ("import no_such", "ModuleNotFoundError"), ("x = y", "NameError")]
)
def test_a_broken_module_is_named(text, error, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=f"Cannot import objective 'broken_module:f': {error}"):
        Objective.parse("broken_module:f")


def test_threshold_keeps_nan_so_that_it_shows():
    logp = torch.tensor([math.nan, -1.0])
    assert Threshold().keep(logp).all()
    assert Threshold(above=0.9).keep(logp).tolist() == [True, False]


def test_threshold_is_inclusive_and_combines():
    logp = torch.linspace(0.0113, 0.9983, 100, dtype=torch.float64).log()  # on no threshold
    p = logp.exp()
    assert Threshold.parse(None).keep(logp).all()
    assert Threshold.parse("none") == Threshold.parse(None) == Threshold()
    assert torch.equal(Threshold.parse({"above": 0.3, "below": 0.6}).keep(logp), (p >= 0.3) & (p <= 0.6))
    exact = torch.tensor([0.25, 0.5]).log()  # exp(log p) gives both back exactly
    assert Threshold(above=0.25, below=0.25).keep(exact).tolist() == [True, False]
    assert Threshold(above=1).keep(torch.tensor([0.0, -1e-3])).tolist() == [True, False]


BAD_THRESHOLDS = [
    (1.5, "`threshold` `above` must be a probability between 0 and 1, got 1.5"),
    (-0.1, "must be a probability between 0 and 1, got -0.1"),
    ("20%", "`threshold` must be a probability or a mapping, got '20%'"),
    (True, "must be a probability or a mapping, got True"),
    ({}, "must be a probability or a mapping"),
    ('{"above": }', "`threshold` is not valid JSON"),
    ({"abov": 0.1}, "Unknown key 'abov' in `threshold`. Did you mean 'above'"),
    ({"above": 0.1, "below": float("nan")}, "`below` must be a probability"),
    ({"above": 0.6, "below": 0.3}, "keeps no token: above = 0.6 exceeds below = 0.3"),
    ({"above": 0.2, "normalize": "keep"}, "`normalize` must be `tokens` or `kept`, got 'keep'"),
]


@pytest.mark.parametrize(("spec", "message"), BAD_THRESHOLDS, ids=[str(spec) for spec, _ in BAD_THRESHOLDS])
def test_wrong_threshold_says_what_to_write(spec, message):
    with pytest.raises(RecipeError, match=message):
        Threshold.parse(spec)


@pytest.mark.parametrize("spec", [*SPECS, f"{__name__}:gated"], ids=str)
def test_dropped_tokens_are_exactly_zero_even_where_f_is_infinite(spec):
    objective = Objective.parse(spec)
    logp = torch.tensor([-1.0, -math.inf, math.nan, -2.0], requires_grad=True)
    entropy = torch.tensor([1.0, math.nan, math.inf, 1.0])
    kept = torch.tensor([True, False, False, True])
    cost, weight = masked_cost(objective, kept, logp, **({"entropy": entropy} if objective.statistics else {}))
    assert cost[1:3].tolist() == weight[1:3].tolist() == [0, 0]
    (grad,) = torch.autograd.grad(cost.sum(), logp)
    assert grad[1:3].tolist() == [0, 0]
    torch.testing.assert_close(-grad, weight)
    torch.testing.assert_close(cost[kept], objective(logp[kept], entropy=entropy[kept]))
    with torch.no_grad():
        again, _ = masked_cost(objective, kept, logp, **({"entropy": entropy} if objective.statistics else {}))
    assert not again.requires_grad
    assert torch.equal(again, cost)


def test_every_objective_of_the_paper_and_anneal_fall_in_p():
    for name in ("nll", "neg_p", "power", "log_one_minus_p", "anneal"):
        given = {"progress": 0.6, "entropy": torch.full_like(GRID, 0.5)}
        cost = Objective.parse({"name": name, **({"alpha": 2} if name == "power" else {})})(GRID, **given)
        assert (cost.diff() <= 0).all(), name


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("neg_p", "neg_p"),
        ({"name": "power", "alpha": 10}, "power 10"),
        (
            {"name": "power", "alpha": {"from": 0, "to": 2, "over": [0.3, 1]}, "floor": 0.1},
            "power 0 to 2 over 0.3 to 1, floor 0.1",
        ),
    ],
)
def test_an_objective_shows_as_its_label(spec, words):
    assert repr(Objective.parse(spec)) == str(Objective.parse(spec)) == words


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (None, "no threshold"),
        (0.2, "p >= 0.2"),
        ({"above": 0.2, "below": 0.9, "normalize": "kept"}, "p >= 0.2, p <= 0.9, normalize kept"),
        ({"normalize": "kept"}, "no threshold, normalize kept"),
        ({"above_percentile": 10}, "p >= percentile 10"),
        (Threshold(0.01, above_percentile=10), "p >= percentile 10, p >= 0.01"),
    ],
)
def test_a_threshold_shows_as_its_label(spec, words):
    assert repr(Threshold.parse(spec)) == words


@pytest.fixture
def pyplot():
    import matplotlib.pyplot as pyplot

    pyplot.switch_backend("agg")
    yield pyplot
    pyplot.close("all")


def curves(axes):
    """Label -> (p, weight) of each line."""
    return {line.get_label(): tuple(map(np.asarray, line.get_data())) for line in axes.lines}


def test_an_objective_plots_its_weight(pyplot):
    axes = Objective.parse("neg_p").plot()
    assert Objective.parse({"name": "power", "alpha": 10}).plot(axes) is axes
    found = curves(axes)
    assert list(found) == ["neg_p", "power 10"]
    for label, exponent in (("neg_p", 1), ("power 10", 10)):
        p, weight = found[label]
        np.testing.assert_allclose(weight, p**exponent)
    assert axes.get_xlabel() == "probability p of the target token"
    assert axes.get_ylim()[1] < 1.1
    assert Threshold.parse({"above": 0.2, "below": 0.9}).plot(axes) is axes
    assert [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches] == [(0, 0.2), (0.9, 1)]
    assert Objective.parse("log_one_minus_p").plot().get_ylim()[1] < 5, "its weight of 1000 at p = 1 leaves the axes"
    assert Threshold(0.5).plot() is not axes


def test_an_objective_that_looks_at_more_plots_a_curve_for_each(pyplot):
    axes = Objective.parse("anneal").plot(entropy=[0, 2], progress=1)
    found = curves(axes)
    assert list(found) == ["anneal, entropy 0, progress 1", "anneal, entropy 2, progress 1"]
    for entropy, (p, weight) in zip((0, 2), found.values(), strict=True):
        np.testing.assert_allclose(weight, p ** (5 * math.exp(-entropy)))
    everything = {"mix": {"asft": 1, "deft": 1}, "special_tokens": "nll"}
    for spec, count in (("eaft", 3), ("anneal", 9), ("psft", 3), ({"name": "nll", **everything}, 18)):
        axes = Objective.parse(spec).plot()
        assert len(axes.lines) == len(set(curves(axes))) == count, spec
    assert "nll + 1 asft + 1 deft, special tokens nll, sum of p² 0.1, reference's p 0.1, no special token" in curves(axes)
    scheduled = Objective.parse({"name": "power", "alpha": {"from": 0, "to": 2}}).plot()
    assert [label.rpartition(", ")[2] for label in curves(scheduled)] == ["progress 0", "progress 0.5", "progress 1"]


def test_what_cannot_be_plotted(pyplot, monkeypatch):
    for act, message in (
        (lambda: Objective.parse("neg_p").plot(entropy=1), "Cannot plot neg_p: it does not depend on 'entropy'. Leave it out."),
        (lambda: Objective.parse("eaft").plot(entropi=1), "'entropi'. Did you mean 'entropy'? Give entropy."),
        (lambda: Threshold.parse({"above_percentile": 10}).plot(), "Cannot plot p >= percentile 10: the percentile is not"),
    ):
        with pytest.raises(LossError, match=re.escape(message)):
            act()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for drawn in (Objective.parse("neg_p"), Threshold(0.1)):
        with pytest.raises(DependencyError, match=re.escape("Cannot plot: matplotlib is not installed. Run `pip install")):
            drawn.plot()
