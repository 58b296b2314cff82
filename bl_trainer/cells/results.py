"""What came out of the cells: rates chosen on validation, means over models, and their intervals."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .._util.intervals import Bounds, mean_interval
from .scores import TEMPERATURES

SAMPLED = tuple(f"sampled_{temperature:g}" for temperature in TEMPERATURES)
VARIATION = tuple(f"variation_{temperature:g}" for temperature in TEMPERATURES)
# Metric -> whether more is better; `sampled` and `variation` are each at the objective's best temperature of the cell
METRICS = {
    "greedy": True,
    "sampled": True,
    **dict.fromkeys(SAMPLED, True),
    "variation": False,
    **dict.fromkeys(VARIATION, False),
    "format": True,
    "kept": True,
}
CHOSEN_BY = {"format": "greedy", "kept": "greedy"}  # metrics that choose no rate of their own
BEST_OF = {"sampled": SAMPLED, "variation": VARIATION}
FORMAT_CELLS = ("prefix", "suffix", "wrapped")


class Choice(NamedTuple):
    """The rate, and the metric at its temperature, that are best on validation."""

    rate: float
    metric: str


@dataclass(frozen=True)
class Mean:
    """A mean over models, its 95 % interval with models as units, and the mean of each model."""

    mean: float
    interval: tuple[float, float] | None
    by_model: dict[str, float]


@dataclass(frozen=True)
class Results:
    """Rows of `objective`, `cell`, `model`, `rate`, `seed`, and of metrics: `validation` and `test` by name, `kept`."""

    rows: tuple[dict[str, Any], ...]

    @cached_property
    def objectives(self) -> list[str]:
        """Names, in the order of the rows."""
        return list(dict.fromkeys(row["objective"] for row in self.rows))

    @cached_property
    def cells(self) -> list[str]:
        """Names, in the order of the rows."""
        return list(dict.fromkeys(row["cell"] for row in self.rows))

    @cached_property
    def models(self) -> list[str]:
        """Names, in the order of the rows."""
        return list(dict.fromkeys(row["model"] for row in self.rows))

    @cached_property
    def _by_place(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault((row["objective"], row["cell"]), []).append(row)
        return found

    def __add__(self, other: "Results") -> "Results":
        """Return the rows of both; an objective that both have is the other's."""
        return Results((*(row for row in self.rows if row["objective"] not in other.objectives), *other.rows))

    def of(self, models: Sequence[str]) -> "Results":
        """Return the rows of these models."""
        return Results(tuple(row for row in self.rows if row["model"] in models))

    def on(self, cells: Sequence[str]) -> "Results":
        """Return the rows of these cells."""
        return Results(tuple(row for row in self.rows if row["cell"] in cells))

    def cells_with(self, objective: str) -> list[str]:
        """Return the cells that have rows of an objective."""
        return [cell for cell in self.cells if (objective, cell) in self._by_place]

    def choice(self, objective: str, cell: str, metric: str, least_kept: float = 0.0) -> Choice:
        """Return the rate, and of `sampled` and `variation` the temperature, whose mean over models on validation is best.

        `least_kept`: only rates that keep this share of the old tasks; if none does, the one that keeps the most.
        """
        rows = self._by_place[objective, cell]
        metric = CHOSEN_BY.get(metric, metric)
        rates = sorted({row["rate"] for row in rows})
        share = {rate: _mean(row["kept"] for row in rows if row["rate"] == rate) for rate in rates}
        allowed = [rate for rate in rates if share[rate] >= least_kept] or [max(rates, key=lambda rate: share[rate])]
        sign = 1 if METRICS[metric] else -1
        tried = [Choice(rate, name) for rate in allowed for name in BEST_OF.get(metric, (metric,))]
        return max(
            tried, key=lambda one: sign * _mean(row["validation"][one.metric] for row in rows if row["rate"] == one.rate)
        )

    def by_model(self, objective: str, cell: str, metric: str, least_kept: float = 0.0) -> dict[str, float]:
        """Return a metric on the test items at the rate chosen on validation, by model: the mean over seeds."""
        chosen = self.choice(objective, cell, metric, least_kept)
        rows = [row for row in self._by_place[objective, cell] if row["rate"] == chosen.rate]
        read: Callable[[Any], float] = (
            (lambda row: row["kept"])
            if metric == "kept"
            else lambda row: row["test"][chosen.metric if metric not in CHOSEN_BY else metric]
        )
        return {model: _mean(read(row) for row in rows if row["model"] == model) for model in self.models}

    def mean(self, objective: str, metric: str, cells: Sequence[str] | None = None, least_kept: float = 0.0) -> Mean:
        """Return a metric's mean over cells, by default all, and over models."""
        cells = self.cells if cells is None else cells
        each = [self.by_model(objective, cell, metric, least_kept) for cell in cells]
        return over_models({model: _mean(one[model] for one in each) for model in self.models}, (0.0, 1.0))

    def difference(
        self, objective: str, other: str, metric: str, cells: Sequence[str] | None = None, least_kept: float = 0.0
    ) -> Mean:
        """Return how much better an objective is than another, paired by model. Positive is better for every metric.

        `least_kept`: see `choice`.
        """
        ours, theirs = (self.mean(name, metric, cells, least_kept).by_model for name in (objective, other))
        sign = 1 if METRICS[metric] else -1
        return over_models({model: sign * (ours[model] - theirs[model]) for model in self.models}, (-1.0, 1.0))

    def rank(self, objective: str, metric: str, least_kept: float = 0.0) -> int:
        """Return the place of an objective by a metric's mean, 1 the best; equal ones share a place."""
        sign = 1 if METRICS[metric] else -1
        cells = self.cells_of(metric)
        values = {name: round(sign * self.mean(name, metric, cells, least_kept).mean, 9) for name in self.objectives}
        return 1 + sum(value > values[objective] for value in values.values())

    def cells_of(self, metric: str) -> list[str]:
        """Return the cells that a metric says something of."""
        return [cell for cell in self.cells if metric != "format" or cell in FORMAT_CELLS]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, metrics to four digits."""
        return {"rows": [_rounded(row) for row in self.rows]}

    @classmethod
    def from_json(cls, value: Any) -> "Results":
        """Read what `to_json` returned."""
        return cls(tuple(value["rows"]))


def over_models(values: dict[str, float], bounds: Bounds) -> Mean:
    """Return the mean of one value for each model, with Student's interval; None with one model."""
    array = np.array(list(values.values()))
    if len(array) < 2:
        return Mean(float(array.mean()), None, values)
    error = float(array.std(ddof=1)) / math.sqrt(len(array))
    return Mean(float(array.mean()), mean_interval(float(array.mean()), error, len(array) - 1, len(array), bounds), values)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)  # exact, so that ties are ties in any order


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value
