"""Objectives f(p) of the probability p that the model gives a target token, and thresholds on p.

Source: Li et al., "Beyond Log Likelihood", https://arxiv.org/abs/2510.00526, sections 3 and 5. An objective is a function
of `logp` = log p that returns one cost per token; it never masks and never reduces. `Objective` is such a function with
its parameters filled in, `Threshold` says which target tokens train.
"""

import importlib
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .._util.text import from_json, is_number, nearest, to_exponent, to_number
from .composition import COIN_FLIP, KEYS, Schedule, chosen, floored, value_at
from .contract import STATISTICS, probe_tokens
from .functions import (
    anneal,
    annealed_alpha,
    log_one_minus_p,
    neg_p,
    nll,
    power,
)
from .pricing import masked_cost
from .published import PUBLISHED

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "nll": nll,
    "neg_p": neg_p,
    "power": power,
    "log_one_minus_p": log_one_minus_p,
    "anneal": anneal,
    **PUBLISHED,
}


@dataclass(frozen=True)
class Objective:
    """An objective function with its parameters filled in, and what it is composed with.

    The function's first parameter is `logp`. It may name further statistics of the next-token distribution, and is given
    exactly those that it names, each of the shape of `logp`: `entropy` in nats (with gradient: detach it to use it as a
    weight), `log_sum_sq_probs` = log sum_v p_v^2, `is_top1` (bool), `ref_logp` (log p under a reference model, without
    gradient), `label` (token ids), and the float `progress`, from 0 to 1 over training. Its other parameters come from the
    recipe. It returns one cost per token, and the cost of a token must not depend on other tokens, or the gradient would
    depend on how a batch is cut up.

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
    def parse(cls, spec: "str | Mapping[str, Any] | Objective") -> "Objective":
        """Read `"neg_p"`, `"my_package.losses:my_objective"` or `{"name": "power", "alpha": 10}`, also as JSON text.

        A mapping may also have `floor: 0.1`, `mix: {nll: 0.1}` or `mix: [{name: power, alpha: 10, weight: 0.1}]`,
        `special_tokens: nll` (any objective), and `{from: 0, to: 2, over: [0.3, 1.0], shape: linear}` for a number.

        Raises ValueError on an unknown name, a missing or surplus parameter, a composition that means nothing, or a function
        that doesn't keep the contract above, which is tried on a few tokens, from impossible to certain.
        """
        if isinstance(spec, Objective):
            return spec
        spec = from_json("objective", spec, '{"name": "power", "alpha": 10}')
        if callable(spec):
            raise ValueError(
                f"`objective` must be a name, got {spec!r}. Give a function by its import path, `module:function`, in "
                "a notebook `__main__:function`, so that checkpoints can record it."
            )
        if isinstance(spec, Mapping):
            parameters = {key: _setting(key, value) for key, value in spec.items() if key not in ("name", *KEYS)}
            name, composition = spec.get("name"), {key: spec[key] for key in KEYS if key in spec}
        else:
            name, parameters, composition = spec, {}, {}
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"`objective` must be a name or a mapping with `name`, got {spec!r}. Write `objective: neg_p`, with parameters "
                "`{name: power, alpha: 10}`."
            )
        objective = cls(name, parameters)
        objective._check_parameters()
        objective._check_contract()
        read = {"floor": _floor, "mix": _mix, "special_tokens": _part}
        return replace(objective, **{key: read[key](key, value) for key, value in composition.items()})

    def __call__(self, logp: Tensor, **statistics: Any) -> Tensor:
        """Return f, elementwise, composed as it is.

        `logp`: float tensor of any shape; `statistics`: at least those that `self.statistics` names, of which `is_special`
        may be missing: no token is special then.
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

    def gradient_weight(self, logp: Tensor, **statistics: Any) -> Tensor:
        """Return -f'(p) p, the weight that f puts on the gradient of -log p; same shape as `logp`, without gradient."""
        everywhere = torch.ones_like(logp, dtype=torch.bool)
        return masked_cost(self, everywhere, logp.detach(), **statistics)[1]

    def weight(self, logp: Tensor, **statistics: Any) -> Tensor:
        """Return W_f(p) = -f'(p) p (1 - p), the pull of a token on its own logit (paper, Lemma 3.1); same shape as `logp`."""
        return self.gradient_weight(logp, **statistics) * -torch.expm1(logp.detach())

    @cached_property
    def function(self) -> Callable[..., Tensor]:
        """The objective function itself."""
        if ":" in self.name:
            return _import(self.name)
        if self.name not in OBJECTIVES:
            raise ValueError(
                f"Unknown objective {self.name!r}.{nearest(self.name, OBJECTIVES)} Built in: {', '.join(OBJECTIVES)}. Your "
                "own function goes by its import path, e.g. `objective: my_package.losses:my_objective`."
            )
        return OBJECTIVES[self.name]

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
    def is_ruler(self) -> bool:
        """Whether a lower cost is a better model: a token's cost falls with its p, and not because the model is surer.

        Tried on tokens from p = 1e-5 to 1. What an objective differentiates through, as the gradient of `entropy`, is part
        of what it wants, and may count.
        """
        logp = torch.linspace(math.log(1e-5), 0, 400, dtype=torch.float64)
        no, names = torch.zeros(len(logp), dtype=torch.bool), ("logp", *self.statistics)
        surer = {"entropy": COIN_FLIP["entropy"] / 2, "log_sum_sq_probs": COIN_FLIP["log_sum_sq_probs"] / 2, "is_top1": True}
        for ref_logp, is_special, progress in itertools.product((-5.0, -0.7, -0.05), (no, ~no), (0.5, 1.0)):
            tokens: dict[str, Any] = {
                name: torch.full_like(logp, value) for name, value in COIN_FLIP.items() if isinstance(value, float)
            }
            tokens |= {"logp": logp, "ref_logp": torch.full_like(logp, ref_logp), "label": no.long(), "progress": progress}
            tokens |= {"is_top1": no, "is_special": is_special, "entropy": tokens["entropy"].requires_grad_()}
            cost = self._try({name: tokens[name] for name in names})
            if (cost.diff() > 1e-9).any():
                return False
            slope = None
            if "entropy" in names and cost.requires_grad:
                (slope,) = torch.autograd.grad(cost.sum(), tokens["entropy"], allow_unused=True)
            for name, value in surer.items():
                if name in names and not (name == "entropy" and slope is not None):
                    changed = tokens | {name: torch.full_like(tokens[name], value)}
                    if not torch.equal(self._try({key: changed[key] for key in names}), cost):
                        return False
        return True

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

    def _check_parameters(self) -> None:
        function = self.function
        try:
            first, *others = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Objective {self.name!r} is not a function of `logp`: {error}. Give a Python function whose first "
                "parameter is `logp`."
            ) from error
        if first.name != "logp":
            raise ValueError(f"The first parameter of objective {self.name!r} must be `logp`, got {first.name!r}.")
        takes_any = any(p.kind is p.VAR_KEYWORD for p in others)
        own = {p.name: p for p in others if p.name not in STATISTICS and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        for key in (*KEYS, "name", "weight"):
            if key in own:
                raise ValueError(
                    f"Objective {self.name!r} has a parameter {key!r}, which in a recipe means the same for every objective: "
                    "see `bl_trainer.objectives.composition`. Give the parameter another name."
                )
        supplied = [key for key in self.parameters if key in STATISTICS]
        surplus = [key for key in self.parameters if key not in own and not takes_any]
        missing = [key for key, p in own.items() if p.default is p.empty and key not in self.parameters]
        if supplied or surplus or missing:
            problems = [
                f"{key!r} is a statistic that the trainer supplies" if key in supplied else f"{key!r} is not one of them"
                for key in dict.fromkeys(supplied + surplus)
            ]
            problems += [f"{key!r} is missing" for key in missing]
            example = ", ".join([f"name: {self.name}", *(f"{key}: {self.parameters.get(key, '...')}" for key in own)])
            offer = f" Statistics that a function may name: {', '.join(STATISTICS)}." if missing and ":" in self.name else ""
            near = "".join(nearest(key, (*own, *KEYS)) for key in surplus)
            write = "" if near else f" Write `objective: {'{' + example + '}' if own else self.name}`."
            if function is anneal:
                write = " For another schedule give `start` and `end` the same one, as `{from: 0.5, to: 5, over: [0.3, 1]}`."
            takes = f"Objective {self.name!r} takes {', '.join(own) or 'no parameters of its own'}"
            raise ValueError(f"{takes}: {' and '.join(problems)}.{near}{write}{offer}")
        for key in self.schedules:
            default = own[key].default if key in own else None
            if default not in (None, inspect.Parameter.empty) and not is_number(default):
                raise ValueError(
                    f"`{key}` of objective {self.name!r} can't be scheduled: it is no number, its default is {default!r}. "
                    "Give it one value."
                )

    def _check_contract(self) -> None:
        """Try the function on tokens from impossible to certain, and on each among others: its cost may not change."""
        for progress in (0.0, 1.0, 0.5) if "progress" in self.statistics else (0.5,):  # the ends first, as the recipe has them
            self.at(progress)._check_contract_at(progress)

    @torch.inference_mode(False)
    def _check_contract_at(self, progress: float) -> None:
        what, shape = f"Objective {self.name!r}", (2, 6)
        when = f" and progress {progress:g}" if "progress" in self.own_statistics else ""
        tokens = probe_tokens([-50, -20, -8, -4, -2.5, -1.6, -1, -0.7, -0.3, -0.1, -1e-3, 0], shape, progress)
        others = probe_tokens([-0.2, -0.02, 0, -0.4, -0.05, -0.6, -0.01, -0.15, -0.5, -0.3, -0.25, -0.08], shape, progress)
        if self.name in OBJECTIVES:
            self(**tokens)  # its parameters are checked; the rest is tested with the package
            return
        inputs = (tokens["logp"].requires_grad_(), tokens["entropy"].requires_grad_())
        cost = self._try(tokens)
        if not isinstance(cost, Tensor) or cost.shape != shape or not cost.is_floating_point():
            got = f"{cost.dtype} {tuple(cost.shape)}" if isinstance(cost, Tensor) else type(cost).__name__
            raise ValueError(
                f"{what} must return one float per token, of the shape of `logp`; for a float32 {shape} it gave {got}. "
                "Don't take the mean or the sum: the trainer does."
            )
        slopes = torch.autograd.grad(cost.sum(), inputs, allow_unused=True) if cost.requires_grad else (None, None)
        if all(slope is None for slope in slopes):
            raise ValueError(f"{what} has no gradient with respect to `logp`, so nothing would train. Don't detach all of it.")
        for values in (cost, *(slope for slope in slopes if slope is not None)):
            if not values.isfinite().all():
                worst = tokens["logp"][~values.isfinite()][0].item()
                raise ValueError(
                    f"{what}, or its gradient, is not finite at log p = {worst:g}{when}. It must be from log p = -50 to 0, "
                    "which confident models reach."
                )
        flat = {name: value.flatten() if isinstance(value, Tensor) else value for name, value in tokens.items()}
        if not torch.allclose(self._try(flat), cost.flatten(), rtol=1e-4):
            raise ValueError(f"{what} depends on how tokens are laid out. It must give the same costs for `logp` of any shape.")
        for i in range(cost.numel()):
            here = torch.arange(cost.numel()).view(shape) == i
            mixed = {
                name: torch.where(here, value, others[name]) if isinstance(value, Tensor) else value
                for name, value in tokens.items()
            }
            if not torch.allclose(self._try(mixed)[here], cost[here], rtol=1e-4):
                raise ValueError(
                    f"{what} makes the cost of one token depend on other tokens, so training would depend on how a batch is "
                    "cut into micro-batches and ranks. Compute each token's cost from its own statistics."
                )

    def _try(self, tokens: dict[str, Any]) -> Any:
        before = {name: value.detach().clone() for name, value in tokens.items() if isinstance(value, Tensor)}
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)  # an objective may draw at random for each token
                cost = self(**tokens)
        except Exception as error:
            raise ValueError(
                f"Objective {self.name!r} failed when tried on a few tokens: {type(error).__name__}: {error}"
            ) from error
        for name, value in before.items():
            if not torch.equal(tokens[name], value):
                raise ValueError(f"Objective {self.name!r} changes `{name}` in place, which others use too. Make a new tensor.")
        return cost


def _setting(key: str, value: Any) -> Any:
    return Schedule.parse(key, value) if Schedule.is_meant(value) else to_exponent(value)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Schedule) else value


def _bounded(what: str, value: Any, most: float, advice: str) -> Any:
    """Read a number from 0 to `most`, or a schedule of such."""
    setting = to_number(_setting(what, value))
    for end in (setting.start, setting.end) if isinstance(setting, Schedule) else (setting,):
        if not is_number(end) or not 0 <= end <= most:
            limits = "0 or above" if most == math.inf else f"between 0 and {most:g}"
            raise ValueError(f"`{what}` must be a number {limits}, or a schedule of such, got {value!r}. {advice}")
    return setting


def _floor(key: str, value: Any) -> Any:
    return _bounded(key, value, 1, "It is the smallest weight of a token on the NLL gradient, e.g. `floor: 0.1`.")


def _mix(key: str, spec: Any) -> tuple[tuple[Objective, Any], ...]:
    example = "Write `mix: {nll: 0.1}`, or with parameters `mix: [{name: power, alpha: 10, weight: 0.1}]`."
    if not isinstance(spec, (Mapping, list, tuple)) or not spec:
        raise ValueError(f"`mix` must be objectives with their weights, got {spec!r}. {example}")
    if isinstance(spec, Mapping):
        if "name" in spec or any(isinstance(weight, Mapping) and not Schedule.is_meant(weight) for weight in spec.values()):
            raise ValueError(f"`mix` with an objective's parameters must be a list, got {dict(spec)}. {example}")
        spec = [{"name": name, "weight": weight} for name, weight in spec.items()]
    for other in spec:
        if not isinstance(other, Mapping) or not {"name", "weight"} <= other.keys():
            near = "".join(nearest(key, ["weight"]) for key in other if key != "name") if isinstance(other, Mapping) else ""
            raise ValueError(f"Each of `mix` must have a `name` and a `weight`, got {other!r}.{near} {example}")
    return tuple(
        (
            _part(key, {name: value for name, value in other.items() if name != "weight"}, example),
            _bounded("weight", other["weight"], math.inf, f"It is that of {other['name']!r} in `mix`. {example}"),
        )
        for other in spec
    )


def _part(key: str, spec: Any, example: str = "") -> Objective:
    """Read an objective within another; `example` takes the place of what a message says to write for one on its own."""
    try:
        part = Objective.parse(spec)
    except ValueError as error:
        what, write, how = str(error).partition(" Write `objective: ")
        how = "" if not write else f" {example}" if example else f" Write `{key}: {how}"
        what = what.replace("`objective` must", "it must")
        raise ValueError(f"In `{key}` of the objective: {what}{how}") from error
    if part.special_tokens is not None:
        raise ValueError(f"`special_tokens` within `{key}` would mean nothing: write it once, beside `name`.")
    return part


def _import(path: str) -> Callable[..., Tensor]:
    module_name, _, attribute = path.partition(":")
    hint = "Write `objective: package.module:function`; the module must be importable from where you launch."
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"Can't import objective {path!r}: {type(error).__name__}: {error}. {hint}") from error
    try:
        function = attrgetter(attribute)(module)
    except AttributeError as error:
        raise ValueError(f"Module {module_name!r} has no {attribute!r}.{nearest(attribute, vars(module))} {hint}") from error
    if not callable(function):
        raise ValueError(f"Objective {path!r} is a {type(function).__name__}, not a function. {hint}")
    return function
