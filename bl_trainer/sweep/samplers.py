"""Optuna's samplers and pruners: built of what a sweep file names, and one sampler for each run."""

import inspect
import json
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial

from .._util.text import nearest, sentence
from ..errors import RecipeError
from .design import Design

MODULES = {"sampler": optuna.samplers, "pruner": optuna.pruners}  # by the sweep file's keys


def build(key: str, spec: Any) -> Any:
    """Return the sampler or pruner of this name, or of a mapping with `name` and its parameters.

    Raises RecipeError.
    """
    if not isinstance(spec, (str, dict)):
        raise RecipeError(f"`{key}: {spec}` must be a name, or a mapping with `name` and its parameters.")
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    name, module = str(spec.pop("name", "")), MODULES[key]
    kind = getattr(module, name, None)
    if name not in module.__all__ or kind is None:
        allowed = [each for each in module.__all__ if each.endswith(key.capitalize()) and not each.startswith("Base")]
        raise RecipeError(f"`{key}: {name}` is none of Optuna's.{nearest(name, allowed)} Allowed: {', '.join(allowed)}.")
    try:
        return kind(**spec)
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"`{key}: {name}` with {spec}: {sentence(error)}") from error


def name_of(spec: Any) -> str:
    """Return the name in the spec of a sampler or pruner."""
    return spec if isinstance(spec, str) else str(spec.get("name", ""))


def sampler_of(design: Design, index: int = 0) -> optuna.samplers.BaseSampler:
    """Return the sampler of the ranges for an arm."""
    given = design.sampler or "TPESampler"
    spec: dict[str, Any] = {"name": given} if isinstance(given, str) else dict(given)
    kind = getattr(optuna.samplers, name_of(given))
    if "seed" in inspect.signature(kind).parameters:
        spec["seed"] = spec.get("seed", 0) + 1000 * index
    return build("sampler", spec)


def pruner_of(design: Design) -> optuna.pruners.BasePruner:
    """Return the pruner, which stops nothing unless the sweep file names one."""
    return build("pruner", design.pruner or "NopPruner")


class ArmSampler(optuna.samplers.BaseSampler):
    """Gives the settings of an arm as they are, and lets a sampler of the arm's own draw the rest.

    Seeded by the arm, so that workers and restarts draw different points, and the same ones for the same arm and history.
    """

    def __init__(self, design: Design, index_of: Callable[[FrozenTrial], int]):
        self.design, self.index_of = design, index_of
        self.fixed: dict[int, dict[str, Any]] = {}  # by number of the trial
        self.inner: dict[int, optuna.samplers.BaseSampler] = {}

    def _own(self, trial: FrozenTrial) -> optuna.samplers.BaseSampler:
        if trial.number not in self.inner:
            self.inner[trial.number] = sampler_of(self.design, self.index_of(trial))
        return self.inner[trial.number]

    def infer_relative_search_space(self, study, trial):
        space = self._own(trial).infer_relative_search_space(study, trial)
        return {name: each for name, each in space.items() if not isinstance(each, CategoricalDistribution)}

    def sample_relative(self, study, trial, search_space):
        return self._own(trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution):
        fixed = self.fixed.get(trial.number, {})
        if isinstance(param_distribution, CategoricalDistribution) and param_name in fixed:
            return json.dumps(fixed[param_name])
        return self._own(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study, trial):
        self._own(trial).before_trial(study, trial)

    def after_trial(self, study, trial, state, values):
        self._own(trial).after_trial(study, trial, state, values)
