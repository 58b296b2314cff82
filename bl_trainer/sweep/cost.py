"""What a sweep is going to run and cost, before it runs: its arms, their data, and their number of tokens."""

import json
import math
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from ..errors import RecipeError
from ..recipe.recipe import Recipe
from .checks import check_arm
from .design import Design, Setting, describe

COST_ROWS = 1000  # rows that the number of tokens is estimated from
COSTLESS = {"objective", "threshold", "learning_rate", "seed"}  # keys that an arm's number of tokens doesn't depend on


def check_data(design: Design) -> None:
    """Load all arms' data as they will. Raises RecipeError if data can't be had, or lack what an objective needs."""
    for point in {_text(design, point, COSTLESS - {"objective"}): point for point in design.points()}.values():
        try:
            check_arm(design.recipe_at(point)).load_datasets()
        except RecipeError as error:
            raise RecipeError(f"In the run {describe(point)}: {error}") from error


def dry_run(design: Design) -> str:
    """Return the arms, their number, and what they cost in tokens."""
    lines = [*design.notes, _counted(design), *(f"  {describe(point)}" for point in design.points()), _cost(design)]
    return "\n".join(lines)


def _counted(design: Design) -> str:
    points, seeds = len(design.points()), design.seeds
    if not design.trials:
        return f"{design.count} runs: {points} settings at seeds {', '.join(map(str, seeds))}:"
    then = f"; then the best of each, at seeds {', '.join(map(str, seeds[1:]))}" if seeds[1:] else ""
    return f"{design.trials} points drawn for {points} settings in turn, at seed {seeds[0]}{then}:"


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
    dataset, _ = recipe.load_datasets()
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


def _length(tokenizer: Any, row: dict[str, Any], text_field: str) -> int:
    messages = row.get("messages")  # into which `arrange` has turned every other layout of conversations
    if messages is None and isinstance(row.get("prompt"), list):
        messages = [*row["prompt"], *row["completion"]]
    if messages is not None:
        return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(tokenizer(row["prompt"] + row["completion"] if "prompt" in row else row[text_field])["input_ids"])
