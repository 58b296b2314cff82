"""The design of a sweep: which settings its runs have, in which order, and the recipes that these make."""

import itertools
import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from trl import ModelConfig

from ..diagnosis.continuum import objective_name
from ..diagnosis.presets import FINALISTS, count_runs
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from .budget import shortened, shortened_to

# What a model is loaded by, and what its target tokens are made by
MODEL_KEYS = {*(f.name for f in fields(ModelConfig)), "model_init_kwargs", "bf16", "fp16", "use_cpu"}

# What decides the base model's own metrics
BASE_KEYS = (
    "model_name_or_path", "model_revision", "model_init_kwargs", "dtype", "bf16", "fp16", "load_in_4bit", "load_in_8bit",
    "bnb_4bit_quant_type", "use_bnb_nested_quant",
)  # fmt: skip

DATA_KEYS = {
    "max_length", "truncation_mode", "dataset_text_field", "dataset_kwargs", "dataset_num_proc", "dataset_config",
    "completion_only_loss", "assistant_only_loss", "chat_template_path", "eos_token", "pad_token", "shuffle_dataset",
    "per_device_train_batch_size", "per_device_eval_batch_size", "dataloader_num_workers", "trust_remote_code",
    "pad_to_multiple_of", "remove_unused_columns", "disable_tqdm", "report_to",
}  # fmt: skip

LOSS_KEYS = ("objective", "threshold")  # what a loss is made of: an arm that has one inherits the other

MAX_DRIFT = 0.05  # of accuracy, or of a task's metric, that the best setting may have lost

Setting = dict[str, Any]  # the recipe keys that a run has of its own


@dataclass
class Design:
    """What a sweep varies, and what it goes by.

    `base`: the recipe's keys. `grid`: key -> values, `arms` being one list of mappings. `ranges`: key -> keyword arguments of
    an Optuna distribution, for `trials` points that `sampler` draws; of each arm the best point is then run with all seeds.
    `preset`: `full` runs the grid at each seed. `short` cuts runs to `budget`, runs the grid at the first seed, and then the
    best `FINALISTS` groups, each at its best setting, at the other seeds. `share`: what a budget of tokens comes to.
    `retain`: a metric of tasks that the base model is good at; `max_drift`: how much a setting may lose of it, or of accuracy
    on `probe`. `notes`: what the user is to know of it.
    """

    base: dict[str, Any]
    arms: list[Setting]
    grid: dict[str, list[Any]]
    seeds: list[int]
    ranges: dict[str, dict[str, Any]] = field(default_factory=dict)
    trials: int | None = None
    rank_by: str = "accuracy"
    held_out: str | None = None
    probe: str | None = None
    retain: str | None = None
    max_drift: float | None = None
    evaluate: dict[str, Any] | None = None
    sampler: Any = None
    pruner: Any = None
    preset: str = "full"
    budget: dict[str, Any] = field(default_factory=dict)
    share: float | None = None
    notes: list[str] = field(default_factory=list)

    def points(self) -> list[Setting]:
        """Return the grid's points: each arm with each combination of the keys that it doesn't set, seeds and ranges apart.

        One that sets an objective or a threshold has the recipe's other one too, since it trains with both.
        """
        points: list[Setting] = []
        inherited = {key: self.base[key] for key in LOSS_KEYS if self.base.get(key) is not None}
        for arm in self.arms:
            free = [key for key in self.grid if key not in arm]
            combinations = itertools.product(*(self.grid[key] for key in free))
            points += [{**dict(zip(free, each, strict=True)), **arm} for each in combinations]
        return [{**inherited, **point} if point.keys() & {*LOSS_KEYS} else point for point in points]

    def listed(self) -> list[Setting]:
        """Return the settings of all arms of a grid, in order."""
        return [{**point, "seed": seed} for seed in self.seeds for point in self.points()]

    def values_of(self, key: str) -> list[Any]:
        """Return the values that a key has in any arm, each once."""
        values = self.seeds if key == "seed" else [point[key] for point in self.points() if key in point]
        return list({json.dumps(value): value for value in values}.values())

    def bases(self) -> list[Setting]:
        """Return the keys that decide the base model's own metrics, each combination that runs have once."""
        starts = [{key: {**self.base, **point}.get(key) or None for key in BASE_KEYS} for point in self.points()]
        return list({json.dumps(each): each for each in starts}.values())

    @property
    def is_staged(self) -> bool:
        """Whether a first stage chooses what a second one compares."""
        return self.preset == "short"

    @property
    def limit(self) -> float:
        """How much forgetting a setting is allowed: `MAX_DRIFT` unless the sweep file says it; all if it isn't measured."""
        if not (self.probe or self.retain):
            return math.inf
        return MAX_DRIFT if self.max_drift is None else self.max_drift

    def excess(self, forgetting: float | None) -> float:
        """Return what of forgetting counts against a setting: nothing within the limit, all of it above."""
        return forgetting if forgetting is not None and forgetting > self.limit else 0.0

    @property
    def judging_seeds(self) -> list[int]:
        """The seeds by which the leaderboard judges."""
        return self.seeds[1:] if self.is_staged else self.seeds

    @property
    def count(self) -> int:
        """Number of arms."""
        if self.trials:
            return self.trials + len(self.points()) * (len(self.seeds) - 1)
        return count_runs(self.preset, len(self.points()), self.groups, len(self.seeds))

    @property
    def first_stage(self) -> int:
        """Number of arms whose settings don't depend on results: they come first."""
        return self.trials or (len(self.points()) if self.is_staged else self.count)

    @property
    def groups(self) -> int:
        """Number of groups; the arms of one differ in seed, learning rate and ranges alone."""
        return len({json.dumps(self.group_of(point), sort_keys=True) for point in self.points()})

    def finalist_at(self, index: int) -> tuple[int, int]:
        """Return the place among the finalists of an arm of the second stage, and its seed."""
        again, finalists = index - self.first_stage, min(FINALISTS, self.groups)
        return again % finalists, self.seeds[1 + again // finalists]

    def drawn_at(self, index: int) -> tuple[int, int | None]:
        """Return the place among the points of an arm of a search, and its seed if it is to repeat the best one; else None."""
        again, count = index - (self.trials or 0), len(self.points())
        return (index % count, None) if again < 0 else (again % count, self.seeds[1 + again // count])

    def recipe_of(self, setting: Setting) -> dict[str, Any]:
        """Return the recipe of an arm with these settings, which an `output_dir` makes complete.

        It resumes from its last checkpoint, and keeps no more than that unless the sweep's recipe says so. Raises RecipeError
        if it can't be cut to the budget.
        """
        recipe = {"save_total_limit": 1, **self.base, **setting, "resume_from_checkpoint": True}
        return {**recipe, **self._cut(recipe)}

    def _cut(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Return the keys that cut a recipe to the budget; none before it is known what a budget of tokens comes to."""
        if "steps" in self.budget:
            return shortened_to(recipe, int(self.budget["steps"]))
        return shortened(recipe, self.budget.get("share", self.share or 1.0))

    def recipe_at(self, point: Setting) -> dict[str, Any]:
        """Return the recipe of a point's first arm, the lower bounds in place of ranges."""
        return self.recipe_of({**point, "seed": self.seeds[0], **{key: value["low"] for key, value in self.ranges.items()}})

    def held_out_recipe(self, name: str, split: str) -> dict[str, Any]:
        """Return the recipe by which all arms are measured, but for their models: on a split of a data set, row by row."""
        own = {key: value for key, value in self.base.items() if key in MODEL_KEYS | DATA_KEYS}
        if self.held_out:
            own.pop("dataset_config", None)
        return {**own, "dataset_name": name, "dataset_train_split": split, "seed": 0}

    def group_of(self, setting: Setting) -> Setting:
        """Return what is compared with one another: an arm's settings without seed, learning rate and ranges."""
        return {key: value for key, value in setting.items() if key not in ("seed", "learning_rate", *self.ranges)}


def describe(setting: Setting) -> str:
    """Return settings in a few words: `neg_p, p >= 0.2, learning_rate 2e-05, seed 1`."""
    parts = []
    if setting.get("objective") is not None or setting.get("threshold") is not None:
        objective = Objective.read(setting.get("objective") or "nll").to_dict()
        parts.append(objective_name({"objective": objective, "threshold": Threshold.parse(setting.get("threshold")).to_dict()}))
    for key, value in setting.items():
        if key not in ("objective", "threshold"):
            parts.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(parts) or "the recipe as it is"


def evaluate_argv(options: dict[str, Any]) -> list[str]:
    """Return options of the evaluate verb as its command line."""
    argv = []
    for key, value in options.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *(str(each).lower() if isinstance(each, bool) else str(each) for each in values)]
    return argv


def are_whole(bounds: dict[str, Any]) -> bool:
    """Whether a range is one of whole numbers."""
    return all(isinstance(bounds[key], int) for key in ("low", "high"))
