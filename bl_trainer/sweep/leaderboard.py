"""The leaderboard: all arms judged by the same rulers, with what the differences between them are worth.

The arms of one group differ in seed, learning rate and ranges alone. A group is shown at its best setting of the latter two, by
the mean over seeds of the ruler that the sweep ranks by. Settings that forget more than `max_drift` come last.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.results import mixed_versions
from .design import Setting, describe
from .differences import Difference, by_item, difference, holm, interval_over_seeds
from .outcome import Result, Values, arm_folder, base_scores, finished, read_values
from .plan import Plan
from .rulers import RULERS, Ruler, ruler_named, rulers_in, show, temperatures_of

Arms = Mapping[int, Result]  # of those that have finished
Failed = dict[int, tuple[Setting, str]]  # those without a result: settings, reason


@dataclass
class Row:
    """A group of the leaderboard, at its best setting.

    `forgetful`: the setting that would be its best if forgetting did not count, with what that forgets; None if it is this one.
    `temperatures`: METRIC@best -> the temperature of the best mean.
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
    forgetful: tuple[Setting, float] | None = None
    temperatures: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return describe(self.group)


@dataclass
class Leaderboard:
    """`rows`: best first. `arms`: result of each finished arm. `failed`: arm -> (settings, reason).

    `stopped`: rows of the groups that a first stage left out, best first. Each has one run, at the seed that chose: they are
    compared with none.
    """

    plan: Plan
    rows: list[Row]
    arms: Arms
    failed: Failed
    base: dict[str, float] | None
    stopped: list[Row] = field(default_factory=list)

    @property
    def rulers(self) -> list[Ruler]:
        """The rulers that there are figures of."""
        return rulers_in(self.arms.values())

    def mixed_versions(self) -> dict[str, list[str]]:
        """Return the versions of each package that differs between runs, so that their metrics may differ by it."""
        return mixed_versions(result.versions for result in self.arms.values())

    def verdict(self) -> str:
        """Return in a sentence which group is best, and which can't be told from it."""
        if not self.rows:
            return "No run finished."
        first, rest = self.rows[0], self.rows[1:]
        ruler = self.plan.rank_by
        if not rest:
            return f"{first.name} is alone."
        if len({row.values[ruler][0] for row in self.rows}) == 1:
            return f"All tie by {ruler}, at {show(first.values[ruler][0])}: it tells nothing here. Rank by another metric."
        equal = [row.name for row in rest if row.values[ruler][0] == first.values[ruler][0]]
        tied = [row.name for row in rest if row.behind and not row.behind.is_significant and row.name not in equal]
        best = f"{'; '.join([first.name, *equal])} tie by {ruler}" if equal else f"{first.name} is ahead by {ruler}"
        if not any(row.behind and "seeds" in row.behind.over for row in rest):
            return f"{best}; chance in training can't be told from that with fewer than two seeds."
        if tied:
            return f"{best}, but with no significant difference from {'; '.join(tied)}."
        return f"{best}; all others are worse by more than chance."


def judge(plan: Plan, folder: Path, failed: Failed) -> Leaderboard:
    """Return the leaderboard of the arms that have finished in `folder`."""
    arms = finished(plan.count, folder, Result)
    board = rank(plan, arms, lambda index: read_values(arm_folder(folder, index), plan.rank_by), failed)
    if board.base is not None:
        board.base = {**board.base, **base_scores(folder)}
    return board


def rank(plan: Plan, arms: Arms, values_of: Callable[[int], Values | None], failed: Failed) -> Leaderboard:
    """Return the leaderboard of results by arm; `values_of(arm)` are those of the ruler by held-out item, if it has such."""
    ruler = ruler_named(plan.rank_by, arms.values())

    def merit(indices: list[int]) -> tuple[float, float]:
        """What is to be highest: the ruler, and where that ties, accuracy."""
        accuracy = RULERS["accuracy"]
        has_accuracy = accuracy.is_in(arms[indices[0]].rulers)
        return ruler.sign * _mean(arms, indices, ruler), _mean(arms, indices, accuracy) if has_accuracy else 0.0

    def order(indices: list[int]) -> tuple[float, float, float]:
        """The same, but for those that forget too much: the less the better."""
        return -plan.excess(_forgotten(arms, indices)), *merit(indices)

    def ranked(indices: Iterable[int]) -> list[Row]:
        rows = []
        for settings in _grouped(plan, {index: arms[index] for index in indices}):
            most = max(map(len, settings))  # a setting of which seeds failed doesn't stand for the group
            whole = [each for each in settings if len(each) == most]
            best, greedy = max(whole, key=order), max(whole, key=merit)
            rows.append(_row(plan, arms, best))
            if (lost := _forgotten(arms, greedy)) is not None and plan.excess(lost):
                rows[-1].forgetful = _tuned(arms[greedy[0]]), lost
        return sorted(rows, key=lambda row: order(row.arms), reverse=True)

    first = [index for index in arms if index < plan.first_stage or not plan.is_staged]
    rows, finalists = ranked(first), ranked(index for index in arms if index not in first)
    stopped = [row for row in rows if finalists and row.group not in [each.group for each in finalists]]
    rows = finalists or rows
    for row in rows[1:]:
        row.behind = compare(plan.rank_by, arms, values_of, rows[0].arms, row.arms)
    holm([row.behind for row in rows[1:] if row.behind is not None])
    base = next((result.base for result in arms.values()), None) if len(plan.bases()) == 1 else None
    return Leaderboard(plan, rows, arms, failed, base, stopped)


def _grouped(plan: Plan, arms: Arms) -> Iterable[list[list[int]]]:
    """Return for each group the arms of each of its settings, which differ in seed alone."""
    groups: dict[str, dict[str, list[int]]] = {}
    for index, result in sorted(arms.items()):
        setting, tuned = result.setting, _tuned(result)
        same = groups.setdefault(json.dumps(plan.group_of(tuned)), {}).setdefault(json.dumps(tuned), [])
        if all(arms[other].setting != setting for other in same):  # a point drawn twice is one arm
            same.append(index)
    return [list(settings.values()) for settings in groups.values()]


def _tuned(result: Result) -> Setting:
    """Return a run's settings but for the seed, in an order that equal ones share."""
    return json.loads(json.dumps({key: value for key, value in result.setting.items() if key != "seed"}, sort_keys=True))


def _row(plan: Plan, arms: Arms, indices: list[int]) -> Row:
    """Return the row of the arms of a group's best setting."""
    rulers = rulers_in([arms[indices[0]], *arms.values()])
    best = _tuned(arms[indices[0]])
    each = {ruler.name: [ruler.of(arms[index].rulers) for index in indices] for ruler in rulers}
    values = {ruler.name: (float(np.mean(each[ruler.name])), _interval(ruler, each[ruler.name])) for ruler in rulers}
    losses = [loss for index in indices if (loss := arms[index].loss) is not None]
    loss = float(np.mean(losses)) if losses else None
    edges, temperatures = _edges(plan, best), _best_temperatures(rulers, values)
    return Row(plan.group_of(best), best, indices, values, loss, at_edge=edges, each=each, temperatures=temperatures)


def _best_temperatures(rulers: list[Ruler], values: Mapping[str, tuple[float, Any]]) -> dict[str, float]:
    """Return METRIC@best -> the temperature at which the mean over seeds is best."""
    found = {}
    for ruler in rulers:
        others = temperatures_of(ruler.name, values)
        if others:
            best = max if ruler.sign > 0 else min
            found[ruler.name] = others[best(others, key=lambda name: values[name][0])]
    return found


def _interval(ruler: Ruler, values: list[float]) -> tuple[float, float] | None:
    return interval_over_seeds(values, ruler.bounds)


def _edges(plan: Plan, best: Setting) -> list[str]:
    """Return what of a group's best setting is the least or the greatest that was tried, those that failed among them."""
    group, rate = plan.group_of(best), best.get("learning_rate")
    own = [point for point in plan.points() if "learning_rate" in point and plan.group_of(point) == group]
    rates = sorted({point["learning_rate"] for point in own})
    if len(rates) < 3 or plan.trials or rate not in (rates[0], rates[-1]):
        return []
    return [f"its best learning rate, {rate:g}, is the {'least' if rate == rates[0] else 'greatest'} tried"]


def compare(
    name: str, arms: Arms, values_of: Callable[[int], Values | None], better: list[int], worse: list[int]
) -> Difference:
    """Return by how much the arms `better` exceed the arms `worse` in a ruler; arms of the same seed are paired."""
    seeds = {arms[index].setting.get("seed"): index for index in worse}
    pairs = [(index, seeds[seed]) for index in better if (seed := arms[index].setting.get("seed")) in seeds]
    ruler = ruler_named(name, arms.values())
    if not pairs:
        return Difference(ruler.sign * (_mean(arms, better, ruler) - _mean(arms, worse, ruler)), None, None, ())
    by_seed = np.array([ruler.sign * (ruler.of(arms[a].rulers) - ruler.of(arms[b].rulers)) for a, b in pairs])
    over_items = by_item([(values_of(a), values_of(b)) for a, b in pairs], ruler.sign)
    samples, weights = {"seeds": by_seed}, None
    if over_items is not None:
        samples["examples"], weights = over_items
    low, high = ruler.bounds
    found = difference(float(by_seed.mean()), {n: each for n, each in samples.items() if len(each) > 1}, high - low, weights)
    return replace(found, by_seed=tuple(by_seed.tolist()))


def _forgotten(arms: Arms, indices: list[int]) -> float | None:
    """Return the mean forgetting of some arms, None if it was not measured."""
    ruler = RULERS["forgetting"]
    return _mean(arms, indices, ruler) if all(ruler.is_in(arms[index].rulers) for index in indices) else None


def _mean(arms: Arms, indices: list[int], ruler: Ruler) -> float:
    return float(np.mean([ruler.of(arms[index].rulers) for index in indices]))
