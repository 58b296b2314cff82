"""The sweep verb: reads recipe and sweep file, runs what is left of the arms, and writes the leaderboard."""

import json
import math
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from .._util.process import is_launched
from .._util.text import sentence
from ..errors import RecipeError
from ..recipe.datasets import load_dataset
from ..recipe.local_files import find_fault, is_empty, local_files
from ..recipe.recipe import Recipe
from .arm import Runner, arm_folder, evaluate_base, read_result
from .leaderboard import judge
from .page import summary, write_leaderboard
from .plan import Plan, check_arm, describe
from .study import REASON, SETTING, ArmError, Study, sign

COST_ROWS = 1000  # rows that the number of tokens is estimated from
COSTLESS = {"objective", "threshold", "learning_rate", "seed"}  # keys that an arm's number of tokens doesn't depend on


@dataclass
class SweepArguments:
    """Options of the sweep verb."""

    sweep: str | None = field(default=None, metadata={"help": "The sweep file."})
    sweep_dir: str | None = field(default=None, metadata={"help": "Folder of the sweep; output_dir-sweep unless told."})
    jobs: int = field(default=1, metadata={"help": "Arms to run at the same time; the GPUs are shared out among them."})
    launch: str | None = field(
        default=None, metadata={"help": "Options of `accelerate launch` for each arm, in quotes, e.g. '--num_processes 2'."}
    )
    storage: str | None = field(
        default=None,
        metadata={
            "help": "URL of a database for the study, that workers on several machines share; a journal file unless told."
        },
    )
    retry_failed: bool = field(default=False, metadata={"help": "Run the arms again that failed."})
    dry_run: bool = field(default=False, metadata={"help": "Show the arms and what they cost, and run none."})


def sweep(argv: list[str]) -> None:
    """Run the sweep that `argv` names: `--config recipe.yaml --sweep sweep.yaml`. Raises RecipeError."""
    argv = _with_launch(argv)
    recipe = Recipe.read(argv, "sweep", SweepArguments)
    options: SweepArguments = recipe.options
    if not options.sweep:
        raise RecipeError("`--sweep` is missing: the sweep file. Write `--sweep sweep.yaml`; diagnosis writes one.")
    if is_launched():
        raise RecipeError("A sweep launches its arms itself. Start it with `python`, not with `accelerate launch`.")
    if options.jobs < 1:
        raise RecipeError(f"`--jobs {options.jobs}` must be at least 1.")
    if recipe.training.push_to_hub:
        raise RecipeError("`push_to_hub: true` would push every arm. Remove it, and push the winner.")
    try:
        shlex.split(options.launch or "")
    except ValueError as error:
        raise RecipeError(f"Cannot read `--launch {options.launch}`: {sentence(error)}. Close the quotation.") from error
    folder = Path(options.sweep_dir or f"{recipe.training.output_dir}-sweep")
    if next(path for path in (folder, *folder.parents) if path.exists()).is_file():
        raise RecipeError(f"Cannot write to `--sweep_dir {folder}`: it is a file, or in one. Choose another folder.")
    plan = Plan.read(recipe, options.sweep, folder)
    devices = device_shares(options.jobs, recipe.training.use_cpu)
    plan.launch = f"{options.launch or ''} {[share.count(',') + 1 for share in devices] if devices else 'cpu'}".strip()
    held_out = held_out_recipe(plan, recipe)
    check_data(plan)
    if options.dry_run:
        if folder.is_dir():
            sign(plan, folder, write=False)
        print(dry_run(plan) + f"\nThey go to {folder}/arms.")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"Cannot write to `--sweep_dir {folder}`: {error.strerror}. Choose another folder.") from error
    study = Study(plan, folder, options.storage)
    for note in plan.notes:
        print(note)
    if plan.evaluate:
        print("Evaluating the base model.")
        evaluate_base(plan, folder)  # before any arm, so that what is wrong with tasks shows now
    with Progress(plan, folder) as progress:
        runner = Runner(plan, folder, options.launch, devices, options.jobs, progress.tell, held_out)

        def run_arm(index: int, setting: dict[str, Any], trial: Any, job: int) -> float:
            progress.begin(index, setting)
            try:
                value = runner(index, setting, trial, job)
            except (ArmError, optuna.TrialPruned) as error:
                progress.end(index, str(error) or trial.user_attrs[REASON])
                raise
            result = read_result(arm_folder(folder, index)) or {}
            progress.end(index, ", ".join(f"{name} {value:.4g}" for name, value in result["rulers"].items()))
            return value

        try:
            study.run(run_arm, options.jobs, options.retry_failed)
        finally:
            runner.close()
    board = judge(plan, folder, failures(study))
    write_leaderboard(board, folder, command=shlex.join(["accelerate", "launch", *shlex.split(options.launch or "")]))
    print(summary(board, folder))


def _with_launch(argv: list[str]) -> list[str]:
    """Return `argv` with `--launch` and what follows it in one, since that begins with dashes as an option of its own does."""
    if "--launch" not in argv[:-1]:
        return argv
    index = argv.index("--launch")
    return [*argv[:index], f"--launch={argv[index + 1]}", *argv[index + 2 :]]


def failures(study: Study) -> dict[int, tuple[dict[str, Any], str]]:
    """Return arm -> (settings, reason) of the arms that failed, were pruned, or whose results are gone."""
    found = {}
    for index, trials in study.by_arm().items():
        last = trials[-1].user_attrs
        if read_result(arm_folder(study.folder, index)) is None:
            gone = f"its results are gone from {arm_folder(study.folder, index)}: is the folder shared by all workers?"
            found[index] = (last.get(SETTING, {}), last.get(REASON) or gone)
    return found


def held_out_recipe(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """Return the recipe that arms are measured by. Raises RecipeError if there are no data to hold out."""
    name, script = plan.held_out or recipe.script.dataset_name, recipe.script
    split = script.dataset_test_split
    try:
        loaded = load_dataset(type(script)(dataset_name=name, dataset_config=None if plan.held_out else script.dataset_config))
    except Exception as error:  # the libraries raise many kinds for a broken file, and seldom name it
        files = list(local_files(name))
        fault = find_fault(files) or next((f"{file}: it has no rows" for file in files if is_empty(file)), None)
        raise RecipeError(f"Cannot load the held-out data {name}: {fault or sentence(error)}.") from error
    if split not in loaded and plan.held_out and len(loaded) == 1:
        (split,) = loaded
    if split not in loaded:
        raise RecipeError(
            f"{name} has no split {split!r} to hold out, only {', '.join(map(repr, loaded))}. Write `dataset_test_split: ...` "
            "in the recipe, or `held_out: test.jsonl` in the sweep file."
        )
    recipe.arranged(split, loaded[split])
    made = plan.held_out_recipe(str(name), split)
    check_arm(made)
    return made


def check_data(plan: Plan) -> None:
    """Load all arms' data as they will. Raises RecipeError if data can't be had, or lack what an objective needs."""
    for point in {_text(plan, point, COSTLESS - {"objective"}): point for point in plan.points()}.values():
        try:
            check_arm(plan.recipe_at(point)).load_datasets()
        except RecipeError as error:
            raise RecipeError(f"In the arm {describe(point)}: {error}") from error


def dry_run(plan: Plan) -> str:
    """Return the arms, their number, and what they cost in tokens."""
    points, seeds = plan.points(), plan.seeds
    lines = [*plan.notes]
    if plan.trials:
        then = f"; then the best of each, at seeds {', '.join(map(str, seeds[1:]))}" if seeds[1:] else ""
        lines.append(f"{plan.trials} points drawn for {len(points)} settings in turn, at seed {seeds[0]}{then}:")
    else:
        lines.append(f"{plan.count} arms: {len(points)} settings at seeds {', '.join(map(str, seeds))}:")
    lines += [f"  {describe(point)}" for point in points]
    alike = {_text(plan, point, COSTLESS): point for point in points}
    known = {text: _tokens(check_arm(plan.recipe_at(point))) for text, point in alike.items()}
    costs = [known[_text(plan, point, COSTLESS)] for point in points]
    if any(tokens is None for tokens, _ in costs):
        lines.append("The data are streamed or can't be counted beforehand, so the cost isn't known.")
        return "\n".join(lines)
    total = sum(tokens or 0 for tokens, _ in costs) * plan.count // len(points)
    each = {f"about {tokens:,} tokens ({how})": None for tokens, how in costs}
    lines.append(f"Each trains on {' or '.join(each)}; all of them on about {total:,}.")
    return "\n".join(lines)


def _text(plan: Plan, point: dict[str, Any], without: set[str]) -> str:
    """Return the recipe of a point without some keys, as JSON, by which points are told to be alike."""
    recipe = {key: value for key, value in plan.recipe_at(point).items() if key not in without}
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
    messages = row.get("messages") or row.get("conversations")
    if messages is None and isinstance(row.get("prompt"), list):
        messages = [*row["prompt"], *row["completion"]]
    if messages is not None:
        return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(tokenizer(row["prompt"] + row["completion"] if "prompt" in row else row[text_field])["input_ids"])


def device_shares(jobs: int, use_cpu: bool) -> list[str] | None:
    """Return each job's share of the GPUs. Raises RecipeError if there are fewer than jobs."""
    if use_cpu or not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if jobs > len(names):
        raise RecipeError(f"`--jobs {jobs}`: there are {len(names)} GPUs. Write at most so many jobs.")
    size = len(names) // jobs
    if len(names) % jobs:
        print(f"{len(names) % jobs} of {len(names)} GPUs stay idle: they can't be shared out evenly among {jobs} jobs.")
    return [",".join(names[i * size : (i + 1) * size]) for i in range(jobs)]


class Progress:
    """Shows how far the sweep is: a bar, beside it what each arm does, and a line for each arm that is done."""

    def __init__(self, plan: Plan, folder: Path):
        self.now: dict[int, str] = {}
        self.done = sum(read_result(arm_folder(folder, index)) is not None for index in range(plan.count))
        self.count = plan.count
        self.bar = tqdm(total=plan.count, initial=self.done, desc="Arms", disable=not sys.stderr.isatty())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *args: Any) -> None:
        self.bar.close()

    def begin(self, index: int, setting: dict[str, Any]) -> None:
        """An arm begins."""
        self.tell(index, "starts")
        tqdm.write(f"arm {index:03d} ({describe(setting)})")

    def tell(self, index: int, what: str) -> None:
        """An arm does something else."""
        self.now[index] = what
        self.bar.set_postfix_str("; ".join(f"{i:03d} {each}" for i, each in sorted(self.now.items())))

    def end(self, index: int, how: str) -> None:
        """An arm ends, whichever way."""
        self.now.pop(index, None)
        self.done += 1
        tqdm.write(f"arm {index:03d}, {self.done} of {self.count}: {how}")
        self.bar.update()
