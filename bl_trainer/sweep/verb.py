"""The sweep verb: reads recipe and sweep file, runs what is left of the arms, and writes the leaderboard."""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch

from .._util.process import is_launched
from .._util.text import sentence
from ..errors import RecipeError
from ..recipe.datasets import load_dataset
from ..recipe.local_files import find_fault, is_empty, local_files
from ..recipe.recipe import Recipe
from .arm import Runner, evaluate_base
from .checks import check_arm
from .cost import check_data, counted, dry_run, settle
from .design import Setting
from .leaderboard import Failed, judge
from .outcome import Result, arm_folder, finished
from .page import summary, write_leaderboard
from .plan import Plan
from .process import starter
from .progress import Progress
from .rulers import show
from .signature import sign
from .study import REASON, SETTING, ArmError, Study

EVALUATES = ["bl_trainer.evaluation.harness"]  # what to import beforehand of runs that are evaluated


@dataclass
class SweepArguments:
    """Options of the sweep verb."""

    sweep: str | None = field(default=None, metadata={"help": "The sweep file."})
    sweep_dir: str | None = field(default=None, metadata={"help": "Folder of the sweep; by default output_dir-sweep."})
    jobs: int = field(default=1, metadata={"help": "Number of runs at the same time; they share the GPUs."})
    launch: str | None = field(
        default=None, metadata={"help": "Options of `accelerate launch` for each run, in quotes, e.g. '--num_processes 2'."}
    )
    storage: str | None = field(
        default=None,
        metadata={
            "help": "URL of a database for the study, which workers on several machines share; by default a journal file."
        },
    )
    retry_failed: bool = field(default=False, metadata={"help": "Repeat the runs that failed."})
    dry_run: bool = field(default=False, metadata={"help": "Show the runs and their cost, and start none."})


def sweep(argv: list[str]) -> None:
    """Run the sweep that `argv` names: `--config recipe.yaml --sweep sweep.yaml`. Raises RecipeError."""
    recipe = Recipe.read(argv, "sweep", SweepArguments)
    options: SweepArguments = recipe.options
    _check(options, recipe)
    folder = _folder(options, recipe)
    plan = Plan.read(recipe, str(options.sweep), folder)
    devices = device_shares(options.jobs, recipe.training.use_cpu)
    plan.launch = f"{options.launch or ''} {[share.count(',') + 1 for share in devices] if devices else 'cpu'}".strip()
    held_out = held_out_recipe(plan, recipe)
    check_data(plan)
    settle(plan)
    if options.dry_run:
        if folder.is_dir():
            sign(plan, folder, write=False)
        print(dry_run(plan, finished(plan.count, folder, Result).values()) + f"\nThey go to {folder}/arms.")
        return
    _make(folder)
    study = Study(plan, folder, options.storage)
    for note in (*plan.notes, counted(plan).rstrip(":") + "."):
        print(note)
    start = starter(folder, devices is not None, EVALUATES if plan.evaluate else [])
    if plan.evaluate:
        print("Evaluating the base model.")
        evaluate_base(plan, folder, start)  # before any arm, so that what is wrong with tasks shows now
    _run(study, options, Runner(plan, folder, options.launch, devices, options.jobs, held_out, start))
    board = judge(plan, folder, failures(study))
    write_leaderboard(board, folder, command=shlex.join(["accelerate", "launch", *shlex.split(options.launch or "")]))
    print(summary(board, folder))


def _check(options: SweepArguments, recipe: Recipe) -> None:
    """Raise RecipeError on options that can't be."""
    if not options.sweep:
        raise RecipeError("`--sweep` is missing: the sweep file. Write `--sweep sweep.yaml`; diagnosis writes one.")
    if is_launched():
        raise RecipeError("A sweep launches its runs itself. Start it with `python`, not with `accelerate launch`.")
    if options.jobs < 1:
        raise RecipeError(f"`--jobs {options.jobs}` must be at least 1.")
    if recipe.training.push_to_hub:
        raise RecipeError("`push_to_hub: true` would push every run. Remove it, and push the winner.")
    try:
        words = shlex.split(options.launch or "")
    except ValueError as error:
        raise RecipeError(f"Cannot read `--launch {options.launch}`: {sentence(error)}. Close the quotation.") from error
    if any(word.split("=")[0] in ("--gpu_ids", "--gpu-ids") for word in words):
        raise RecipeError("Cannot use `--gpu_ids` in `--launch`: each run gets a share of the GPUs. Set CUDA_VISIBLE_DEVICES.")


def _folder(options: SweepArguments, recipe: Recipe) -> Path:
    """Return the sweep's folder, which may not be there yet. Raises RecipeError if it can't be one."""
    folder = Path(options.sweep_dir or f"{recipe.training.output_dir}-sweep")
    if next(path for path in (folder, *folder.parents) if path.exists()).is_file():
        raise RecipeError(f"Cannot write to `--sweep_dir {folder}`: it is a file, or in one. Choose another folder.")
    return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"Cannot write to `--sweep_dir {folder}`: {error.strerror}. Choose another folder.") from error


def _run(study: Study, options: SweepArguments, runner: Runner) -> None:
    """Run what is left of a study's arms, and show how far they are."""
    folder = study.folder
    with Progress(study.plan, folder, options.jobs) as progress:
        runner.tell = progress.tell

        def run_arm(index: int, setting: Setting, trial: Any, job: int) -> float:
            progress.begin(index, setting)
            try:
                value = runner(index, setting, trial, job)
            except (ArmError, optuna.TrialPruned) as error:
                progress.end(index, str(error) or trial.user_attrs[REASON])
                raise
            result = Result.read(arm_folder(folder, index))
            progress.end(index, ", ".join(f"{name} {show(each)}" for name, each in result.rulers.items()) if result else "")
            return value

        try:
            study.run(run_arm, options.jobs, options.retry_failed)
        finally:
            runner.close()


def failures(study: Study) -> Failed:
    """Return arm -> (settings, reason) of the arms that failed, were pruned, or whose results are gone."""
    found = {}
    for index, trials in study.by_arm().items():
        last = trials[-1].user_attrs
        if Result.read(arm_folder(study.folder, index)) is None:
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
        raise RecipeError(f"Cannot load the test data {name}: {fault or sentence(error)}.") from error
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


def device_shares(jobs: int, use_cpu: bool) -> list[str] | None:
    """Return each job's share of the GPUs. Raises RecipeError if there are fewer than jobs."""
    if use_cpu or not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if jobs > len(names):
        raise RecipeError(f"`--jobs {jobs}`: there are {len(names)} GPUs. Write at most {len(names)} jobs.")
    size = len(names) // jobs
    if len(names) % jobs:
        print(f"{len(names) % jobs} of {len(names)} GPUs stay idle: they can't be shared out evenly among {jobs} jobs.")
    return [",".join(names[i * size : (i + 1) * size]) for i in range(jobs)]
