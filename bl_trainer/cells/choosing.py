"""The rule that picks a default among objectives, and how far each is behind the best one of a cell.

It was written down before the candidates ran, apart from three of them; docs/results/default.md has the circumstances.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .results import METRICS, Mean, Results, over_models

STEPS = ("greedy", "variation", "sampled")  # in this order; the latter two each at the objective's best temperature
TIED = 0.03  # regret in the worst cell that counts as none
SCHEDULED = ("anneal",)  # whose cost depends on the step of training; a stateless objective is preferred to them


@dataclass(frozen=True)
class Regret:
    """By how much the best candidate of each cell exceeds an objective, in means over models; positive is worse.

    `cells`: of each cell, and `mean` over cells, with intervals over models.
    """

    cells: dict[str, Mean]
    mean: Mean

    @property
    def by_cell(self) -> dict[str, float]:
        """The mean of each cell."""
        return {cell: each.mean for cell, each in self.cells.items()}

    @property
    def worst(self) -> str:
        """The cell where it is greatest."""
        return max(self.by_cell, key=lambda cell: self.by_cell[cell])

    @property
    def most(self) -> float:
        """The greatest."""
        return self.by_cell[self.worst]


@dataclass(frozen=True)
class Ruling:
    """What the rule says of `candidates`, by their `results`. `tied`: the regret in the worst cell that counts as none."""

    results: Results
    candidates: tuple[str, ...]
    tied: float = TIED

    @cached_property
    def regrets(self) -> dict[str, dict[str, Regret]]:
        """Metric -> candidate -> regret."""
        return {metric: regrets(self.results, self.candidates, metric) for metric in STEPS}

    @cached_property
    def rounds(self) -> list[list[str]]:
        """The candidates that each step leaves."""
        left, found = list(self.candidates), []
        for metric in STEPS:
            least = min(self.regrets[metric][name].most for name in left)
            left = [name for name in left if self.regrets[metric][name].most <= least + self.tied]
            found.append(left)
        return found

    @property
    def winner(self) -> str:
        """The stateless one, if any, with the smallest mean greedy regret among those that the last step leaves."""
        return min(self.rounds[-1], key=lambda name: (name in SCHEDULED, self.regrets["greedy"][name].mean.mean))

    @cached_property
    def winners_without_one(self) -> list[str]:
        """The winner without each model in turn: how much the choice hangs on single models."""
        others = ([model for model in self.results.models if model != one] for one in self.results.models)
        return [Ruling(self.results.of(models), self.candidates, self.tied).winner for models in others]


def regrets(results: Results, candidates: Sequence[str], metric: str) -> dict[str, Regret]:
    """Return the regret of each candidate by one metric, each at the learning rate that validation chose for the cell."""
    sign = 1 if METRICS[metric] else -1
    values = {cell: {name: results.by_model(name, cell, metric) for name in candidates} for cell in results.cells_of(metric)}
    best = {cell: max(each.values(), key=lambda one: sign * sum(one.values()) / len(one)) for cell, each in values.items()}
    behind = {
        name: {
            cell: {model: sign * (best[cell][model] - value) for model, value in each[name].items()}
            for cell, each in values.items()
        }
        for name in candidates
    }
    return {
        name: Regret(
            {cell: over_models(one, (-1.0, 1.0)) for cell, one in cells.items()},
            over_models(
                {model: sum(one[model] for one in cells.values()) / len(cells) for model in results.models}, (-1.0, 1.0)
            ),
        )
        for name, cells in behind.items()
    }
