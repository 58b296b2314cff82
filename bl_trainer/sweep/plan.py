"""What a sweep is to run: the sweep file, read strictly, and the arms that it and a recipe make."""

import hashlib
import inspect
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, get_type_hints

import optuna
import yaml
from trl import ModelConfig

from .._util.text import nearest, sentence
from ..diagnosis.continuum import objective_name
from ..errors import RecipeError
from ..evaluation import EvaluateArguments
from ..evaluation.options import Checkpoint
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from ..recipe.keys import DATACLASSES
from ..recipe.local_files import is_path, local_files
from ..recipe.parser import kinds_of, load_yaml
from ..recipe.recipe import Recipe
from ..training.config import BLConfig
from .rulers import LOGGED, RULERS

OWN_KEYS = ("arms", "rank_by", "held_out", "probe", "evaluate", "sampler", "trials", "pruner")

# Keys that a sweep sets for each arm, or that would make its arms incomparable
TAKEN = ("output_dir", "resume_from_checkpoint", "push_to_hub", "hub_token", "env", "test_split_size")

# What a model is loaded by, and what its target tokens are made by
MODEL_KEYS = {*(f.name for f in fields(ModelConfig)), "model_init_kwargs", "bf16", "fp16", "use_cpu"}

DATA_KEYS = {
    "max_length", "truncation_mode", "dataset_text_field", "dataset_kwargs", "dataset_num_proc", "dataset_config",
    "completion_only_loss", "assistant_only_loss", "chat_template_path", "eos_token", "pad_token", "shuffle_dataset",
    "per_device_train_batch_size", "per_device_eval_batch_size", "dataloader_num_workers", "trust_remote_code",
    "pad_to_multiple_of", "remove_unused_columns", "disable_tqdm", "report_to",
}  # fmt: skip

# Keys whose values are numbers
NUMBERS = {key for each in (BLConfig, ModelConfig) for key, hint in get_type_hints(each).items() if float in kinds_of(hint)}

SEEDS, RATE_FACTORS = (0, 1, 2), (1 / 3, 1, 3)


@dataclass
class Plan:
    """The arms of a sweep.

    `base`: the recipe's keys. `grid`: key -> values, `arms` being one list of mappings. `ranges`: key -> keyword arguments of
    an Optuna distribution, for `trials` points that `sampler` draws; of each arm the best point is then run with all seeds.
    `files`: hashes of the local data and models. `launch`: how arms are launched, on which their global batch depends.
    """

    base: dict[str, Any]
    arms: list[dict[str, Any]]
    grid: dict[str, list[Any]]
    seeds: list[int]
    ranges: dict[str, dict[str, Any]] = field(default_factory=dict)
    trials: int | None = None
    rank_by: str = "accuracy"
    held_out: str | None = None
    probe: str | None = None
    evaluate: dict[str, Any] | None = None
    sampler: dict[str, Any] | None = None
    pruner: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    launch: str = ""

    @classmethod
    def read(cls, recipe: Recipe, path: str, folder: Path) -> "Plan":
        """Return the plan that a sweep file makes of a recipe, to be run in `folder`. Raises RecipeError."""
        given = load_yaml([path], what="sweep file")
        keys = [key for key in given if key not in OWN_KEYS]
        arms = [{key: _number(key, value) for key, value in arm.items()} for arm in _mappings(given.get("arms", [{}]))]
        for key in sorted({*keys, *itertools.chain(*arms)}):
            if key in TAKEN:
                raise RecipeError(f"`{key}` can't be swept: a sweep sets it for each arm, or needs it the same for all.")
        if any("seed" in arm for arm in arms):
            raise RecipeError("`seed` in an arm: all arms run at the same seeds. Write `seed: [0, 1, 2]` beside `arms`.")
        if recipe.given.get("test_split_size") is not None:
            raise RecipeError(
                "`test_split_size` splits by the seed, so that arms would hold out other rows. Split the data beforehand, and "
                "write `held_out: test.jsonl` in the sweep file."
            )
        base = {key: value for key, value in recipe.given.items() if key not in TAKEN}
        plan = cls(base, arms, {}, list(SEEDS))
        allowed = [*OWN_KEYS, *(f.name for each in DATACLASSES for f in fields(each))]
        for key in keys:
            if key not in allowed:
                near = nearest(str(key), allowed)
                raise RecipeError(
                    f"Unknown key {key!r} in the sweep file.{near} Allowed: {', '.join(OWN_KEYS)}, and recipe keys with a list."
                )
            value = given[key]
            plan._take(key, [_number(key, each) for each in value] if isinstance(value, list) else value)
        plan._fill(recipe)
        for key in OWN_KEYS[1:]:
            if key in given:
                setattr(plan, key, given[key])
        plan._check(recipe)
        names = [*recipe.local_files(), *local_files(plan.held_out), *local_files(plan.probe)]
        for point in plan.points():
            names += _named_files({**base, **point})
        names += [Path(part.partition("=")[2]) for part in _as_list((plan.evaluate or {}).get("data", []))]
        names = [name for name in names if folder.absolute() not in name.absolute().parents]
        plan.files = {str(name): hashlib.sha256(name.read_bytes()).hexdigest()[:16] for name in names}
        for model in {str(point.get("model_name_or_path", base["model_name_or_path"])) for point in plan.points()}:
            plan.files[model] = Checkpoint(model, model, None).fingerprint()
        return plan

    def _take(self, key: str, value: Any) -> None:
        if key == "seed" and not isinstance(value, list):
            raise RecipeError(f"`seed: {value}` must be a list of whole numbers. Write e.g. `seed: [0, 1, 2]`.")
        if isinstance(value, dict) and {"low", "high"} <= value.keys() <= {"low", "high", "log", "step"}:
            kind = optuna.distributions.IntDistribution if are_whole(value) else optuna.distributions.FloatDistribution
            try:
                if not isinstance(value.get("log", False), bool):
                    raise TypeError(f"`log: {value['log']}` must be true or false")
                kind(**value)
            except (TypeError, ValueError) as error:
                raise RecipeError(f"`{key}: {value}` is no range: {sentence(error)}") from error
            self.ranges[key] = value
        elif not isinstance(value, list):
            raise RecipeError(
                f"`{key}: {value}` must be a list of values to try, or a range such as {{low: 1.0e-6, high: 1.0e-4, log: true}}"
                f". Write `{key}: [{value}]`, or put it in the recipe."
            )
        elif not value:
            raise RecipeError(f"`{key}: []` is an empty list, which leaves no arm. Give values, or remove `{key}`.")
        elif key == "seed":
            self.seeds = value
        else:
            self.grid[key] = value

    def _fill(self, recipe: Recipe) -> None:
        """Sweep the learning rate and the seed where the file says nothing of them."""
        if "learning_rate" not in self.grid | self.ranges and not all("learning_rate" in arm for arm in self.arms):
            rate = recipe.training.learning_rate
            self.grid["learning_rate"] = [float(f"{rate * factor:.2g}") for factor in RATE_FACTORS]
            self.notes.append(f"Learning rates {self.grid['learning_rate']}: the sweep file gives none.")
        elif len(self.grid.get("learning_rate", [0, 0, 0])) < len(RATE_FACTORS):
            self.notes.append(
                "Fewer than three learning rates: objectives differ in the scale of their gradient, so that one rate compares "
                "unlike things."
            )
        if len(self.seeds) < len(SEEDS):
            self.notes.append("Fewer than three seeds: what training itself varies by is not, or badly, known.")

    def _check(self, recipe: Recipe) -> None:
        for key in ("rank_by", "held_out", "probe"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value):
                raise RecipeError(f"`{key}: {value}` must be a text.")
            if key != "rank_by" and value is not None and is_path(value) and not list(local_files(value)):
                raise RecipeError(f"`{key}: {value}`: there is no such file.")
        tasks = self._check_evaluate() if self.evaluate is not None else []
        if self.rank_by not in RULERS and str(self.rank_by).rpartition("/")[0] not in tasks:
            near = nearest(str(self.rank_by), RULERS)
            allowed = [*RULERS, *(f"{task}/METRIC" for task in tasks)]
            raise RecipeError(f"`rank_by: {self.rank_by}` is no ruler.{near} Allowed: {', '.join(allowed)}.")
        for key, module in (("sampler", optuna.samplers), ("pruner", optuna.pruners)):
            if getattr(self, key) is not None:
                _build(key, module, getattr(self, key))
        if self.pruner and (recipe.training.eval_strategy == "no" or self.rank_by not in LOGGED):
            raise RecipeError(
                f"`pruner` judges by evaluations during training. Write `rank_by` as one of {', '.join(LOGGED)}, and "
                "`eval_strategy: steps` in the recipe."
            )
        if bool(self.ranges) != (self.trials is not None):
            given, other = ("a range", "trials: 30") if self.ranges else ("`trials`", "learning_rate: {low: ..., high: ...}")
            raise RecipeError(f"The sweep file has {given}, but not how many or of what. Write `{other}`.")
        least = len(self.points())
        if self.trials is not None and (type(self.trials) is not int or self.trials < least):
            raise RecipeError(f"`trials: {self.trials}` must be a whole number, at least one for each of {least} arms.")
        if self.trials is not None and self.trials < 3 * least:
            self.notes.append("Fewer than three points for each arm: learning rates and the like are hardly searched.")
        if self.trials is not None and self.trials % least:
            self.notes.append(f"{self.trials} points for {least} arms in turn: some get one more than others.")
        if self.sampler and least > 1 and _name(self.sampler) not in ("TPESampler", "RandomSampler"):
            self.notes.append(f"{_name(self.sampler)} draws each range by itself, since every arm has ranges of its own.")
        if self.sampler and not self.ranges:
            raise RecipeError(
                "`sampler` does nothing without a range. Write a range, or remove `sampler`: a grid is run whole."
            )
        if not all(type(seed) is int and 0 <= seed < 2**32 for seed in self.seeds) or len({*self.seeds}) < len(self.seeds):
            raise RecipeError(f"`seed: {self.seeds}` must be a list of different whole numbers, from 0 and below {2**32}.")
        if self.base.get("datasets") and not self.held_out:
            raise RecipeError("A mixture has no test split of its own. Write `held_out: test.jsonl` in the sweep file.")
        seen: dict[str, dict[str, Any]] = {}
        for point in self.points():
            name = json.dumps(_plain(point), sort_keys=True)
            if name in seen:
                raise RecipeError(f"Two arms are the same: {describe(point)}. Remove one of them.")
            seen[name] = point
            check_arm(self.recipe_at(point))

    def _check_evaluate(self) -> list[str]:
        """Return the tasks that arms are evaluated on. Raises RecipeError on options that the evaluate verb would refuse."""
        options, own = self.evaluate, [f.name for f in fields(EvaluateArguments)]
        if not isinstance(options, dict):
            raise RecipeError(
                f"`evaluate: {options}` must be a mapping of options of the evaluate verb, e.g. {{tasks: [gsm8k]}}."
            )
        for key in options:
            if key not in own or key in ("model", "adapter", "output", "overwrite"):
                raise RecipeError(
                    f"`evaluate` has no option {key!r}.{nearest(str(key), own)} See `bl_trainer evaluate --help`."
                )
        argv = ["--model", str(self.base["model_name_or_path"]), "--output", "unused", *evaluate_argv(options)]
        read = EvaluateArguments.read(argv)
        read.check()
        return read.tasks

    def recipe_at(self, point: dict[str, Any]) -> dict[str, Any]:
        """Return the recipe of a point's first arm, the lower bounds in place of ranges."""
        return self.recipe_of({**point, "seed": self.seeds[0], **{key: value["low"] for key, value in self.ranges.items()}})

    def points(self) -> list[dict[str, Any]]:
        """Return the grid's points: each arm with each combination of the keys that it doesn't set, seeds and ranges apart."""
        points = []
        for arm in self.arms:
            free = [key for key in self.grid if key not in arm]
            combinations = itertools.product(*(self.grid[key] for key in free))
            points += [{**dict(zip(free, each, strict=True)), **arm} for each in combinations]
        return points

    def listed(self) -> list[dict[str, Any]]:
        """Return the settings of all arms of a grid, in order."""
        return [{**point, "seed": seed} for seed in self.seeds for point in self.points()]

    def values_of(self, key: str) -> list[Any]:
        """Return the values that a key has in any arm, each once."""
        values = self.seeds if key == "seed" else [point[key] for point in self.points() if key in point]
        return list({json.dumps(value): value for value in values}.values())

    @property
    def count(self) -> int:
        """Number of arms."""
        if self.trials:
            return self.trials + len(self.points()) * (len(self.seeds) - 1)
        return len(self.points()) * len(self.seeds)

    def recipe_of(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Return the recipe of an arm with these settings, which an `output_dir` makes complete.

        It goes on from its last checkpoint, and keeps no more than that unless the sweep's recipe says so.
        """
        return {"save_total_limit": 1, **self.base, **setting, "resume_from_checkpoint": True}

    def held_out_recipe(self, name: str, split: str) -> dict[str, Any]:
        """Return the recipe by which all arms are measured, but for their models: on a split of a data set, row by row."""
        own = {key: value for key, value in self.base.items() if key in MODEL_KEYS | DATA_KEYS}
        if self.held_out:
            own.pop("dataset_config", None)
        return {**own, "dataset_name": name, "dataset_train_split": split, "seed": 0}

    def group_of(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Return what is compared with one another: an arm's settings without seed, learning rate and ranges."""
        return {key: value for key, value in setting.items() if key not in ("seed", "learning_rate", *self.ranges)}

    def fingerprint(self) -> dict[str, str]:
        """Return a hash of each thing that decides what the arms are and how they are measured.

        The ruler alone is free to change, where no sampler or pruner goes by it.
        """
        parts: dict[str, Any] = {
            "recipe": self.base, "arms": self.arms, **self.grid, "seed": self.seeds, **self.ranges, "trials": self.trials,
            "held_out": self.held_out, "probe": self.probe, "evaluate": self.evaluate, "sampler": self.sampler,
            "pruner": self.pruner, "rank_by": self.rank_by if self.trials or self.pruner else None, **self.files,
            "launch": self.launch,
        }  # fmt: skip
        texts = {name: json.dumps(part, sort_keys=True, default=str) for name, part in parts.items()}
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def _mappings(arms: Any) -> list[dict[str, Any]]:
    are_mappings = isinstance(arms, list) and arms and all(isinstance(arm, dict) for arm in arms)
    if not are_mappings or not all(isinstance(key, str) for arm in arms for key in arm):
        raise RecipeError(f"`arms: {arms}` must be a list of mappings of recipe keys. Write `arms: [{{objective: nll}}, ...]`.")
    return arms


def _named_files(recipe: dict[str, Any]) -> list[Path]:
    """Return the local files on which a recipe's runs depend: data, templates, settings, and the code of its objective."""
    data = recipe.get("dataset_name")
    named = [Path(value) for value in recipe.values() if isinstance(value, str) and len(value) < 256 and Path(value).is_file()]
    return [*local_files(data and str(data)), *named, *_code_of(Objective.parse(recipe.get("objective") or "nll"))]


def _code_of(objective: Objective) -> Iterator[Path]:
    """Yield the files of the modules that an objective's functions are imported from."""
    module, colon, _ = objective.name.partition(":")
    file = getattr(sys.modules.get(module), "__file__", None) if colon else None
    if file:
        yield Path(file)
    for part in (*(each for each, _ in objective.mix), objective.special_tokens):
        if part is not None:
            yield from _code_of(part)


def are_whole(bounds: dict[str, Any]) -> bool:
    return all(isinstance(bounds[key], int) for key in ("low", "high"))


def _build(key: str, module: Any, spec: Any) -> Any:
    """Return Optuna's sampler or pruner that a name, or a mapping with `name` and its parameters, stands for."""
    if not isinstance(spec, (str, dict)):
        raise RecipeError(f"`{key}: {spec}` must be a name, or a mapping with `name` and its parameters.")
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(spec.pop("name", ""))
    kind = getattr(module, name, None)
    if name not in module.__all__ or kind is None:
        allowed = [each for each in module.__all__ if each.endswith(key.capitalize()) and not each.startswith("Base")]
        raise RecipeError(f"`{key}: {name}` is none of Optuna's.{nearest(name, allowed)} Allowed: {', '.join(allowed)}.")
    try:
        return kind(**spec)
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"`{key}: {name}` with {spec}: {sentence(error)}") from error


def evaluate_argv(options: dict[str, Any]) -> list[str]:
    """Return options of the evaluate verb as its command line."""
    argv = []
    for key, value in options.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *(str(each).lower() if isinstance(each, bool) else str(each) for each in values)]
    return argv


def sampler_of(plan: Plan, index: int = 0) -> optuna.samplers.BaseSampler:
    """Return the sampler of a plan's ranges for an arm."""
    given = plan.sampler or "TPESampler"
    spec: dict[str, Any] = {"name": given} if isinstance(given, str) else dict(given)
    kind = getattr(optuna.samplers, _name(given))
    if "seed" in inspect.signature(kind).parameters:
        spec["seed"] = spec.get("seed", 0) + 1000 * index
    return _build("sampler", optuna.samplers, spec)


def _name(spec: Any) -> str:
    return spec if isinstance(spec, str) else str(spec.get("name", ""))


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


def pruner_of(plan: Plan) -> optuna.pruners.BasePruner:
    """Return the pruner of a plan, which stops nothing unless the sweep file names one."""
    return _build("pruner", optuna.pruners, plan.pruner or "NopPruner")


def _plain(setting: dict[str, Any]) -> dict[str, Any]:
    """Return settings with objective and threshold written out, so that equal ones look alike."""
    parsed: dict[str, Any] = {"objective": Objective, "threshold": Threshold}
    try:
        return {key: parsed[key].parse(value).to_dict() if key in parsed else value for key, value in setting.items()}
    except ValueError as error:
        raise RecipeError(f"In the arm {setting}: {sentence(error)}") from error


def check_arm(recipe: dict[str, Any]) -> Recipe:
    """Return an arm's recipe as the train verb will read it. Raises RecipeError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(Path(folder) / "out"), **recipe}), encoding="utf-8")
        try:
            return Recipe.read(["--config", str(path)])
        except RecipeError as error:
            raise RecipeError(f"In an arm of the sweep: {error}") from error


def describe(setting: dict[str, Any]) -> str:
    """Return settings in a few words: `neg_p, p >= 0.2, learning_rate 2e-05, seed 1`."""
    parts = []
    if setting.get("objective") is not None or setting.get("threshold") is not None:
        objective = Objective.parse(setting.get("objective") or "nll").to_dict()
        parts.append(objective_name({"objective": objective, "threshold": Threshold.parse(setting.get("threshold")).to_dict()}))
    for key, value in setting.items():
        if key not in ("objective", "threshold"):
            parts.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(parts) or "the recipe as it is"
