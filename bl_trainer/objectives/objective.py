"""Objectives f(p) of the probability p that the model gives a target token, and thresholds on p.

Source: Li et al., "Beyond Log Likelihood", https://arxiv.org/abs/2510.00526, sections 3 and 5. An objective is a function
of `logp` = log p that returns one cost per token; it never masks and never reduces. `Objective` is such a function with
its parameters filled in, `Threshold` says which target tokens train.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arrays import refuse_probabilities, takes_arrays
from .composition import Schedule, chosen, floored, spell, value_at
from .contract import STATISTICS, check_contract, check_parameters
from .functions import anneal, annealed_alpha
from .plot import plot_objective
from .pricing import masked_cost
from .spec import OBJECTIVES, function_of, read_composition, read_spec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["OBJECTIVES", "Objective"]


@dataclass(frozen=True, repr=False)
class Objective:
    """An objective function with its parameters filled in, and what it is composed with.

    The function's first parameter is `logp`. It may name further statistics of the next-token distribution, and gets exactly
    those that it names, each of the shape of `logp`. `entropy` is in nats and has a gradient; detach it to use it as a weight.
    `log_sum_sq_probs` is log sum_v p_v^2, and `is_top1` a bool. `ref_logp` is log p under a reference model, without gradient.
    `label` holds token ids. The float `progress` rises from 0 to 1 over training. Its other parameters come from the recipe.
    It returns one cost per token. That cost must not depend on other tokens: else the gradient would depend on how a batch is
    cut up.

    `name` is a key of `OBJECTIVES` or an import path `package.module:function`. Any number among
    the parameters, `floor` and the weights of `mix` may be a `Schedule`, whose value then depends on `progress`.

    `mix`: objectives whose costs are added, each times its weight >= 0; f itself counts once. `floor`, 0 to 1: the smallest
    weight of a token on the NLL gradient, f and `mix` together. `special_tokens`: the objective of end, special and
    chat-template tokens, which keep it alone, and train whatever the threshold. See `bl_trainer.objectives.composition`.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    floor: "float | Schedule | None" = None
    mix: "tuple[tuple[Objective, float | Schedule], ...]" = ()
    special_tokens: "Objective | None" = None

    @classmethod
    def parse(cls, spec: "str | Mapping[str, Any] | Objective | Callable[..., Tensor]") -> "Objective":
        """Read `"neg_p"`, `"my_package.losses:my_objective"` or `{"name": "power", "alpha": 10}`, also as JSON text.

        A function may stand in place of a name: it is recorded by its import path. A mapping may also have `floor: 0.1`,
        `mix: {nll: 0.1}` or `mix: [{name: power, alpha: 10, weight: 0.1}]`, `special_tokens: nll` (any objective), and
        `{from: 0, to: 2, over: [0.3, 1.0], shape: linear}` for a number.

        A function is tried on a few tokens, from impossible to certain. Raises RecipeError on an unknown name, a missing or
        surplus parameter, a composition that means nothing, or a function that doesn't keep the contract above.
        """
        if isinstance(spec, Objective):
            return spec
        name, parameters, composition = read_spec(spec)
        objective = cls(name, parameters)
        check_parameters(objective)
        check_contract(objective)
        return replace(objective, **read_composition(composition, cls.parse))

    @classmethod
    def read(cls, spec: "str | Mapping[str, Any] | Objective") -> "Objective":
        """Read a spec that `parse` has accepted before, as recipes and records hold it, without trying its function again."""
        if isinstance(spec, Objective):
            return spec
        name, parameters, composition = read_spec(spec)
        return cls(name, parameters, **read_composition(composition, cls.read))

    def __repr__(self) -> str:
        return spell(self.to_dict())

    @takes_arrays
    def __call__(self, logp: Tensor, **statistics: Any) -> Tensor:
        """Return f, elementwise, composed as it is.

        `logp`: float tensor, or NumPy array, of any shape; `statistics`: at least those that `self.statistics` names, of which
        `is_special` may be missing: no token is special then. Returns a tensor, or a NumPy array if `logp` is one. Raises
        LossError on a NumPy array of probabilities.
        """
        progress = statistics.get("progress")

        def summed(logp: Tensor, **statistics: Any) -> Tensor:
            asked = {name: statistics[name] for name in self.own_statistics if name in statistics}
            if len(asked) < len(self.own_statistics):
                own = inspect.signature(self.function).parameters
                lacking = [name for name in self.own_statistics if name not in asked and own[name].default is own[name].empty]
                if lacking:
                    raise TypeError(f"Objective {self.name!r} looks at more than p: give it {', '.join(lacking)} too.")
            cost = self.function(logp, **asked, **{key: value_at(value, progress) for key, value in self.parameters.items()})
            for other, weight in self.mix:
                cost = cost + value_at(weight, progress) * other(logp, **statistics)
            return cost

        def ordinary(logp: Tensor, **statistics: Any) -> Tensor:
            if self.floor is None:
                return summed(logp, **statistics)
            return floored(lambda leaf: summed(leaf, **statistics), logp, value_at(self.floor, progress))

        if self.special_tokens is None or "is_special" not in statistics:
            return ordinary(logp, **statistics)
        return chosen(statistics["is_special"], self.special_tokens, ordinary, {"logp": logp, **statistics})

    def at(self, progress: float) -> "Objective":
        """Return this objective with its settings as they are at this share of training, 0 to 1, none of them scheduled. A
        function that asks for `progress`, as `anneal` does, still goes by it."""
        return replace(
            self,
            parameters={key: value_at(value, progress) for key, value in self.parameters.items()},
            floor=value_at(self.floor, progress),
            mix=tuple((other.at(progress), value_at(weight, progress)) for other, weight in self.mix),
            special_tokens=self.special_tokens and self.special_tokens.at(progress),
        )

    @cached_property
    def schedules(self) -> dict[str, Schedule]:
        """Its schedules by name: a parameter's, `floor`, `mix_nll` for a weight, `special_tokens_alpha`, `mix_power_alpha`."""
        return {key: value for key, value in self._settings() if isinstance(value, Schedule)}

    def scheduled_at(self, progress: float) -> dict[str, float]:
        """Return what its schedules, and the alpha of `anneal` at H = 0, have come to at this share of training, by name."""
        found = {name: schedule.at(progress) for name, schedule in self.schedules.items()}
        annealed = {f"{prefix}alpha": part.resolved.at(progress) for prefix, part in self.walk() if part.function is anneal}
        return found | {name: annealed_alpha(progress, **part.parameters) for name, part in annealed.items()}

    def walk(self, prefix: str = "") -> "Iterator[tuple[str, Objective]]":
        """Yield this objective and all within it, each with what the names of its settings begin with: `mix_power_`."""
        yield prefix, self
        for name, (other, _) in zip(self._mixed, self.mix, strict=True):
            yield from other.walk(f"{prefix}{name}_")
        if self.special_tokens is not None:
            yield from self.special_tokens.walk(f"{prefix}special_tokens_")

    @property
    def _mixed(self) -> list[str]:
        """Names of the weights of `mix`."""
        names = [re.split(r"[:.]", other.name)[-1] for other, _ in self.mix]
        return [f"mix_{name}" if names.count(name) == 1 else f"mix_{name}_{i}" for i, name in enumerate(names, 1)]

    def _settings(self) -> Iterator[tuple[str, Any]]:
        for prefix, part in self.walk():
            weights = (weight for _, weight in part.mix)
            named = {**part.parameters, "floor": part.floor, **dict(zip(part._mixed, weights, strict=True))}
            yield from ((prefix + key, value) for key, value in named.items())

    @takes_arrays
    def gradient_weight(self, logp: Tensor, **statistics: Any) -> Tensor:
        """Return -f'(p) p, the weight that f puts on the gradient of -log p; same shape as `logp`, without gradient.

        Takes and returns tensors or NumPy arrays. Raises LossError if `logp` is above 0, as probabilities are.
        """
        refuse_probabilities(logp)
        everywhere = torch.ones_like(logp, dtype=torch.bool)
        return masked_cost(self, everywhere, logp.detach(), **statistics)[1]

    @takes_arrays
    def weight(self, logp: Tensor, **statistics: Any) -> Tensor:
        """Return W_f(p) = -f'(p) p (1 - p), the pull of a token on its own logit (paper, Lemma 3.1); same shape as `logp`.

        Takes and returns tensors or NumPy arrays. Raises LossError if `logp` is above 0, as probabilities are.
        """
        return self.gradient_weight(logp, **statistics) * -torch.expm1(logp.detach())

    def plot(self, axes: "Axes | None" = None, **statistics: "float | Sequence[float]") -> "Axes":
        """Plot -f'(p) p, the weight on the NLL gradient, against p, and return the matplotlib axes.

        `axes`: where to plot; by default a new figure. `statistics`: a number, or several, for what the objective looks at
        besides p, e.g. `entropy=[0, 2]` in nats or `progress=1`. Each combination is one curve, and a statistic that you do
        not give has a few values. The axis ends at a weight of 4. Raises DependencyError without matplotlib, and LossError
        on a statistic that the objective does not look at.
        """
        return plot_objective(self, axes, statistics)

    @cached_property
    def function(self) -> Callable[..., Tensor]:
        """The objective function itself."""
        return function_of(self.name)

    @cached_property
    def statistics(self) -> tuple[str, ...]:
        """What the cost of a token depends on besides `logp`: names in `STATISTICS`, and `is_special` (bool)."""
        names = {name for _, part in self.walk() for name in part.own_statistics}
        names |= {"progress"} if self.schedules else set()
        names |= {"is_special"} if self.special_tokens else set()
        return tuple(name for name in (*STATISTICS, "is_special") if name in names)

    @cached_property
    def own_statistics(self) -> tuple[str, ...]:
        """The names in `STATISTICS` that its function asks for."""
        return tuple(name for name in inspect.signature(self.function).parameters if name in STATISTICS)

    @property
    def resolved(self) -> "Objective":
        """This objective with the default of each parameter that it isn't given, which another version may have otherwise."""
        own = inspect.signature(self.function).parameters.values()
        defaults = {
            p.name: p.default for p in own if p.name not in STATISTICS and isinstance(p.default, (bool, int, float, str))
        }
        return replace(
            self,
            parameters={**defaults, **self.parameters},
            mix=tuple((other.resolved, weight) for other, weight in self.mix),
            special_tokens=self.special_tokens and self.special_tokens.resolved,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that `parse` reads."""
        spec = {"name": self.name, **{key: _plain(value) for key, value in self.parameters.items()}}
        if self.mix:
            spec["mix"] = [{**other.to_dict(), "weight": _plain(weight)} for other, weight in self.mix]
        if self.floor is not None:
            spec["floor"] = _plain(self.floor)
        if self.special_tokens is not None:
            spec["special_tokens"] = self.special_tokens.to_dict()
        return spec


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Schedule) else value
