"""Where objectives come to rest, against closed forms and the gradients that training has."""

import json
import math
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from scipy.optimize import brentq

from bl_trainer.errors import RecipeError
from bl_trainer.objectives import OBJECTIVES, Objective, effective_temperature
from bl_trainer.objectives.temperature import CHOICES, NUDGE, Rest

ROOT = Path(__file__).parents[1]
NEEDED = {"power": {"alpha": 0.5}, "talr": {"tau": 1.5}, "profit": {"tau": 0.1}, "deft_cayley": {"mean_p": 0.5}}
SPECS = [
    *({"name": name, **NEEDED.get(name, {})} for name in OBJECTIVES),
    {"name": "power", "alpha": -0.5},
    {"name": "anneal", "start": 0.5, "end": 0.5},
    {"name": "focal", "stop_gradient": False},
    {"name": "neg_p", "mix": {"nll": 0.1}},
    {"name": "neg_p", "floor": 0.1},
    "test_temperature:pulled",
]


def pulled(logp, entropy):
    """NLL and a reward for entropy, through which it trains."""
    return -logp - 0.1 * entropy


def target(rest: Rest) -> torch.Tensor:
    share = rest.truth + (NUDGE if rest.truth == 0.5 else 0)
    return torch.tensor([share, *[(1 - share) / rest.others] * rest.others], dtype=torch.float64)


def gradient(objective: Objective, truth: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return that of the expected cost in the logits of one context, by autograd through all but what is no gradient's."""
    logp = logits.log_softmax(-1)
    p = logp.exp()
    statistics = {
        "entropy": -(p * logp).sum().expand_as(p),
        "log_sum_sq_probs": (2 * logp).logsumexp(0).detach().expand_as(p),
        "is_top1": p >= p.max(),
        "ref_logp": truth.log(),
        "label": torch.zeros_like(p, dtype=torch.long),
        "progress": 1.0,
    }
    return torch.autograd.grad(
        (truth * objective(logp, **{name: statistics[name] for name in objective.statistics})).sum(), logits
    )[0]


@pytest.mark.parametrize("alpha", [-1, -0.2, 0, 0.3, 0.5, 0.9, 0.97, 1, 1.5, 10])
def test_power_is_nll_at_temperature_one_minus_alpha(alpha: float) -> None:
    found = effective_temperature({"name": "power", "alpha": alpha})
    assert found.fixed == pytest.approx(max(0, 1 - alpha), abs=1e-9)
    assert [rest.temperature for rest in found.rests] == pytest.approx([max(0, 1 - alpha)] * 3, abs=1e-9)


@pytest.mark.parametrize("c", [0.25, 0.5, 0.9])
def test_an_exponent_of_the_entropy_rests_where_it_is_its_own_exponent(c: float) -> None:
    for rest in effective_temperature({"name": "anneal", "start": c, "end": c}).rests:
        truth = target(rest)

        def excess(odds: float, n: int = rest.others, truth: torch.Tensor = truth) -> float:
            logp = torch.tensor([odds, *[0.0] * n], dtype=torch.float64).log_softmax(0)
            a = c * math.exp((logp.exp() * logp).sum())
            return (1 - a) * odds - math.log(truth[0] / truth[1])

        start = math.log(truth[0] / truth[1])
        odds = brentq(excess, start, 20 * start, xtol=1e-13)
        assert rest.temperature == pytest.approx(start / odds, rel=1e-7)
    assert effective_temperature({"name": "anneal", "start": c, "end": c}).fixed is None


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_gradient_that_trains_is_zero_there_and_leads_back_to_it(spec) -> None:
    objective, found = Objective.parse(spec), effective_temperature(spec)
    for rest in found.rests:
        truth = target(rest)
        odds = math.log(truth[0] / truth[1])
        if rest.temperature == 0 or rest.temperature == math.inf:
            along = torch.linspace(odds, 12, 50)  # nothing stops it on the way
            slopes = [push(objective, truth, float(each)) for each in along]
            assert min(slopes) > 0
            continue
        assert push(objective, truth, odds / rest.temperature - 1e-5) >= -1e-12
        assert push(objective, truth, odds / rest.temperature + 1e-5) <= 1e-12
        logits = torch.zeros(len(truth), dtype=torch.float64)
        logits[0] = odds / rest.temperature
        for direction in torch.randn(3, len(truth), dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
            step = 1e-5 * (direction - direction.mean())
            slope = gradient(objective, truth, (logits + step).requires_grad_())
            assert (slope * step).sum() >= -1e-13, "others part from each other"


def push(objective: Objective, truth: torch.Tensor, odds: float) -> float:
    """Return the way of gradient descent in the first token's log-odds."""
    logits = torch.zeros(len(truth), dtype=torch.float64)
    logits[0] = odds
    slope = gradient(objective, truth, logits.requires_grad_())
    return float(slope[1] - slope[0])


def test_a_threshold_drops_what_lies_below_it() -> None:
    kept = effective_temperature("nll", threshold=0.2)
    assert [rest.temperature for rest in kept.rests] == [1, pytest.approx(1), 0]
    assert kept.fixed is None
    assert str(kept) == "depends on T: 1.00, 1.00, 0.00"


def test_two_alike_are_kept_or_one_is_lost() -> None:
    even = {
        name: effective_temperature({"name": "anneal", "start": c, "end": c}).rests[1]
        for name, c in {"half": 0.5, "five": 5}.items()
    }
    assert even["half"].variation < 1e-3
    assert even["five"].variation == 0.5


def test_a_schedule_is_read_at_the_progress_given() -> None:
    spec = {"name": "power", "alpha": {"from": 0, "to": 0.8}}
    assert [effective_temperature(spec, progress=t).fixed for t in (0, 0.5, 1)] == pytest.approx([1, 0.6, 0.2])


def test_it_reads_in_a_few_words() -> None:
    assert str(effective_temperature({"name": "power", "alpha": 0.5})) == "0.5"
    assert str(effective_temperature("neg_p")) == "0: the most probable token alone"


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(RecipeError, match="Unknown objective 'nlll'"):
        effective_temperature("nlll")


def test_the_distributions_are_those_that_the_docs_name() -> None:
    assert CHOICES == ((0.7, 1), (0.5, 1), (0.9, 25))


def test_a_distribution_of_ones_own() -> None:
    (rest,) = effective_temperature({"name": "power", "alpha": 0.5}, choices=[(0.6, 4)]).rests
    assert rest.temperature == pytest.approx(0.5)
    assert rest.p == pytest.approx(0.36 / (0.36 + 4 * 0.01))


def test_the_page_is_the_tools(tmp_path) -> None:
    script = runpy.run_path(str(ROOT / "tools" / "temperature_page.py"))
    script["main"](str(tmp_path))
    for name in ("temperature.md", "temperature.svg"):
        assert (tmp_path / name).read_bytes() == (ROOT / "docs" / "results" / name).read_bytes(), f"{name}: run `make figures`"
    page = (tmp_path / "temperature.md").read_text(encoding="utf-8")
    assert all(f"| `{name}" in page for name in OBJECTIVES)


def test_the_snippet_of_the_page_runs(capsys, monkeypatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/results/temperature.md").read_text(encoding="utf-8"), re.S)
    module = types.ModuleType("my_losses")
    module.my_objective = pulled  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_losses", module)
    exec(snippet, {})
    assert capsys.readouterr().out.splitlines()[0] == "0: the most probable token alone"


def test_what_was_measured_is_what_is_predicted() -> None:
    script = runpy.run_path(str(ROOT / "studies" / "temperature_study.py"))
    assert script["rows"](2).tokens.shape == (1, 2 * 295, 2)
    measured = runpy.run_path(str(ROOT / "tools" / "temperature_page.py"))["MEASURED"].read_text(encoding="utf-8")
    found = json.loads(measured)
    assert list(found) == list(script["OBJECTIVES"])
    for name, spec in script["OBJECTIVES"].items():
        predicted = [rest.p for rest in effective_temperature(spec, choices=script["CHOICES"]).rests]
        assert found[name]["predicted"] == pytest.approx(predicted, abs=1e-3)
        assert found[name]["measured"] == pytest.approx(predicted, abs=5e-3)
