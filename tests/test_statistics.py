"""Streaming statistics against the whole data at once."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from bl_trainer._util.intervals import unequal
from bl_trainer.head.ops import TokenDivergences, TokenScores
from bl_trainer.measurement.histogram import PERCENTILE_ERROR, ProbabilityHistogram
from bl_trainer.measurement.means import BOUNDS, Means
from bl_trainer.measurement.reader import Reader
from bl_trainer.measurement.results import MAX_GROUPS, OTHER, Calibration, Comparison, Measurement, merge_groups
from bl_trainer.tokens.annotation import TokenBatch

DISTRIBUTIONS = {
    "uniform": lambda rng: np.log(rng.uniform(size=5000)),
    "sure": lambda rng: np.log1p(-(10 ** rng.uniform(-16, 0, size=5000))),
    "hopeless": lambda rng: -rng.uniform(0, 200, size=5000),
    "few": lambda rng: np.log(rng.uniform(size=7)),
    "edges": lambda rng: np.array([-np.inf, -1e-40, 0.0, math.log(0.5), math.log(0.5), -1e-9]),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_percentiles_within_the_stated_bound(name):
    logp = DISTRIBUTIONS[name](np.random.default_rng(0))
    histogram, other = ProbabilityHistogram(), ProbabilityHistogram()
    histogram.add(torch.tensor(logp[::2]))
    other.add(torch.tensor(logp[1::2]))
    histogram.counts += other.counts
    assert histogram.counts.sum() == len(logp)
    ranks = [0, 0.01, 1, 2.5, 10, 25, 50, 75, 90, 99, 99.99, 100]
    exact = np.percentile(logp, ranks, method="inverted_cdf")
    for found, wanted in zip(histogram.percentiles(ranks), exact, strict=True):
        p, rest = math.exp(wanted), -math.expm1(wanted)
        # the bin is chosen by the float32 of min(p, 1 - p): and p itself is a float64
        assert abs(found - p) <= PERCENTILE_ERROR * min(p, rest) * (1 + 2**-12) + 2**-52
    again = ProbabilityHistogram.from_state(histogram.state())
    assert torch.equal(again.counts, histogram.counts)


def test_histogram_keeps_functions_of_p():
    logp = torch.tensor(DISTRIBUTIONS["uniform"](np.random.default_rng(1)))
    histogram = ProbabilityHistogram()
    histogram.add(logp)
    log_p, log_rest = histogram.values()
    torch.testing.assert_close(log_p.exp() + log_rest.exp(), torch.ones_like(log_p))
    counts = histogram.counts[0].double()
    p = logp.exp()
    for found, exact in (
        ((counts * log_p.exp()).sum(), p.sum()),
        ((counts * log_rest.exp()).sum(), (1 - p).sum()),
        ((counts * (10 * log_p + log_rest).exp()).sum(), (p**10 * (1 - p)).sum()),
    ):
        assert found.item() == pytest.approx(exact.item(), rel=1e-4)
    exact = np.histogram(p.numpy(), bins=10, range=(0, 1))[0]
    assert abs(histogram.buckets(10).numpy() - exact).max() <= 2  # a bin may lie across two buckets
    assert histogram.buckets(10).sum() == exact.sum()


def test_nan_is_not_counted():
    with pytest.raises(ValueError, match="NaN"):
        ProbabilityHistogram().add(torch.tensor([-1.0, math.nan]))


def quadratic_form(shares):
    """The matrix A of sum w_i^2 (y_i - sum w_j y_j)^2 = y' A y."""
    residual = np.eye(len(shares)) - np.outer(np.ones(len(shares)), shares)
    return residual.T @ np.diag(shares**2) @ residual


@pytest.mark.parametrize("sigma", [0, 0.3, 1.5])
def test_unequal_weights_are_those_of_the_quadratic_form(sigma):
    weights = np.random.default_rng(0).lognormal(0, sigma, size=25)
    shares = weights / weights.sum()
    form, powers = quadratic_form(shares), [(shares**k).sum() for k in range(2, 6)]
    expected = powers[0] / np.trace(form), np.trace(form) ** 2 / np.trace(form @ form)
    assert unequal(*powers) == pytest.approx(expected, rel=1e-9)
    assert sigma or unequal(*powers) == pytest.approx((25 / 24, 24), rel=1e-9)


def test_means_and_intervals():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 30, size=400)
    level = rng.uniform(size=400)
    values = [rng.uniform(size=n) * 0.1 + x for n, x in zip(tokens, level, strict=True)]
    sums = np.array([v.sum() for v in values])
    means = Means(["prob"])
    for part in (slice(0, 150), slice(150, None)):
        means.add(torch.tensor(tokens[part]), torch.tensor(sums[part])[None])
    everything = np.concatenate(values)
    assert means.num_tokens == tokens.sum()
    assert means.num_examples == (tokens > 0).sum()
    assert means.mean("prob") == pytest.approx(everything.mean())
    used = tokens > 0
    ratio = everything.mean()
    shares = tokens[used] / tokens.sum()
    form = quadratic_form(shares)
    error = math.sqrt(((sums[used] / tokens[used] - ratio) ** 2 * shares**2).sum() * (shares**2).sum() / np.trace(form))
    reach = stats.t.ppf(0.975, np.trace(form) ** 2 / np.trace(form @ form)) * error
    assert means.interval("prob") == pytest.approx((ratio - reach, ratio + reach), rel=1e-9)
    naive = everything.std() / math.sqrt(len(everything))
    assert error > 2.5 * naive  # tokens of one example are alike


@pytest.mark.parametrize(("examples", "t"), [(10, 2.2622), (30, 2.0452), (100, 1.9842)])
def test_interval_is_students(examples, t):
    means = Means(["prob"])
    values = torch.rand(examples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means.add(torch.ones(examples, dtype=torch.int64), values[None])
    low, high = means.interval("prob")
    assert (high - low) / 2 == pytest.approx(t * values.std().item() / math.sqrt(examples), rel=2e-3)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        tokens = rng.integers(1, 20, size=40)
        sums = np.array([(rng.beta(4, 1) + rng.normal(0, 0.05, size=n)).sum() for n in tokens])
        means = Means(["prob"])
        means.add(torch.tensor(tokens), torch.tensor(sums)[None])
        low, high = means.interval("prob")
        hits += low <= 0.8 <= high
    assert 0.91 <= hits / 400 <= 0.98


@pytest.mark.parametrize("examples", [10, 30, 200])
@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_interval_covers_the_truth_where_lengths_are_unequal(sigma, examples):
    """It covered 0.76 to 0.93 as if all examples were as long."""
    rng, runs = np.random.default_rng(0), 500
    tokens = torch.tensor(np.ceil(rng.lognormal(3, sigma, size=(runs, examples))))
    levels = torch.tensor(rng.beta(4, 1, size=(runs, examples)))
    hits = 0
    for each, level in zip(tokens, levels, strict=True):
        means = Means(["prob"])
        means.add(each, (each * level)[None])
        low, high = means.interval("prob")
        hits += low <= 0.8 <= high
    assert 0.925 <= hits / runs <= 0.995


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("prob", (0, 1)),
        ("nll", (0, math.inf)),
        ("js", (0, math.log(2))),
        ("learnable", (-1, 1)),
        ("gain", (-math.inf, math.inf)),
    ],
)
def test_interval_stays_within_the_bounds_of_its_metric(name, bounds):
    low, high = bounds
    outer = [low if math.isfinite(low) else -2.0, high if math.isfinite(high) else 2.0]
    for rare, usual in (outer, outer[::-1]):
        means = Means([name])
        values = torch.tensor([rare, *[usual] * 9], dtype=torch.float64)
        means.add(torch.tensor([1, *[2] * 9]), (values * torch.tensor([1, *[2] * 9]))[None])
        found = means.interval(name)
        assert low <= found[0] < means.mean(name) < found[1] <= high
        assert usual in found or usual not in bounds  # where the mean is near a bound, the interval ends there


@pytest.mark.parametrize("examples", [10, 12, 100])
@pytest.mark.parametrize(("name", "value"), [("top1", 1.0), ("top1", 0.0), ("prob", 0.3), ("learnable", 0.0), ("js", 0.0)])
def test_examples_that_are_all_alike_leave_room_for_others(name, value, examples):
    """With the bound, all examples are alike with probability 0.05."""
    means = Means([name])
    means.add(torch.full((examples,), 7), torch.full((1, examples), 7 * value, dtype=torch.float64))
    low, high = means.interval(name)
    least, most = BOUNDS[name]
    shares = [(value - low) / (value - least)] if value > least else []
    shares += [(high - value) / (most - value)] if value < most else []
    assert [(1 - share) ** examples for share in shares] == pytest.approx([0.05] * len(shares))
    assert least <= low < high <= most


def test_examples_that_are_all_alike_in_a_value_without_bounds_have_no_interval():
    means = Means(["kl", "nll"])
    means.add(torch.ones(20, dtype=torch.int64), torch.tensor([[0.0], [0.1]], dtype=torch.float64).expand(2, 20))
    assert (means.interval("kl"), means.interval("nll")) == (None, None)


def test_no_interval_below_ten_examples():
    means = Means(["prob"])
    means.add(torch.ones(9, dtype=torch.int64), torch.rand(1, 9))
    assert means.interval("prob") is None


def test_calibration_error():
    torch.manual_seed(0)
    confidence, hits = torch.rand(3000, dtype=torch.float64), torch.rand(3000) < 0.5
    calibration = Calibration()
    for part in (slice(0, 1000), slice(1000, None)):
        calibration.add(confidence[part], hits[part])
    index = np.minimum((confidence.numpy() * 20).astype(int), 19)
    gaps = [
        abs(confidence.numpy()[index == b].mean() - hits.numpy()[index == b].mean()) * (index == b).mean() for b in range(20)
    ]
    assert calibration.error() == pytest.approx(sum(gaps))
    assert sum(item["tokens"] for item in calibration.curve()) == 3000


def fake(examples, rng, groups=None):
    """A batch of `examples` examples with random scores."""
    lengths = [int(rng.integers(1, 9)) for _ in range(examples)]
    owner = torch.tensor([e for e, n in enumerate(lengths) for _ in range(n)])
    place = torch.tensor([i + 3 for n in lengths for i in range(n)])
    size = len(owner)
    logp = torch.tensor(-rng.exponential(2, size=size), dtype=torch.float32)
    meta = [
        {
            "row": int(rng.integers(10**9)),
            "group": None if groups is None else groups[e],
            "input_ids": list(range(n + 3)),
            "is_part": False,
        }
        for e, n in enumerate(lengths)
    ]
    batch = TokenBatch(
        token=torch.tensor(rng.integers(0, 9, size=size)), example=owner, place=place, position=place - 3,
        length=torch.tensor(lengths)[owner], is_template=torch.zeros(size, dtype=torch.bool),
        is_unmarked=torch.zeros(size, dtype=torch.bool), examples=meta,
    )  # fmt: skip
    scores = TokenScores(
        logp, torch.rand(size), torch.zeros(size, dtype=torch.long), torch.full((size,), -0.01), (logp < -1).long()
    )
    return batch, scores


def test_reader_is_bounded_and_keeps_the_extremes():
    rng, reader_of = np.random.default_rng(0), Measurement()
    worst = []
    for _ in range(60):
        batch, scores = fake(30, rng)
        reader_of.add(batch, scores)
        for e, example in enumerate(batch.examples):
            worst.append((-scores.logp[batch.example == e].double().mean().item(), example["row"]))
    lists = reader_of.reader.chosen()
    assert {name: len(records) for name, records in lists.items()} == dict.fromkeys(lists, Reader.KEPT)
    assert [record["row"] for record in lists["surprising"]] == [row for _, row in sorted(worst, reverse=True)[: Reader.KEPT]]
    assert len(reader_of.reader.heaps["sample"]) == Reader.SAMPLE
    gaps = [record["gap"] for record in lists["conflicting"]]
    assert gaps == sorted(gaps, reverse=True)


def test_reader_does_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    batches = [fake(30, rng) for _ in range(20)]
    chosen = []
    for order in (batches, batches[::-1]):
        measurement = Measurement()
        for batch, scores in order:
            measurement.add(batch, scores)
        chosen.append({name: [r["row"] for r in records] for name, records in measurement.reader.chosen().items()})
    assert chosen[0] == chosen[1]


def test_long_example_is_cut_around_what_matters():
    n = 2000
    logp = torch.full((n,), -0.1)
    logp[1500] = -30.0
    batch = TokenBatch(
        token=torch.zeros(n, dtype=torch.long), example=torch.zeros(n, dtype=torch.long), place=torch.arange(n) + 50,
        position=torch.arange(n), length=torch.full((n,), n), is_template=torch.zeros(n, dtype=torch.bool),
        is_unmarked=torch.zeros(n, dtype=torch.bool),
        examples=[{"row": 0, "group": None, "input_ids": list(range(n + 50)), "is_part": False}],
    )  # fmt: skip
    measurement = Measurement()
    measurement.add(
        batch, TokenScores(logp, torch.zeros(n), torch.zeros(n, dtype=torch.long), torch.zeros(n), torch.zeros(n).long())
    )
    (record,) = measurement.reader.chosen()["conflicting"]
    assert len(record["input_ids"]) == Reader.WINDOW
    assert 1550 in record["input_ids"]
    assert record["cut"][0] + Reader.WINDOW + record["cut"][1] == n + 50
    assert record["input_ids"][record["targets"][0]] == record["cut"][0] + record["targets"][0]


def test_groups_are_bounded():
    rng, measurement = np.random.default_rng(0), Measurement()
    for i in range(30):
        batch, scores = fake(10, rng, groups=[f"group {10 * i + e}" for e in range(10)])
        measurement.add(batch, scores)
    assert len(measurement.groups) == MAX_GROUPS + 1
    assert measurement.groups[OTHER].num_examples == 200
    total = sum(means.gram[0, 1] for means in measurement.groups.values())
    assert total == measurement.total.gram[0, 1]


def test_groups_of_several_processes_are_whole_or_other():
    def means(tokens):
        made = Means()
        made.add(torch.tensor([tokens]), torch.zeros(6, 1))
        return made

    full = {f"g{i:03}": means(1) for i in range(MAX_GROUPS)} | {OTHER: means(7)}
    merged = merge_groups([full, {"g000": means(2), "new": means(5)}])
    assert merged["g000"].num_tokens == 3
    assert "new" not in merged  # the first process may have had it among the others
    assert merged[OTHER].num_tokens == 12
    assert len(merged) == MAX_GROUPS + 1


def test_parts_of_an_example_count_once(monkeypatch):
    rng = np.random.default_rng(0)
    whole, cut = Measurement(), Measurement()
    monkeypatch.setattr("bl_trainer.measurement.means.MAX_PARTS", 40)
    for _ in range(20):
        batch, scores = fake(10, rng, groups=list("ababababab"))
        whole.add(batch, scores)
        for e in batch.examples:
            e["is_part"] = True
        half = torch.arange(len(batch.example)) % 2 == 0
        for mask in (half, ~half):
            names = ("token", "example", "place", "position", "length", "is_template", "is_unmarked")
            part = TokenBatch(**{name: getattr(batch, name)[mask] for name in names}, examples=batch.examples)
            names = ("logp", "entropy", "top1", "top1_logp", "rank")
            cut.add(part, TokenScores(*(getattr(scores, name)[mask] for name in names)))
    assert len(cut.sums.waiting) <= 40
    cut.sums.finish()
    torch.testing.assert_close(cut.total.gram, whole.total.gram)
    torch.testing.assert_close(cut.spread, whole.spread)
    torch.testing.assert_close(cut.groups["a"].gram, whole.groups["a"].gram)


def test_of_equally_probable_tokens_the_first_is_the_hit():
    batch, scores = fake(4, np.random.default_rng(0))
    scores.rank[:] = 0  # bfloat16 logits are often tied
    scores.top1[:] = batch.token
    scores.top1[::2] += 1
    measurement, comparison = Measurement(), Comparison()
    measurement.add(batch, scores)
    nothing = torch.zeros(len(batch.token))
    comparison.add(batch, scores, scores, TokenDivergences(nothing, nothing, nothing))
    share = (len(batch.token) // 2) / len(batch.token)
    assert measurement.total.mean("top1") == pytest.approx(share)
    assert comparison.total.mean("base_top1") == comparison.total.mean("top1") == pytest.approx(share)


def test_comparison_counts_the_parts_of_an_example_once():
    comparison, rng = Comparison(), np.random.default_rng(0)
    batch, scores = fake(6, rng)
    for example in batch.examples:
        example["is_part"] = True
    nothing = torch.zeros(len(batch.token))
    for _ in range(2):
        comparison.add(batch, scores, scores, TokenDivergences(nothing, nothing, nothing))
    comparison.reduce(SimpleNamespace(num_processes=1))
    assert comparison.total.num_examples == 6
    assert comparison.total.num_tokens == 2 * len(batch.token)


def test_nan_is_reported_with_its_row(tokenizer):
    batch, scores = fake(3, np.random.default_rng(0))
    scores.logp[batch.example == 1] = math.nan
    with pytest.raises(ValueError, match=f"NaN in row {batch.examples[1]['row']} of the data set"):
        Measurement().add(batch, scores)
