"""Thresholds compare log p: exact near p = 1, inclusive in every dtype, and the same where they are measured and trained."""

import math

import numpy as np
import pytest
import torch

from bl_trainer.diagnosis.continuum import objective_name
from bl_trainer.diagnosis.summary import gradient_mass
from bl_trainer.measurement.histogram import PERCENTILE_ERROR, ProbabilityHistogram
from bl_trainer.objectives.objective import Objective
from bl_trainer.objectives.pricing import price
from bl_trainer.objectives.threshold import Threshold, spell_probability

BOTH = [torch.float32, torch.float64]
TIED = [1 / 97, 1.0, 0.5, 0.25, 0.999, 1 - 1e-10, 1 - 2**-30, 2**-30, 1e-30, 1e-80]  # below 2^-126 p counts as 0


def histogram_of(logp):
    histogram = ProbabilityHistogram(5)
    for row in range(5):
        histogram.add(logp, row)
    return histogram


def kept_share(threshold, logp):
    return price(Objective.parse("neg_p"), threshold, {"logp": logp}).kept.double().mean().item()


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("least", [1e-12, 1e-7, 1e-3])
@pytest.mark.parametrize("side", ["near 1", "near 0"])
def test_a_percentile_keeps_its_share_however_near_the_ends(side, least, dtype):
    small = 10 ** np.random.default_rng(0).uniform(math.log10(least), 0, size=50_000)
    logp = torch.tensor(np.log1p(-small) if side == "near 1" else np.log(small), dtype=dtype)
    histogram = histogram_of(logp)
    for rank in (1, 10, 50, 90, 99):
        threshold = Threshold(above=histogram.cut(rank))
        assert kept_share(threshold, logp) == pytest.approx(1 - rank / 100, abs=1e-3)
        assert gradient_mass(histogram, Objective.parse("nll"), threshold).kept == pytest.approx(1 - rank / 100, abs=1e-3)


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("above", [1 - 1e-10, 1 - 1e-4, 0.9, 0.3, 1e-6, 1e-30])
def test_what_trains_is_off_by_no_more_than_the_bound_that_is_printed(above, dtype):
    """Of tokens about the percentile, those that it wrongly keeps are within the bound; wrongly dropped are none."""
    steps = torch.linspace(-3, 3, 6001, dtype=torch.float64) * PERCENTILE_ERROR
    near = min(above, 1 - above)
    logp = torch.log1p(-(near * (1 + steps))) if above > 0.5 else math.log(near) + torch.log1p(steps)
    logp = logp.to(dtype)
    exact = logp.sort().values[3000]
    kept = logp[Threshold(above=histogram_of(logp).cut(50)).keep(logp)].double()
    lowest, exact = kept.min(), exact.double()
    gap = exact.exp() - lowest.exp() if above <= 0.5 else lowest.expm1().neg() - exact.expm1().neg()
    assert (logp.double() >= exact).sum() <= len(kept)
    assert 0 <= gap <= 0.0005 * torch.minimum(exact.exp(), -exact.expm1())


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("p", TIED, ids=str)
def test_a_percentile_of_ties_keeps_them(p, dtype):
    logp = torch.full((100,), math.log(p), dtype=dtype)
    histogram = histogram_of(logp)
    for rank in (1, 10, 50, 99):
        assert kept_share(Threshold(above=histogram.cut(rank)), logp) == 1
        assert gradient_mass(histogram, Objective.parse("nll"), Threshold(above=histogram.cut(rank))).kept == 1
    assert Threshold(above=p, below=p).keep(logp).all()


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("p", TIED[:-1], ids=str)
def test_a_percentile_of_ties_drops_what_is_rarer(p, dtype):
    logp = torch.full((100,), math.log(p), dtype=dtype)
    rarer = torch.cat([logp[:90], torch.full((10,), math.log(p) - 0.1, dtype=dtype)])
    assert kept_share(Threshold(above=histogram_of(rarer).cut(20)), rarer) == 0.9


def test_a_token_on_a_bound_is_kept_in_every_dtype():
    for percent in range(1, 100):
        p = percent / 100
        for dtype in (*BOTH, torch.bfloat16):
            here = torch.tensor(math.log(p), dtype=torch.float64).to(dtype)
            assert Threshold(above=p).keep(here)
            assert Threshold(below=p).keep(here)
        ours = torch.tensor(p).log()  # of a p that float32 has rounded
        assert Threshold(above=p, below=p).keep(ours)
        beside = torch.tensor([p - 1e-6, p + 1e-6], dtype=torch.float64).log().float()
        assert Threshold(above=p).keep(beside).tolist() == [False, True]
        assert Threshold(below=p).keep(beside).tolist() == [True, False]


def test_the_ends_keep_what_they_name():
    logp = torch.tensor([-math.inf, -800.0, -1.0, -1e-30, 0.0, 1e-7])  # a head may round log p to above 0
    assert Threshold(below=1, above=0).keep(logp).all()
    assert Threshold(above=1).keep(logp).tolist() == [False] * 4 + [True] * 2
    assert Threshold(below=0).keep(logp).tolist() == [True] + [False] * 5
    assert Threshold(above=1e-300).keep(logp).tolist() == [False] * 2 + [True] * 4


def test_a_threshold_near_one_is_not_shown_as_one():
    assert spell_probability(0.2) == "0.2"
    assert spell_probability(1.0) == "1"
    assert spell_probability(1 - 1e-12) == "1 - 1e-12"
    assert spell_probability(0.9999995, 6) == "1 - 5e-07"
    item = {"objective": {"name": "nll"}, "threshold": Threshold(above=1 - 2e-9, below=1 - 1e-9).to_dict()}
    assert objective_name(item) == "nll, p >= 1 - 2e-09, p <= 1 - 1e-09"
    again = Threshold.parse(Threshold(above=1 - 2e-9).to_dict())
    assert again == Threshold(above=1 - 2e-9)
