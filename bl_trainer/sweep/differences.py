"""How much better one group of runs is than another, and what that is worth."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .._util.intervals import alike_interval, is_alike, mean_interval, sign_test, unequal
from .outcome import Values

LEVEL = 0.05
MIN_SEEDS = 3  # below which the values say more than an interval


@dataclass
class Difference:
    """How much better one group is than another: by `mean`, with a 95 % interval, and the p-value of no difference.

    Seeds and held-out examples are both samples. The variance is the sum of that of the mean over seeds and that of the mean
    over examples, each taken from paired differences. With Satterthwaite's degrees of freedom this is Clark's min F' (1973).
    `over`: what was sampled, of "seeds" and "examples". `by_seed`: the difference at each seed that both groups have.
    """

    mean: float
    interval: tuple[float, float] | None
    p_value: float | None
    over: tuple[str, ...]
    by_seed: tuple[float, ...] = ()

    @property
    def is_significant(self) -> bool:
        """Whether the better one is better by more than chance, that of training included."""
        return "seeds" in self.over and self.mean > 0 and self.p_value is not None and self.p_value < LEVEL


def difference(
    mean: float, samples: dict[str, np.ndarray], most: float = math.inf, weights: np.ndarray | None = None
) -> Difference:
    """Return `mean` with what samples of paired differences, each about it, say of its uncertainty.

    `most`: the largest difference there can be. `weights`: those of the examples, equal if None.
    A sample whose differences are all alike doesn't show how they vary: it gives no better p-value than the sign test's.
    """
    variances = {name: float(each.var(ddof=1)) / len(each) for name, each in samples.items()}
    frees: dict[str, float] = {name: len(each) - 1 for name, each in samples.items()}
    if weights is not None and "examples" in samples:
        shares, m = weights / weights.sum(), len(weights)
        factor, frees["examples"] = unequal(*(float((shares**k).sum()) for k in range(2, 6)))
        variances["examples"] *= factor * (m - 1) / m
    over = tuple(samples)
    alike = [len(each) for name, each in samples.items() if is_alike(mean, math.sqrt(variances[name]))]
    if not samples:
        return Difference(mean, None, None, over)
    if len(alike) == len(samples):
        return Difference(mean, alike_interval(mean, min(alike), (-most, most)), sign_test(mean, min(alike)), over)
    total = sum(variances.values())
    free = total**2 / sum(variances[name] ** 2 / frees[name] for name in samples)
    p_value = float(2 * stats.t.sf(abs(mean) / math.sqrt(total), free))
    intervals = [mean_interval(mean, math.sqrt(total), free, min(map(len, samples.values())), (-most, most))]
    intervals += [alike_interval(mean, size, (-most, most)) for size in alike]
    return Difference(mean, _widest(intervals), max([p_value, *(sign_test(mean, size) for size in alike)]), over)


def _widest(intervals: list[tuple[float, float] | None]) -> tuple[float, float] | None:
    """Return what covers all intervals; None if one isn't known."""
    known = [each for each in intervals if each is not None]
    return None if len(known) < len(intervals) else (min(low for low, _ in known), max(high for _, high in known))


def by_item(pairs: list[tuple[Values | None, Values | None]], sign: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return for each held-out item its mean difference over seeds, so that their mean is the difference of rulers; its weight.

    A ruler is sum s_i / sum n_i over m items of weight n_i. With equal n_i in both arms the difference D is sum d_i / sum n_i.
    What is returned is m (d_i - D n_i) / sum n_i + D, whose variance is that of D linearised. None where weights differ.
    """
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(both) < len(pairs):
        return None
    items = sorted(both[0][0])
    weights = np.array([both[0][0][item][0] for item in items])
    if any(
        each.keys() != both[0][0].keys() or any(each[i][0] != n for i, n in zip(items, weights, strict=True))
        for p in both
        for each in p
    ):
        return None
    sums = np.mean([[a[item][1] - b[item][1] for item in items] for a, b in both], axis=0) * sign
    mean = sums.sum() / weights.sum()
    return (sums - mean * weights) * len(items) / weights.sum() + mean, weights


def holm(differences: list[Difference]) -> None:
    """Make the p-values those of several comparisons with one winner (Holm, 1979)."""
    known = sorted((each for each in differences if each.p_value is not None), key=lambda each: each.p_value or 0.0)
    least = 0.0
    for i, each in enumerate(known):
        least = max(least, min(1.0, (len(known) - i) * (each.p_value or 0.0)))
        each.p_value = least


def interval_over_seeds(values: list[float], bounds: tuple[float, float]) -> tuple[float, float] | None:
    if len(values) < MIN_SEEDS:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean_interval(mean, error, len(values) - 1, len(values), bounds) if math.isfinite(mean) else None
