"""What a sweep's design must satisfy: one function per rule. Each raises RecipeError."""

import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from .._util.text import nearest
from ..errors import RecipeError
from ..evaluation import EvaluateArguments
from ..evaluation.exploration import FORMAT, at_temperature, names_of
from ..evaluation.task_files import metrics_of
from ..recipe.local_files import local_files
from ..recipe.paths import is_path
from ..recipe.recipe import Recipe
from .budget import check_budget
from .design import Design, Setting, describe, evaluate_argv
from .rulers import LOGGED, RULERS, with_best
from .samplers import MODULES, build

REFUSED = ("model", "adapter", "output", "overwrite", "quantization")  # options of the evaluate verb that a sweep sets itself


def check(design: Design, recipe: Recipe) -> None:
    """Check a design for a recipe, by every rule."""
    texts_are_texts(design)
    short_runs_are_a_grid(design)
    rank_is_measured(design)
    forgetting_is_measured(design)
    optuna_has_them(design)
    pruner_sees_the_ruler(design, recipe)
    ranges_go_with_trials(design)
    trials_are_enough(design)
    sampler_has_ranges(design)
    seeds_are_seeds(design)
    mixture_has_held_out(design)
    arms_can_train(design)


def texts_are_texts(design: Design) -> None:
    """`rank_by`, `held_out` and `probe` are texts, and the paths among them are there."""
    for key in ("rank_by", "held_out", "probe", "retain"):
        value = getattr(design, key)
        if value is not None and (not isinstance(value, str) or not value):
            raise RecipeError(f"`{key}: {value}` must be a text.")
        if key in ("held_out", "probe") and value is not None and is_path(value) and not list(local_files(value)):
            raise RecipeError(f"`{key}: {value}`: there is no such file.")


def short_runs_are_a_grid(design: Design) -> None:
    """`short` runs a grid within a budget, with a seed to choose by and others to judge by; only `short` has a budget."""
    if not design.is_staged:
        if design.budget:
            raise RecipeError("`budget` cuts the runs of `preset: short`. Remove it, or add `preset: short`.")
        return
    searching = [key for key in ("trials", "sampler", "pruner") if getattr(design, key) is not None]
    if design.ranges or searching:
        what = ", ".join([*design.ranges, *searching])
        raise RecipeError(f"`preset: short` runs a grid, not a search. Remove {what}, or write `preset: full`.")
    check_budget(design.budget)
    if len(design.seeds) < 2:
        raise RecipeError("`preset: short` needs a seed to choose by and others to judge by. Write `seed: [0, 1, 2, 3]`.")


def rank_is_measured(design: Design) -> None:
    """`evaluate` has options that the verb takes, and `rank_by` is one of our metrics or of those of its tasks.

    A metric's name may be followed by a group of items: `medical/accuracy:macro`.
    """
    _refuse_unmeasured(design, "rank_by", [*RULERS])


def _refuse_unmeasured(design: Design, key: str, ours: list[str]) -> None:
    """Raise RecipeError if a key names no metric of the tasks; `ours`: what it may name as well."""
    options, given = evaluated(design) if design.evaluate is not None else EvaluateArguments(), str(getattr(design, key))
    tasks, known = options.tasks, {task: _names(task, options) for task in options.tasks}
    task, slash, metric = given.rpartition("/")
    is_known = f"{task}/{metric.partition(':')[0]}" in known[task] if known.get(task) else task in tasks
    if given in ours or (slash and metric and is_known):
        return
    named = [*ours, *(name for names in known.values() for name in names)]
    allowed = [*named, *(f"{task}/METRIC" for task, names in known.items() if not names)]
    near = nearest(given, named)
    raise RecipeError(f"`{key}: {given}` is not a metric.{near} Allowed: {', '.join(allowed) or 'none, without `evaluate`'}.")


def _names(task: str, options: EvaluateArguments) -> list[str]:
    """Return the task's metrics by the names that `rank_by` gives them."""
    metrics = metrics_of(task)
    metrics = [*metrics, FORMAT] if metrics and options.format else metrics
    found = []
    for temperature, own in options.decodings():
        names = [*metrics, *(names_of(metrics, own.ks, own.samples) if metrics else [])]
        found += [at_temperature(name, temperature) for name in names]
    return [f"{task}/{name}" for name in with_best(dict.fromkeys(found, 0.0))]


def forgetting_is_measured(design: Design) -> None:
    """`max_drift` is a share, and it and `rank_by: forgetting` have something to measure by; `retain` is a task's metric."""
    limit = design.max_drift
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 0):
        raise RecipeError(f"`max_drift: {limit}` must be a number of at least 0, e.g. `max_drift: 0.05`.")
    if design.retain is not None:
        _refuse_unmeasured(design, "retain", [])
    key = "max_drift" if limit is not None else "rank_by: forgetting" if design.rank_by == "forgetting" else None
    if key and not (design.probe or design.retain):
        raise RecipeError(f"`{key}` needs what was known before. Write `probe: old.jsonl`, or `retain: TASK/METRIC`.")


def evaluated(design: Design) -> EvaluateArguments:
    """Return the options of the evaluate verb for each arm, with the tasks that arms are evaluated on."""
    options, own = design.evaluate, [f.name for f in fields(EvaluateArguments)]
    if not isinstance(options, dict):
        raise RecipeError(f"`evaluate: {options}` must be a mapping of options of the evaluate verb, e.g. {{tasks: [gsm8k]}}.")
    for key in options:
        if key not in own or key in REFUSED:
            near = nearest(str(key), own)
            raise RecipeError(f"`evaluate` has no option {key!r}.{near} See `bl-trainer evaluate --help`.")
    argv = ["--model", str(design.base["model_name_or_path"]), "--output", "unused", *evaluate_argv(options)]
    read = EvaluateArguments.read(argv)
    read.check()
    return read


def optuna_has_them(design: Design) -> None:
    """`sampler` and `pruner` are Optuna's, with parameters that these take."""
    for key in MODULES:
        if getattr(design, key) is not None:
            build(key, getattr(design, key))


def pruner_sees_the_ruler(design: Design, recipe: Recipe) -> None:
    """A pruner judges by what a run's own evaluations log."""
    if design.pruner and (recipe.training.eval_strategy == "no" or design.rank_by not in LOGGED):
        raise RecipeError(
            f"`pruner` judges by evaluations during training. Write `rank_by` as one of {', '.join(LOGGED)}, and "
            "`eval_strategy: steps` in the recipe."
        )


def ranges_go_with_trials(design: Design) -> None:
    """A range is drawn from `trials` times."""
    if bool(design.ranges) != (design.trials is not None):
        given, other = ("a range", "trials: 30") if design.ranges else ("`trials`", "learning_rate: {low: ..., high: ...}")
        raise RecipeError(f"The sweep file has {given}, but not how many or of what. Write `{other}`.")


def trials_are_enough(design: Design) -> None:
    """Each arm has a point at least."""
    least = len(design.points())
    if design.trials is not None and (type(design.trials) is not int or design.trials < least):
        raise RecipeError(f"`trials: {design.trials}` must be a whole number, at least one for each of {least} settings.")


def sampler_has_ranges(design: Design) -> None:
    """A sampler has something to draw from."""
    if design.sampler and not design.ranges:
        raise RecipeError("`sampler` does nothing without a range. Write a range, or remove `sampler`: a grid is run whole.")


def seeds_are_seeds(design: Design) -> None:
    """Seeds are different whole numbers that NumPy takes."""
    seeds = design.seeds
    if not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds) or len({*seeds}) < len(seeds):
        raise RecipeError(f"`seed: {seeds}` must be a list of different whole numbers, from 0 and below {2**32}.")


def mixture_has_held_out(design: Design) -> None:
    """A mixture of data sets comes with held-out data."""
    if design.base.get("datasets") and not design.held_out:
        raise RecipeError("A mixture has no test split of its own. Write `held_out: test.jsonl` in the sweep file.")


def arms_can_train(design: Design) -> None:
    """The train verb takes every arm's recipe, and no two of these are the same."""
    seen: set[str] = set()
    for point in design.points():
        training = check_arm(design.recipe_at(point), point).training
        written = {"objective": training.parsed_objective.to_dict(), "threshold": training.parsed_threshold.to_dict()}
        name = json.dumps({**point, **written}, sort_keys=True)  # objectives written out, so that equal ones look alike
        if name in seen:
            raise RecipeError(f"Two runs are the same: {describe(point)}. Remove one of them.")
        seen.add(name)


def check_arm(recipe: dict[str, Any], point: Setting | None = None) -> Recipe:
    """Return an arm's recipe as the train verb will read it; an error names its `point`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(Path(folder) / "out"), **recipe}), encoding="utf-8")
        try:
            return Recipe.read(["--config", str(path)])
        except RecipeError as error:
            which = f" ({yaml.safe_dump(point, default_flow_style=True, sort_keys=False, width=1000).strip()})" if point else ""
            raise RecipeError(f"In a run of the sweep{which}: {str(error).replace(str(path), 'its recipe')}") from error
