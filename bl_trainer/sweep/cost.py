"""What a sweep is going to run and cost, before it runs and while it does: its arms, tokens, hours and GPU-hours."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from ..diagnosis.presets import FINALISTS, SEEDS
from ..errors import RecipeError
from ..recipe.recipe import Recipe
from ..training.kept_rows import without_dropped
from .checks import check_arm
from .design import Design, Setting, describe
from .outcome import Result

COST_ROWS = 1000  # rows that the number of tokens is estimated from
COSTLESS = {"objective", "threshold", "learning_rate", "seed"}  # keys that an arm's number of tokens doesn't depend on


def check_data(design: Design) -> None:
    """Load all arms' data as they will. Raises RecipeError if data or scores can't be had, or lack what an arm needs."""
    for point in {_text(design, point, COSTLESS - {"objective"}): point for point in design.points()}.values():
        try:
            _training_rows(check_arm(design.recipe_at(point)))
        except RecipeError as error:
            raise RecipeError(f"In the run {describe(point)}: {error}") from error


@dataclass(frozen=True)
class Spent:
    """What runs have cost: `timed` of them took `seconds` and `gpu_seconds` in all, `counted` trained on `tokens` in all."""

    timed: int
    seconds: float
    gpu_seconds: float
    counted: int
    tokens: int

    @classmethod
    def of(cls, results: Iterable[Result]) -> "Spent":
        """Sum what finished runs say of their cost; one that a kill has broken off can't say how long it took."""
        results = list(results)
        timed = [(each.seconds, each.devices) for each in results if each.seconds is not None]
        tokens = [each.trained_tokens for each in results if each.trained_tokens is not None]
        seconds = sum(each for each, _ in timed)
        return cls(len(timed), seconds, sum(each * devices for each, devices in timed), len(tokens), sum(tokens))

    def seconds_left(self, runs: int, jobs: int) -> float:
        """Return how long some more runs take, `jobs` at a time."""
        return self.seconds / self.timed * math.ceil(runs / jobs)

    def scaled(self, runs: int) -> str:
        """Return what as many runs cost, by the average of these."""
        parts = [f"{self.tokens / self.counted * runs:,.0f} tokens"] if self.counted else []
        if self.timed:
            hours, gpu_hours = (each / self.timed * runs / 3600 for each in (self.seconds, self.gpu_seconds))
            parts += [f"{hours:.2g} hours", f"{gpu_hours:.2g} GPU-hours"]
        return ", ".join(parts)


def time_text(seconds: float) -> str:
    """Return a time as readers take it in: `about 12 min`."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def settle(design: Design) -> None:
    """Find out what share of a run a budget of tokens is. Raises RecipeError if tokens can't be counted beforehand."""
    if "tokens" in design.budget:
        tokens, _ = _tokens(check_arm(design.recipe_at(design.points()[0])))
        if not tokens:
            raise RecipeError("`budget: {tokens: ...}` can't be kept: streamed data have no length. Write `{steps: 200}`.")
        design.share = min(1.0, design.budget["tokens"] / tokens)


def dry_run(design: Design, results: Iterable[Result] = ()) -> str:
    """Return the arms, their number, and what they cost in tokens, and in hours if some have finished."""
    spent = Spent.of(results)
    lines = [*design.notes, counted(design), *(f"  {describe(point)}" for point in design.points()), _cost(design)]
    if spent.timed:
        lines.append(
            f"Expected of all {design.count} runs, by the {spent.timed} that have finished: {spent.scaled(design.count)}."
        )
    if design.is_staged:
        whole = replace(design, preset="full", budget={}, share=None, seeds=list(SEEDS["full"]), notes=[])
        lines.append(f"With `preset: full`: {whole.count} runs. {_cost(whole)}")
    return "\n".join(lines)


def counted(design: Design) -> str:
    """Return the number of runs, with their settings and seeds."""
    points, first, *others = len(design.points()), *map(str, design.seeds)
    if design.is_staged:
        length = ", ".join(f"{key} {value:g}" for key, value in design.budget.items())
        return (
            f"{design.count} runs of short length ({length}): {points} settings at seed {first}, then the best "
            f"{min(FINALISTS, design.groups)} of {design.groups} objectives at seeds {', '.join(others)}:"
        )
    if not design.trials:
        return f"{design.count} runs: {points} settings at seed{'s' if others else ''} {', '.join([first, *others])}:"
    then = f"; then the best of each, at seeds {', '.join(others)}" if others else ""
    return f"{design.trials} points drawn for {points} settings in turn, at seed {first}{then}:"


def _cost(design: Design) -> str:
    points = design.points()
    alike = {_text(design, point, COSTLESS): point for point in points}
    known = {text: _tokens(check_arm(design.recipe_at(point))) for text, point in alike.items()}
    costs = [known[_text(design, point, COSTLESS)] for point in points]
    if any(tokens is None for tokens, _ in costs):
        return "The data are streamed or can't be counted beforehand, so the cost isn't known."
    total = sum(tokens or 0 for tokens, _ in costs) * design.count // len(points)
    each = {f"about {tokens:,} tokens ({how})": None for tokens, how in costs}
    return f"Each trains on {' or '.join(each)}; all of them on about {total:,}."


def _text(design: Design, point: Setting, without: set[str]) -> str:
    """Return the recipe of a point without some keys, as JSON, by which points are told to be alike."""
    recipe = {key: value for key, value in design.recipe_at(point).items() if key not in without}
    return json.dumps(recipe, sort_keys=True, default=str)


def _tokens(recipe: Recipe) -> tuple[int | None, str]:
    """Return about how many tokens, prompts among them, a run passes over, from `COST_ROWS` rows; and how that was reckoned."""
    dataset = _training_rows(recipe)
    if not isinstance(dataset, Dataset):
        return None, ""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.model_name_or_path)
    sample = dataset.shuffle(seed=0).select(range(min(COST_ROWS, len(dataset))))
    limit = recipe.training.max_length or math.inf
    length = sum(min(limit, _length(tokenizer, row, recipe.training.dataset_text_field)) for row in sample) / len(sample)
    training = recipe.training
    rows = len(dataset) * training.num_train_epochs
    if training.max_steps > 0:
        rows = training.max_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
        how = f"{training.max_steps} steps of {rows // training.max_steps} rows for each process"
    else:
        how = f"{training.num_train_epochs:g} epoch(s) of {len(dataset)} rows"
    return int(rows * length), f"{how}, of {length:.0f} tokens on average"


def _training_rows(recipe: Recipe) -> Any:
    """Return the training set that a run has."""
    dataset, _ = recipe.load_datasets()
    return without_dropped(dataset, recipe.training)


def _length(tokenizer: Any, row: dict[str, Any], text_field: str) -> int:
    messages = row.get("messages")  # into which `arrange` has turned every other layout of conversations
    if messages is None and isinstance(row.get("prompt"), list):
        messages = [*row["prompt"], *row["completion"]]
    if messages is not None:
        return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(tokenizer(row["prompt"] + row["completion"] if "prompt" in row else row[text_field])["input_ids"])
