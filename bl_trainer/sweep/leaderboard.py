"""The leaderboard: all arms judged by the same rulers, with what the differences between them are worth.

The arms of one group differ in seed, learning rate and ranges alone. A group stands for its best setting of the latter two, by
the mean over seeds of the ruler that the sweep ranks by.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from .._util.intervals import alike_interval, is_alike, mean_interval, sign_test, unequal
from .arm import arm_folder, read_result, read_values, task_scores
from .plan import Plan, describe
from .rulers import RULERS, is_higher_better, ruler_of

Values = dict[str, tuple[float, float]]  # by held-out item: weight, and weighted value of a ruler
LEVEL = 0.05
MIN_SEEDS = 3  # below which the values say more than an interval
SHARE = (0.0, 1.0)
BOUNDS = {  # which values a ruler can have
    **dict.fromkeys(("accuracy", "target_prob", "calibration_error"), SHARE),
    **dict.fromkeys(("nll", "drift"), (0.0, math.inf)),
    "perplexity": (1.0, math.inf),
}


@dataclass
class Difference:
    """How much better one group is than another: by `mean`, with a 95 % interval, and the p-value of no difference.

    Seeds and held-out examples are both samples: the variance is the sum of that of the mean over seeds and that of the mean
    over examples, each taken from paired differences, with Satterthwaite's degrees of freedom, which is Clark's min F' (1973).
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


@dataclass
class Row:
    """A group of the leaderboard, at its best setting.

    `values`: ruler -> (mean, 95 % interval over seeds, None below `MIN_SEEDS`). `each`: ruler -> value of each seed.
    """

    group: dict[str, Any]
    best: dict[str, Any]
    arms: list[int]
    values: dict[str, tuple[float, tuple[float, float] | None]]
    loss: float | None
    behind: Difference | None = None
    at_edge: list[str] = field(default_factory=list)
    each: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return describe(self.group)


@dataclass
class Leaderboard:
    """`rows`: best first. `arms`: result and folder of each finished arm. `failed`: arm -> (settings, reason)."""

    plan: Plan
    rows: list[Row]
    arms: dict[int, dict[str, Any]]
    failed: dict[int, tuple[dict[str, Any], str]]
    base: dict[str, float] | None

    @property
    def rulers(self) -> list[str]:
        """The rulers that there are figures of."""
        return rulers_of(next(iter(self.arms.values()))) if self.arms else []

    def verdict(self) -> str:
        """Return in a sentence which group is best, and which can't be told from it."""
        if not self.rows:
            return "No arm finished."
        first, rest = self.rows[0], self.rows[1:]
        ruler = self.plan.rank_by
        if not rest:
            return f"{first.name} is alone."
        if len({row.values[ruler][0] for row in self.rows}) == 1:
            return f"All tie by {ruler}, at {first.values[ruler][0]:.4g}: it tells nothing here. Rank by another ruler."
        equal = [row.name for row in rest if row.values[ruler][0] == first.values[ruler][0]]
        tied = [row.name for row in rest if row.behind and not row.behind.is_significant and row.name not in equal]
        best = f"{'; '.join([first.name, *equal])} tie by {ruler}" if equal else f"{first.name} is ahead by {ruler}"
        if not any(row.behind and "seeds" in row.behind.over for row in rest):
            return f"{best}; chance in training can't be told from that with fewer than two seeds."
        if tied:
            return f"{best}, but with no significant difference from {'; '.join(tied)}."
        return f"{best}; all others are worse by more than chance."


def judge(plan: Plan, folder: Path, failed: dict[int, tuple[dict[str, Any], str]]) -> Leaderboard:
    """Return the leaderboard of the arms that have finished in `folder`."""
    arms = {}
    for index in range(plan.count):
        result = read_result(arm_folder(folder, index))
        if result is not None:
            arms[index] = result
    board = rank(plan, arms, lambda index: read_values(arm_folder(folder, index), plan.rank_by), failed)
    if board.base is not None:
        board.base = {**board.base, **{name: each["value"] for name, each in task_scores(folder / "base" / "tasks").items()}}
    return board


def rank(
    plan: Plan,
    arms: dict[int, dict[str, Any]],
    values_of: Callable[[int], Values | None],
    failed: dict[int, tuple[dict[str, Any], str]],
) -> Leaderboard:
    """Return the leaderboard of results by arm; `values_of(arm)` are those of the ruler by held-out item, if it has such."""
    groups: dict[str, dict[str, list[int]]] = {}
    for index, result in sorted(arms.items()):
        setting = result["setting"]
        tuned = {key: value for key, value in setting.items() if key != "seed"}
        group = json.dumps(plan.group_of(setting), sort_keys=True)
        same = groups.setdefault(group, {}).setdefault(json.dumps(tuned, sort_keys=True), [])
        if all(arms[other]["setting"] != setting for other in same):  # a point drawn twice is one arm
            same.append(index)
    sign = _sign(plan.rank_by, arms)
    rows = []
    for settings in groups.values():
        most = max(map(len, settings.values()))  # a setting of which seeds failed doesn't stand for the group
        whole = {name: indices for name, indices in settings.items() if len(indices) == most}
        best = max(whole, key=lambda name: _merit(arms, whole[name], plan.rank_by, sign))
        rows.append(_row(plan, arms, json.loads(best), settings[best]))
    rows.sort(key=lambda row: _merit(arms, row.arms, plan.rank_by, sign), reverse=True)
    compared = rows[1:]
    for row in compared:
        row.behind = compare(plan.rank_by, arms, values_of, rows[0].arms, row.arms)
    _holm([row.behind for row in compared if row.behind is not None])
    base = None if _differ(plan, "model_name_or_path") else next((result["base"] for result in arms.values()), None)
    return Leaderboard(plan, rows, arms, failed, base)


def rulers_of(result: dict[str, Any]) -> list[str]:
    """Return the rulers of an arm's result, perplexity among them."""
    measured = result["rulers"].keys() | ({"perplexity"} if "nll" in result["rulers"] else set())
    return [*(name for name in RULERS if name in measured), *(name for name in result["rulers"] if name not in RULERS)]


def _row(plan: Plan, arms: dict[int, dict[str, Any]], best: dict[str, Any], indices: list[int]) -> Row:
    each = {name: [ruler_of(arms[index], name) for index in indices] for name in rulers_of(arms[indices[0]])}
    values = {name: (float(np.mean(found)), _interval(found, bounds_of(name, arms))) for name, found in each.items()}
    losses = [arms[index]["loss"] for index in indices if arms[index]["loss"] is not None]
    edges, group = [], plan.group_of(best)
    # also those that failed
    rates = sorted(
        {each["learning_rate"] for each in plan.points() if "learning_rate" in each and plan.group_of(each) == group}
    )
    rate = best.get("learning_rate")
    if len(rates) > 2 and not plan.trials and rate in (rates[0], rates[-1]):
        edges.append(f"its best learning rate, {rate:g}, is the {'least' if rate == rates[0] else 'greatest'} tried")
    return Row(group, best, indices, values, float(np.mean(losses)) if losses else None, None, edges, each)


def compare(
    ruler: str, arms: dict[int, dict[str, Any]], values_of: Callable[[int], Values | None], better: list[int], worse: list[int]
) -> Difference:
    """Return by how much the arms `better` exceed the arms `worse` in a ruler; arms of the same seed are paired."""
    seeds = {arms[index]["setting"].get("seed"): index for index in worse}
    pairs = [(index, seeds[seed]) for index in better if (seed := arms[index]["setting"].get("seed")) in seeds]
    sign = _sign(ruler, arms)
    if not pairs:
        return Difference(sign * (_mean(arms, better, ruler) - _mean(arms, worse, ruler)), None, None, ())
    by_seed = np.array([sign * (ruler_of(arms[a], ruler) - ruler_of(arms[b], ruler)) for a, b in pairs])
    by_item = _by_item([(values_of(a), values_of(b)) for a, b in pairs], sign)
    samples, weights = {"seeds": by_seed}, None
    if by_item is not None:
        samples["examples"], weights = by_item
    low, high = bounds_of(ruler, arms)
    found = difference(float(by_seed.mean()), {n: each for n, each in samples.items() if len(each) > 1}, high - low, weights)
    return replace(found, by_seed=tuple(by_seed.tolist()))


def bounds_of(ruler: str, arms: dict[int, dict[str, Any]]) -> tuple[float, float]:
    """Return which values a ruler can have; a task's that is better if higher is a share if all its values could be."""
    if ruler in BOUNDS:
        return BOUNDS[ruler]
    every = [result["rulers"][ruler] for result in arms.values() if ruler in result["rulers"]]
    is_share = _sign(ruler, arms) > 0 and all(0 <= value <= 1 for value in every)
    return SHARE if is_share else (-math.inf, math.inf)


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


def _by_item(pairs: list[tuple[Values | None, Values | None]], sign: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return for each held-out item its mean difference over seeds, so that their mean is the difference of rulers; its weight.

    A ruler is sum s_i / sum n_i over m items of weight n_i; with equal n_i in both arms the difference D is sum d_i / sum n_i,
    and what is returned m (d_i - D n_i) / sum n_i + D, whose variance is that of D linearised. None where weights differ.
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


def _holm(differences: list[Difference]) -> None:
    """Make the p-values those of several comparisons with one winner (Holm, 1979)."""
    known = sorted((each for each in differences if each.p_value is not None), key=lambda each: each.p_value or 0.0)
    least = 0.0
    for i, each in enumerate(known):
        least = max(least, min(1.0, (len(known) - i) * (each.p_value or 0.0)))
        each.p_value = least


def _interval(values: list[float], bounds: tuple[float, float]) -> tuple[float, float] | None:
    if len(values) < MIN_SEEDS:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean_interval(mean, error, len(values) - 1, len(values), bounds) if math.isfinite(mean) else None


def _mean(arms: dict[int, dict[str, Any]], indices: list[int], ruler: str) -> float:
    return float(np.mean([ruler_of(arms[index], ruler) for index in indices]))


def _merit(arms: dict[int, dict[str, Any]], indices: list[int], ruler: str, sign: int) -> tuple[float, float]:
    """Return what is to be highest: the ruler, and where that ties, accuracy."""
    has_accuracy = "accuracy" in arms[indices[0]]["rulers"]
    return sign * _mean(arms, indices, ruler), _mean(arms, indices, "accuracy") if has_accuracy else 0.0


def _sign(ruler: str, arms: dict[int, dict[str, Any]]) -> int:
    return 1 if is_higher_better(ruler, next(iter(arms.values()), {})) else -1


def _differ(plan: Plan, key: str) -> bool:
    return key in plan.grid or any(key in arm for arm in plan.arms)
