"""What a sweep is to run: the sweep file, read strictly, and the arms that it and a recipe make."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import optuna

from .._util.text import nearest, sentence
from ..diagnosis.presets import RATE_FACTORS, SEEDS, SHARE
from ..errors import RecipeError
from ..evaluation.options import Checkpoint
from ..objectives.objective import Objective
from ..recipe.fields import recipe_fields
from ..recipe.local_files import local_files
from ..recipe.recipe import Recipe
from ..recipe.yaml_file import load_yaml
from .checks import check
from .design import Design, Setting, are_whole
from .samplers import name_of

OWN_KEYS = (
    "arms", "preset", "budget", "rank_by", "held_out", "probe", "retain", "max_drift", "evaluate", "sampler", "trials",
    "pruner",
)  # fmt: skip

# Keys that a sweep sets for each arm, or that would make its arms incomparable
TAKEN = ("output_dir", "resume_from_checkpoint", "push_to_hub", "hub_token", "env", "test_split_size")

# Keys whose values are numbers
NUMBERS = {key for key, field in recipe_fields().items() if float in field.kinds}

SEARCH = ("trials", "sampler", "pruner")
LEAST_SEEDS = 3  # that judge


@dataclass
class Plan(Design):
    """A sweep's design, read from its file.

    `files`: hashes of the local data and models. `launch`: how arms are launched, on which their global batch depends.
    """

    files: dict[str, str] = field(default_factory=dict)
    launch: str = ""

    @classmethod
    def read(cls, recipe: Recipe, path: str, folder: Path) -> "Plan":
        """Return the plan that a sweep file makes of a recipe, to be run in `folder`. Raises RecipeError."""
        given = load_yaml([path], what="sweep file")
        arms = [{key: _number(key, value) for key, value in arm.items()} for arm in _mappings(given.get("arms", [{}]))]
        _refuse_taken(recipe, given, arms)
        preset = _preset(given)
        base = {key: value for key, value in recipe.given.items() if key not in TAKEN}
        plan = cls(base, arms, {}, list(SEEDS[preset]), preset=preset, budget={"share": SHARE} if preset == "short" else {})
        for key, value in given.items():
            if key not in OWN_KEYS:
                _refuse_unknown(key)
                plan._take(key, [_number(key, each) for each in value] if isinstance(value, list) else value)
        plan._fill(recipe)
        for key in OWN_KEYS[2:]:
            if key in given:
                setattr(plan, key, given[key])
        check(plan, recipe)
        plan.notes += plan._doubts()
        plan.files = plan._hashes(recipe, folder)
        return plan

    def _take(self, key: str, value: Any) -> None:
        """Take a key of the recipe, with a list or a range."""
        if key == "seed" and not isinstance(value, list):
            raise RecipeError(f"`seed: {value}` must be a list of whole numbers. Write e.g. `seed: [0, 1, 2]`.")
        if isinstance(value, dict) and {"low", "high"} <= value.keys() <= {"low", "high", "log", "step"}:
            self.ranges[key] = _range(key, value)
        elif not isinstance(value, list):
            raise RecipeError(
                f"`{key}: {value}` must be a list of values to try, or a range such as {{low: 1.0e-6, high: 1.0e-4, log: true}}"
                f". Write `{key}: [{value}]`, or put it in the recipe."
            )
        elif not value:
            raise RecipeError(f"`{key}: []` is an empty list, which leaves no run. Give values, or remove `{key}`.")
        elif key == "seed":
            self.seeds = value
        else:
            self.grid[key] = value

    def _fill(self, recipe: Recipe) -> None:
        """Sweep the learning rate where the file says nothing of it; note too few rates or seeds."""
        if "learning_rate" not in self.grid | self.ranges and not all("learning_rate" in arm for arm in self.arms):
            rate = recipe.training.learning_rate
            self.grid["learning_rate"] = [float(f"{rate * factor:.2g}") for factor in RATE_FACTORS]
            self.notes.append(f"Learning rates {self.grid['learning_rate']}: the sweep file gives none.")
        elif len(self.grid.get("learning_rate", [0, 0, 0])) < len(RATE_FACTORS):
            self.notes.append(
                "Fewer than three learning rates: objectives differ in the scale of their gradient, so that one rate compares "
                "unlike things."
            )
        if len(self.judging_seeds) < LEAST_SEEDS:
            self.notes.append("Fewer than three seeds: too few to tell a difference between settings from chance.")

    def _doubts(self) -> Iterator[str]:
        """Yield what a search of ranges leaves to be desired."""
        arms = len(self.points())
        if self.trials is not None and self.trials < 3 * arms:
            yield "Fewer than three points for each setting: learning rates and the like are hardly searched."
        if self.trials is not None and self.trials % arms:
            yield f"{self.trials} points for {arms} settings in turn: some get one more than others."
        if self.sampler and arms > 1 and name_of(self.sampler) not in ("TPESampler", "RandomSampler"):
            yield f"{name_of(self.sampler)} draws each range by itself, since every setting has ranges of its own."

    def _hashes(self, recipe: Recipe, folder: Path) -> dict[str, str]:
        """Return hashes of the local files and models on which the arms depend, but for what is in `folder`."""
        names = [*recipe.local_files(), *local_files(self.held_out), *local_files(self.probe)]
        for point in self.points():
            names += _named_files({**self.base, **point})
        names += [Path(part.partition("=")[2]) for part in _as_list((self.evaluate or {}).get("data", []))]
        names = [name for name in names if folder.absolute() not in name.absolute().parents]
        models = [str(point.get("model_name_or_path", self.base["model_name_or_path"])) for point in self.points()]
        hashes = {str(name): hashlib.sha256(name.read_bytes()).hexdigest()[:16] for name in names}
        return {**hashes, **{model: Checkpoint(model, model, None).fingerprint() for model in {*models}}}

    def fingerprint(self) -> dict[str, str]:
        """Return a hash of each thing that decides what the arms are and how they are measured.

        The ruler alone is free to change, where no sampler or pruner goes by it.
        """
        parts: dict[str, Any] = {
            "recipe": self.base, "arms": self.arms, **self.grid, "seed": self.seeds, **self.ranges, "trials": self.trials,
            "held_out": self.held_out, "probe": self.probe, "evaluate": self.evaluate, "sampler": self.sampler,
            "pruner": self.pruner, "rank_by": self.rank_by if self.trials or self.pruner or self.is_staged else None,
            **self.files, "launch": self.launch,
        }  # fmt: skip
        if self.retain:
            parts["retain"] = self.retain
        if self.max_drift is not None and (self.trials or self.is_staged):
            parts["max_drift"] = self.max_drift
        if self.is_staged:  # of which a full grid knows nothing
            parts |= {"preset": self.preset, "budget": self.budget}
        texts = {name: json.dumps(part, sort_keys=True, default=str) for name, part in parts.items()}
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def _preset(given: dict[str, Any]) -> str:
    """Return the preset of a sweep file: `short`, unless it names another, or spells its runs out by seeds or a search."""
    preset = given.get("preset")
    if preset is None:
        ranges = [key for key, value in given.items() if isinstance(value, dict) and "low" in value]
        return "full" if ranges or given.keys() & {"seed", *SEARCH} else "short"
    if str(preset) not in SEEDS:
        near = nearest(str(preset), SEEDS)
        raise RecipeError(f"`preset: {preset}` is not a preset.{near} Allowed: {', '.join(SEEDS)}.")
    return str(preset)


def _mappings(arms: Any) -> list[Setting]:
    are_mappings = isinstance(arms, list) and arms and all(isinstance(arm, dict) for arm in arms)
    if not are_mappings or not all(isinstance(key, str) for arm in arms for key in arm):
        raise RecipeError(f"`arms: {arms}` must be a list of mappings of recipe keys. Write `arms: [{{objective: nll}}, ...]`.")
    return arms


def _refuse_taken(recipe: Recipe, given: Iterable[Any], arms: list[Setting]) -> None:
    """Raise RecipeError on keys that can't be swept."""
    for key in TAKEN:
        if key in given or any(key in arm for arm in arms):
            raise RecipeError(f"`{key}` can't be swept: a sweep sets it for each run, or needs it the same for all.")
    if any("seed" in arm for arm in arms):
        raise RecipeError("`seed` in an entry of `arms`: all runs have the same seeds. Write `seed: [0, 1, 2]` beside `arms`.")
    if recipe.given.get("test_split_size") is not None:
        raise RecipeError(
            "`test_split_size` splits by the seed, so that runs would hold out other rows. Split the data beforehand, and "
            "write `held_out: test.jsonl` in the sweep file."
        )


def _refuse_unknown(key: Any) -> None:
    allowed = [*OWN_KEYS, *recipe_fields()]
    if key not in allowed:
        near = nearest(str(key), allowed)
        raise RecipeError(
            f"Unknown key {key!r} in the sweep file.{near} Allowed: {', '.join(OWN_KEYS)}, and recipe keys with a list."
        )


def _range(key: str, value: dict[str, Any]) -> dict[str, Any]:
    """Return a range that Optuna takes. Raises RecipeError."""
    kind = optuna.distributions.IntDistribution if are_whole(value) else optuna.distributions.FloatDistribution
    try:
        if not isinstance(value.get("log", False), bool):
            raise TypeError(f"`log: {value['log']}` must be true or false")
        kind(**value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"`{key}: {value}` is no range: {sentence(error)}") from error
    return value


def _named_files(recipe: dict[str, Any]) -> list[Path]:
    """Return the local files on which a recipe's runs depend: data, templates, settings, and the code of its objective."""
    data = recipe.get("dataset_name")
    named = [Path(value) for value in recipe.values() if isinstance(value, str) and len(value) < 256 and Path(value).is_file()]
    return [*local_files(data and str(data)), *named, *_code_of(Objective.read(recipe.get("objective") or "nll"))]


def _code_of(objective: Objective) -> Iterator[Path]:
    """Yield the files of the modules that an objective's functions are imported from."""
    module, colon, _ = objective.name.partition(":")
    file = getattr(sys.modules.get(module), "__file__", None) if colon else None
    if file:
        yield Path(file)
    for part in (*(each for each, _ in objective.mix), objective.special_tokens):
        if part is not None:
            yield from _code_of(part)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _number(key: str, value: Any) -> Any:
    """Return a value as the recipe's reader takes it: a number that YAML takes for a text, such as 1e-5; a date as a text."""
    if isinstance(value, date):
        return str(value)
    if isinstance(value, str) and key in NUMBERS:
        try:
            return float(value)
        except ValueError:
            return value
    return value
