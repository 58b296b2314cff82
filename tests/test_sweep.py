"""Sweeps: plans, studies under kills and with several workers, leaderboards, and arms that are real."""

import contextlib
import csv
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from scipy import stats

import bl_trainer
import sweeping
from bl_trainer.cli import main
from bl_trainer.errors import MeasurementError, RecipeError
from bl_trainer.evaluation.task_files import metrics_of
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.sweep import guard, process
from bl_trainer.sweep.arm import ATTEMPTS, CPU_LAUNCH, Arm, Runner
from bl_trainer.sweep.budget import shortened, shortened_to
from bl_trainer.sweep.cost import Spent, counted, time_text
from bl_trainer.sweep.design import describe
from bl_trainer.sweep.differences import difference
from bl_trainer.sweep.figures import alpha_curves
from bl_trainer.sweep.leaderboard import rank
from bl_trainer.sweep.outcome import Result, base_scores, read_held_out
from bl_trainer.sweep.page import arms_csv, comparison, markdown, page, summary
from bl_trainer.sweep.plan import Plan
from bl_trainer.sweep.rulers import RULERS, measured_by, ruler_named, rulers_in, study_direction, study_value, with_best
from bl_trainer.sweep.study import FORGETTING, ArmError, Study
from bl_trainer.sweep.verb import device_shares, failures
from bl_trainer.tokens.row_hash import row_hash
from conftest import make_double, write_recipe
from forking import Forked, launching
from test_statistics import quadratic_form

GRID = {"arms": [{"objective": "nll"}, {"objective": "neg_p"}], "learning_rate": [1e-3, 1e-2], "seed": [0, 1]}


@pytest.fixture
def make(checkpoint, data_folder, tmp_path):
    """Returns a function that writes a recipe and a sweep file, and reads the plan."""

    def make(given, **changes):
        write_recipe(tmp_path, checkpoint, data_folder, **changes)
        path = tmp_path / "sweep.yaml"
        path.write_text(given if isinstance(given, str) else yaml.safe_dump(given))
        return Plan.read(Recipe.read(["--config", str(tmp_path / "recipe.yaml")]), str(path), tmp_path / "s")

    return make


# Plans


def test_grid_is_every_arm_at_every_rate_and_seed(make):
    plan = make(GRID)
    assert plan.count == len(plan.listed()) == 8
    assert {(s["objective"], s["learning_rate"], s["seed"]) for s in plan.listed()} == {
        (objective, rate, seed) for objective in ("nll", "neg_p") for rate in (1e-3, 1e-2) for seed in (0, 1)
    }
    assert [plan.group_of(setting) for setting in plan.listed()[:2]] == [{"objective": "nll"}, {"objective": "nll"}]


def test_rates_and_seeds_are_swept_unless_told_otherwise(make):
    plan = make({"preset": "full", "arms": [{"objective": "nll"}]}, learning_rate=3e-3)
    assert plan.grid["learning_rate"] == [1e-3, 3e-3, 9e-3]
    assert plan.seeds == [0, 1, 2]
    assert any("the sweep file gives none" in note for note in plan.notes)
    plan = make({"preset": "full", "arms": [{"objective": "nll"}], "learning_rate": [1e-3], "seed": [5]})
    assert plan.count == 1
    assert any("compares unlike things" in note for note in plan.notes)
    assert any("Fewer than three seeds" in note for note in plan.notes)
    assert counted(plan).endswith(" at seed 5:")


MISTAKES = {
    "arms: []": r"`arms: \[\]` must be a list of mappings of recipe keys",
    "arms: [nll]": r"`arms: \['nll'\]` must be a list of mappings",
    "learning_rate: []": r"`learning_rate: \[\]` is an empty list, which leaves no run",
    "learning_rate: 1.0e-3": r"`learning_rate: 0.001` must be a list of values to try, or a range",
    "arms: [{objektive: nll}]": r"In a run of the sweep \({.*objektive: nll.*}\): Unknown recipe key 'objektive'",
    "arms: [{objective: nlll}]": "Unknown objective 'nlll'. Did you mean 'nll'",
    "arms: [{objective: nll}, {objective: {name: nll}}]": "Two runs are the same: nll",
    "lora_r: [8]": r"In a run of the sweep \({lora_r: 8, .*}\): `lora_r` does nothing without `use_peft`",
    "output_dir: [a, b]": "`output_dir` can't be swept",
    "rank_by: bleu": "`rank_by: bleu` is not a metric. Allowed: accuracy, nll",
    "rank_by: loss": "`rank_by: loss` is not a metric",
    "{evaluate: {tasks: [completion]}, rank_by: other/exact_match}": "is not a metric.*, completion/normalised_match",
    "{evaluate: {tasks: [gsm8k]}, rank_by: gsm8k/acuracy}": "is not a metric. Did you mean 'gsm8k/accuracy'",
    "{evaluate: {tasks: [gsm8k]}, rank_by: gsm8k/exact_mtach}": "is not a metric.* drift, forgetting, gsm8k/accuracy",
    "{evaluate: {tasks: [gsm8k]}, rank_by: gsm8k/}": "`rank_by: gsm8k/` is not a metric",
    "{evaluate: {tasks: [arc_easy, gsm8k]}, rank_by: math500/acc}": "Allowed: .*, gsm8k/accuracy, arc_easy/METRIC",
    "{evaluate: {tasks: [gsm8k]}, retain: gsm8k/acuracy}": "`retain: gsm8k/acuracy` is not a metric. Did you mean 'gsm8k/accur",
    "retain: accuracy": "`retain: accuracy` is not a metric. Allowed: none, without `evaluate`",
    "retain: 3": "`retain: 3` must be a text",
    "max_drift: 0.1": "`max_drift` needs what was known before. Write `probe: old.jsonl`, or `retain: TASK/METRIC`",
    "rank_by: forgetting": "`rank_by: forgetting` needs what was known before",
    "{max_drift: -1, probe: org/data}": "`max_drift: -1` must be a number of at least 0",
    "{max_drift: much, probe: org/data}": "`max_drift: much` must be a number of at least 0",
    "{evaluate: {tasks: [gsm8k], temperatures: [1]}, rank_by: gsm8k/accuracy@T0.5}": "Did you mean 'gsm8k/accuracy@T1'",
    "{evaluate: {tasks: [gsm8k], temperatures: [0]}}": "`--temperatures 0` must be different numbers above 0",
    "evaluate: [completion]": r"`evaluate: \['completion'\]` must be a mapping of options",
    "evaluate: {task: [completion]}": "`evaluate` has no option 'task'. Did you mean 'tasks'",
    "evaluate: {tasks: [completion], output: x}": "`evaluate` has no option 'output'",
    "evaluate: {tasks: [completion], limit: -1}": "`--limit -1` must be a number of items",
    "learning_rate: {low: 1, high: 0}": "`learning_rate: .*` is no range",
    "learning_rate: {low: 1.0e-5, high: 1.0e-3}": "The sweep file has a range, but not how many or of what. Write `trials: 30`",
    "trials: 5": "The sweep file has `trials`, but not how many or of what",
    "{trials: 0, learning_rate: {low: 1.0e-5, high: 1.0e-3}}": "`trials: 0` must be a whole number, .* for each of 1 settings",
    "{trials: true, learning_rate: {low: 1.0e-5, high: 1.0e-3}}": "`trials: True` must be a whole number",
    "{arms: [{objective: nll}, {objective: neg_p}], trials: 1, learning_rate: {low: 1.0e-5, high: 1.0e-3}}": "of 2 settings",
    "rankby: nll": "Unknown key 'rankby' in the sweep file. Did you mean 'rank_by'",
    "learning_rates: [1]": "Unknown key 'learning_rates' in the sweep file. Did you mean 'learning_rate'",
    "rank_by: [nll]": r"`rank_by: \['nll'\]` must be a text",
    "probe: nofile.jsonl": "`probe: nofile.jsonl`: there is no such file",
    "pruner: 5": "`pruner: 5` must be a name, or a mapping",
    "arms: [{objective: nll, seed: 5}]": "`seed` in an entry of `arms`: all runs have the same seeds",
    "sampler: TPESampler": "`sampler` does nothing without a range",
    "sampler: Tpe": "`sampler: Tpe` is none of Optuna's.* Allowed: .*TPESampler",
    "pruner: {name: MedianPruner, steps: 3}": "`pruner: MedianPruner` with {'steps': 3}: .*unexpected keyword",
    "pruner: MedianPruner": "`pruner` judges by evaluations during training. Write `rank_by` as one of nll",
    "seed: [0, 0]": r"`seed: \[0, 0\]` must be a list of different whole numbers",
    "preset: shrot": "`preset: shrot` is not a preset. Did you mean 'short'",
    "{preset: full, budget: {share: 0.5}}": "`budget` cuts the runs of `preset: short`. Remove it",
    "{preset: short, trials: 9}": "`preset: short` runs a grid, not a search. Remove trials, or write `preset: full`",
    "{preset: short, seed: [3]}": "`preset: short` needs a seed to choose by and others to judge by",
    "budget: 100": "`budget: 100` must have one of share, steps, tokens",
    "budget: {share: 0.5, steps: 3}": "`budget: .*` must have one of share, steps, tokens",
    "budget: {share: 2}": "the share must be above 0 and at most 1",
    "budget: {steps: 0.5}": "the number of steps must be whole and above 0",
    "budget: {tokens: many}": "the number of tokens must be whole and above 0",
    "- nll": "The sweep file .* must be a YAML mapping of keys to values, got list",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_mistakes_in_a_sweep_file(given, make):
    with pytest.raises(RecipeError, match=MISTAKES[given]):
        make(given)


def test_metrics_of_tasks_are_known_by_their_files(make, tmp_path):
    (tmp_path / "base.yaml").write_text("metric_list: [{metric: exact_match}, {metric: f1}]\n")
    own = tmp_path / "own.yaml"
    own.write_text("include: base.yaml\ntask: own\nfilter_list: [{name: strict}, {name: none}]\n")
    assert metrics_of(str(own)) == ["exact_match,strict", "exact_match", "f1,strict", "f1"]
    own.write_text("task: own\nmetric_list: [{metric: !function code.score}, {metric: f1}]\n")
    assert metrics_of(str(own)) == []
    assert metrics_of("medical") == ["accuracy"]
    assert metrics_of("arc_easy") == []  # the harness's
    for task, rank_by in (("medical", "medical/accuracy:macro"), ("arc_easy", "arc_easy/acc")):
        assert make({**GRID, "evaluate": {"tasks": [task]}, "rank_by": rank_by}).rank_by == rank_by
    own.write_text("metric_list: [\n")
    with pytest.raises(RecipeError, match=r"Cannot read the task file .*own\.yaml: line 2: "):
        make({**GRID, "evaluate": {"tasks": [str(own)]}, "rank_by": f"{own}/f1"})


# Presets


def test_runs_are_short_unless_the_file_spells_them_out(make):
    short = {key: GRID[key] for key in ("arms", "learning_rate")}
    plan = make(short, max_steps=100, warmup_steps=10)
    assert (plan.preset, plan.seeds, plan.budget, plan.count) == ("short", [0, 1, 2, 3], {"share": 0.25}, 4 + 2 * 3)
    recipe = plan.recipe_of(plan.points()[0])
    assert (recipe["max_steps"], recipe["warmup_steps"]) == (25, 3)
    for spelt in (GRID, {**short, "preset": "full"}):
        plan = make(spelt, max_steps=100)
        assert (plan.preset, plan.recipe_of({})["max_steps"]) == ("full", 100)
    three = make({**short, "arms": [*GRID["arms"], {"objective": {"name": "power", "alpha": 2}}]})
    assert (three.groups, three.count) == (3, 6 + 2 * 3)
    assert make({**short, "arms": [{"objective": "nll"}]}).count == 2 + 1 * 3
    with pytest.raises(RecipeError, match=r"Cannot cut runs to 5 steps: `warmup_steps` counts steps of a run whose length"):
        make({**short, "budget": {"steps": 5}}, warmup_steps=10)


WSD = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 40, "min_lr_ratio": 0.1}}


@pytest.mark.parametrize(
    ("recipe", "share", "keys"),
    [
        ({}, 0.25, {"num_train_epochs": 0.75}),
        ({"num_train_epochs": 2, "max_steps": -1, "warmup_steps": 0.1}, 0.5, {"num_train_epochs": 1.0}),
        ({"max_steps": 10, "warmup_steps": 3}, 0.25, {"max_steps": 3, "warmup_steps": 1}),
        ({"max_steps": 400, **WSD}, 0.1, {"max_steps": 40, "lr_scheduler_kwargs": {"num_decay_steps": 4, "min_lr_ratio": 0.1}}),
        (
            {"max_steps": 40, "lr_scheduler_kwargs": '{"num_decay_steps": 8}'},
            0.5,
            {"max_steps": 20, "lr_scheduler_kwargs": {"num_decay_steps": 4}},
        ),
        ({"max_steps": 400}, 1, {}),
    ],
)
def test_a_short_run_is_the_whole_one_on_a_smaller_scale(recipe, share, keys):
    assert shortened(recipe, share) == keys


def test_a_budget_of_steps_is_kept_and_never_lengthens_a_run():
    assert shortened_to({"max_steps": 100, "warmup_steps": 20}, 10) == {"max_steps": 10, "warmup_steps": 2}
    assert shortened_to({"max_steps": 100}, 200) == {"max_steps": 100}
    assert shortened_to({"warmup_steps": 0.1}, 10) == {"max_steps": 10}


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_best_two_objectives_go_on_with_fresh_seeds(make, tmp_path, jobs):
    arms = [{"objective": name} for name in ("nll", "neg_p", "log_one_minus_p")]
    plan, ran = make({"arms": arms, "learning_rate": [1e-3, 1e-2]}), {}

    def run(index, setting, trial, job):
        ran[index] = setting
        if setting["objective"] == "nll" and setting["learning_rate"] == 1e-2:
            raise ArmError("no luck")
        return {"nll": 0.2, "neg_p": 0.3, "log_one_minus_p": 0.1}[setting["objective"]] + setting["learning_rate"]

    study = Study(plan, tmp_path / "s")
    study.run(run, jobs, False)
    assert sorted(ran) == list(range(12))
    assert [ran[i] for i in range(6)] == [{**point, "seed": 0} for point in plan.points()]
    best = [{"objective": "neg_p", "learning_rate": 1e-2}, {"objective": "nll", "learning_rate": 1e-3}]
    assert [ran[i] for i in range(6, 12)] == [{**each, "seed": seed} for seed in (1, 2, 3) for each in best]
    before = dict(ran)
    Study(plan, tmp_path / "s").run(run, jobs, False)
    assert ran == before


def test_finalists_are_judged_by_fresh_seeds_alone(make, tmp_path):
    """neg_p is best at the seed that chose, nll at the others; power has stopped, with the best value of them all."""
    power = {"name": "power", "alpha": 2}
    arms = [{"objective": each} for each in ("nll", "neg_p", power)]
    plan = make({"arms": arms, "learning_rate": [1e-2]})
    found = [("nll", 0, 5), ("neg_p", 0, 9), (power, 0, 10)]
    found += [(name, seed, hits + seed % 2) for seed in (1, 2, 3) for name, hits in (("nll", 7), ("neg_p", 4))]
    results = {
        i: Result(i, {"objective": o, "learning_rate": 1e-2, "seed": s}, {"accuracy": hits / 10}, seconds=1800.0, devices=1)
        for i, (o, s, hits) in enumerate(found)
    }
    board = rank(plan, results, lambda index: None, {})
    assert [(row.name, row.arms) for row in board.rows] == [("nll", [3, 5, 7]), ("neg_p", [4, 6, 8])]
    assert board.rows[1].behind.mean == pytest.approx(0.3)
    assert [(row.name, row.arms) for row in board.stopped] == [("power 2", [2])]
    text = markdown(board, tmp_path, "accelerate launch")
    assert "- power 2: accuracy 1 with learning_rate 0.01, seed 0 alone" in text
    assert "| power 2 |" not in text
    assert "Runs are short (share 0.25)" in text
    assert "9 runs: 4.5 hours, 4.5 GPU-hours." in text
    assert "stopped after the first stage: power 2" in summary(board, tmp_path)
    early = rank(plan, {i: results[i] for i in range(3)}, lambda index: None, {})
    assert ([row.name for row in early.rows], early.stopped) == (["power 2", "neg_p", "nll"], [])
    assert "chance in training can't be told" in early.verdict()


def test_a_folder_of_the_full_grid_is_not_taken_for_a_short_one(make, tmp_path):
    given = {"arms": GRID["arms"], "learning_rate": [1e-3]}
    Study(make({**given, "seed": [0, 1, 2]}), tmp_path / "s")  # as files of earlier versions say it, or leave it out
    with pytest.raises(
        RecipeError, match=r"had another seed, .* preset, another budget, .*; or write `preset: full` to resume"
    ):
        Study(make(given), tmp_path / "s")
    Study(make({**given, "preset": "full"}), tmp_path / "s")


def test_each_point_is_tried_once(make, monkeypatch):
    tried = []
    monkeypatch.setattr("bl_trainer.objectives.objective.check_contract", lambda objective: tried.append(objective.name))
    make(GRID)
    recipe, points = ["nll"], ["nll"] * 2 + ["neg_p"] * 2
    assert sorted(tried) == sorted(recipe + points)


def test_cost_of_finished_runs():
    results = [Result(0, {}, {}, seconds=60.0, devices=2, trained_tokens=500), Result(1, {}, {}, trained_tokens=1500)]
    spent = Spent.of(results)
    assert spent == Spent(timed=1, seconds=60.0, gpu_seconds=120.0, counted=2, tokens=2000)
    assert spent.seconds_left(5, 2) == 180
    assert spent.scaled(60) == "60,000 tokens, 1 hours, 2 GPU-hours"
    assert [time_text(each) for each in (80, 600, 7200)] == ["about 80 s", "about 10 min", "about 2.0 h"]


def test_results_are_read_as_they_were_written(tmp_path):
    found = Result(3, {"seed": 1}, {"nll": 2.0}, {"nll": 3.0}, ["nll"], 1.5, 4, 5, {"torch": "2"}, 6, 7.5, 2)
    found.write(tmp_path)
    assert Result.read(tmp_path) == found
    assert Result.read(tmp_path / "none") is None
    old = {key: value for key, value in found.to_json().items() if key not in ("trained_tokens", "seconds", "devices")}
    (tmp_path / "result.json").write_text(json.dumps(old))  # of an earlier version
    assert Result.read(tmp_path) == replace(found, trained_tokens=None, seconds=None, devices=0)
    for text, why in (('{"schema": 0}', "another version"), ("{", "Expecting property name"), ('{"schema": 1}', "required")):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(RecipeError, match=rf"Cannot read .*result\.json: .*{why}.* Remove .* to repeat the run\."):
            Result.read(tmp_path)
    with pytest.raises(ValueError, match="Out of range float"):
        Result(0, {}, {"nll": math.inf}).write(tmp_path)


# Studies


def test_a_study_of_another_sweep_or_version_is_refused(make, tmp_path):
    Study(make(GRID), tmp_path / "s")
    Study(make(GRID), tmp_path / "s")
    with pytest.raises(RecipeError, match=r"The sweep in .*/s had another seed, and its runs can't be compared with these"):
        Study(make({**GRID, "seed": [0, 1, 2]}), tmp_path / "s")
    with pytest.raises(RecipeError, match="had another recipe, and its runs"):
        Study(make(GRID, max_length=32), tmp_path / "s")
    Study(make({**GRID, "rank_by": "nll"}), tmp_path / "s")  # which ranks anew
    with open(make(GRID).base["dataset_name"] + "/test.jsonl", "a") as file:
        place = file.tell()
        file.write(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(RecipeError, match=r"had another .*/test\.jsonl, and its runs"):
        Study(make(GRID), tmp_path / "s")
    os.truncate(make(GRID).base["dataset_name"] + "/test.jsonl", place)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "sweep.json").write_text('{"schema": 0}')
    with pytest.raises(RecipeError, match=r"is of another version of bl_trainer \(schema 0, now 1\)"):
        Study(make(GRID), tmp_path / "t")
    for url in ("postgresql://me:se@cret@nowhere/x", "postgresql://me@nowhere/x?password=se@cret"):
        with pytest.raises(RecipeError, match=r"`--storage postgresql:\.\.\.` can't be used") as caught:
            Study(make(GRID), tmp_path / "u", url)
        assert "cret" not in str(caught.value).split("can't")[0]


@pytest.mark.parametrize("name", ["own_losses.py", "template.jinja"])
def test_a_sweep_depends_on_the_files_that_its_recipe_names(name, make, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_losses.py").write_text("def mine(logp):\n    return -logp\n")
    (tmp_path / "template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    given = {**GRID, "arms": [{"objective": {"name": "nll", "mix": {"own_losses:mine": 0.5}}}, {"objective": "nll"}]}
    recipe = {"chat_template_path": str(tmp_path / "template.jinja")}
    Study(make(given, **recipe), tmp_path / "s")
    Study(make(given, **recipe), tmp_path / "s")
    with (tmp_path / name).open("a") as file:
        file.write("\n")
    with pytest.raises(RecipeError, match=f"had another .*/{name}, and its runs can't be compared"):
        Study(make(given, **recipe), tmp_path / "s")
    sys.modules.pop("own_losses", None)


def run_all(study):
    """Run the arms of a study, each worth its index, and return by index how often each was run and what it is worth."""
    begun = []

    def arm(index, setting, trial, job):
        begun.append(index)
        return float(index)

    study.run(arm, 1, False)
    worth = {i: [t.values[0] for t in trials if t.state.is_finished() and t.values] for i, trials in study.by_arm().items()}
    return sorted(begun), worth


@pytest.fixture(scope="session")
def journal(checkpoint, data_folder, tmp_path_factory):
    """The journal of a study of four arms."""
    folder = tmp_path_factory.mktemp("study")
    write_recipe(folder, checkpoint, data_folder)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**GRID, "seed": [0]}))
    plan = Plan.read(Recipe.read(["--config", str(folder / "recipe.yaml")]), str(folder / "sweep.yaml"), folder / "s")
    assert run_all(Study(plan, folder / "s")) == ([0, 1, 2, 3], {i: [float(i)] for i in range(4)})
    return plan, (folder / "s" / "study.journal").read_bytes()


TEARS = {
    "in the last line": lambda whole: whole[:-10],
    "before the last line end": lambda whole: whole[:-1],
    "in the middle of the file": lambda whole: whole[: whole.index(b"\n", len(whole) // 2) + 7],
    "in the first line": lambda whole: whole[:5],
    "zeros of a power cut": lambda whole: whole + b"\0" * 100,
    "before what another worker wrote": lambda whole: whole.rpartition(b"\n{")[0] + b'\n{"op_code":4,"worker_i{' + (
        whole.rpartition(b"\n{")[2]
    ),
}  # fmt: skip


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_journal_is_mended_and_the_sweep_goes_on(tear, journal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bl_trainer.sweep.study.POLL", 0.02)
    monkeypatch.setattr("bl_trainer.sweep.study.GRACE", 0.4)  # until a trial that no worker has put its name to is given up
    plan, whole = journal
    folder = tmp_path / "s"
    folder.mkdir()
    torn = TEARS[tear](whole)
    (folder / "study.journal").write_bytes(torn)
    study = Study(plan, folder)
    said = capsys.readouterr().out
    assert "study.journal had a torn line, as a full disk or a power cut leaves it." in said
    assert (folder / "study.journal.torn-1").read_bytes() == torn
    assert str(folder / "study.journal.torn-1") in said
    _, worth = run_all(study)
    assert worth == {i: [float(i)] for i in range(4)}
    Study(plan, folder)
    assert not (folder / "study.journal.torn-2").exists()
    assert capsys.readouterr().out == ""


def test_a_journal_of_something_else_is_refused(journal, tmp_path):
    plan, whole = journal
    (tmp_path / "s").mkdir()
    path = tmp_path / "s" / "study.journal"
    path.write_bytes(content := whole.replace(b'{"op_code":', b"[", 1))
    with pytest.raises(
        RecipeError, match=r"study\.journal: line 1 is no operation of Optuna\. Restore the file, or start a new"
    ):
        Study(plan, tmp_path / "s")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "module", ["arm", "guard", "journal", "leaderboard", "page", "plan", "process", "signature", "study", "verb"]
)
def test_a_sweep_needs_no_module_of_unix(module, monkeypatch):
    for name in ("fcntl", "termios", "pwd", "grp", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    real = sys.modules[f"bl_trainer.sweep.{module}"]
    spec = importlib.util.spec_from_file_location(real.__name__, real.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_guard_ends_its_command_when_its_stdin_closes(tmp_path):
    """On every system: the pipe is the guard's stdin, and no descriptor has to be passed on."""
    started = tmp_path / "started"
    command = [sys.executable, "-c", f"import time; open({str(started)!r}, 'w').close(); time.sleep(600)"]
    own = {**os.environ, guard.MARK: str(tmp_path)}
    process = subprocess.Popen([sys.executable, guard.__file__, str(tmp_path), *command], stdin=subprocess.PIPE, env=own)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.stdin.close()
    assert process.wait(timeout=120) == 1
    assert not arms_of(tmp_path)


def test_a_session_that_was_noted_is_stopped_unless_its_id_is_anothers(tmp_path):
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    began = psutil.Process(process.pid).create_time()
    (tmp_path / guard.NOTE).write_text(f"{process.pid} {began - 100}")
    assert guard.stop(str(tmp_path)) == []
    (tmp_path / guard.NOTE).write_text(f"{process.pid} {began}")
    assert guard.stop(str(tmp_path)) == [process.pid]
    process.wait(timeout=60)
    (tmp_path / guard.NOTE).write_text("torn")
    assert guard.stop(str(tmp_path)) == []


class Server:
    """A fork server whose processes end as `ends` says."""

    def __init__(self, ends):
        self.ends, self.exitcode = ends, ends

    def set_forkserver_preload(self, modules):
        assert modules[0] == process.IMPORTS

    def Process(self, target, args):
        return self

    def start(self):
        if self.ends is None:
            raise EOFError

    def join(self):
        pass


def test_runs_start_anew_where_forks_fail(tmp_path, monkeypatch, capsys):
    for ends in (0, 1, None):
        monkeypatch.setattr(process, "_server", lambda ends=ends: Server(ends))
        assert process.starter(tmp_path, False, []) is (process.Forked if ends == 0 else process.Guarded)
        said = capsys.readouterr().out
        assert said == ("" if ends == 0 else f"Runs start as new processes, which takes longer: a forked one failed "
                        f"({tmp_path / 'fork.log'}).\n")  # fmt: skip
    monkeypatch.setattr("sys.platform", "darwin")
    assert process.starter(tmp_path, False, []) is process.Guarded


def test_what_keeps_an_arm_from_going_on_is_refused_at_once(make):
    with pytest.raises(RecipeError, match=r"In a run of the sweep \(.*\): `save_only_model: true` leaves out"):
        make(GRID, save_only_model=True)
    assert make(GRID).recipe_of({})["save_total_limit"] == 1
    assert make(GRID, save_total_limit=3).recipe_of({})["save_total_limit"] == 3


def test_values_as_yaml_gives_them(make):
    """1e-5 is a text to YAML; the recipe's reader takes it for a number, and so does the sweep's."""
    plan = make("arms: [{objective: nll}]\nlearning_rate: [1e-5, 3e-5, 1e-4]\n")
    assert plan.grid["learning_rate"] == [1e-5, 3e-5, 1e-4]
    plan = make("arms: [{objective: nll, learning_rate: 1e-2}, {objective: neg_p}]\n", learning_rate=3e-3)
    assert [point["learning_rate"] for point in plan.points()] == [1e-2, 1e-3, 3e-3, 9e-3]
    make("{arms: [{objective: nll}], run_name: [2024-01-01]}")


def test_arms_that_raise_are_their_own(make, tmp_path):
    """Whatever an arm raises, the others go on; an arm of which no point finished has a reason as well."""
    ranged = {**GRID, "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "trials": 2}
    plan, ran = make(ranged), []

    def run(index, setting, trial, job):
        ran.append(index)
        if setting["objective"] == "neg_p":
            raise ValueError("Out of range float values are not JSON compliant")
        return 0.5

    study = Study(plan, tmp_path / "s")
    study.run(run, 2, False)
    assert sorted(ran) == [0, 1, 2]
    reasons = {index: trials[-1].user_attrs.get("reason") for index, trials in study.by_arm().items()}
    assert reasons == {
        0: None, 2: None, 1: "ValueError: Out of range float values are not JSON compliant",
        3: "none of the points drawn for it finished",
    }  # fmt: skip
    assert "its results are gone" in failures(study)[0][1]


def test_workers_and_restarts_draw_other_points(make, tmp_path):
    ranged = {"arms": [{"objective": "nll"}], "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "trials": 6}
    plan, drawn = make({**ranged, "seed": [0]}), {}

    def run(index, setting, trial, job):
        if index == 3 and index not in drawn:
            drawn[index] = None
            raise RecipeError("stop")
        drawn[index] = setting["learning_rate"]
        return setting["learning_rate"]

    with pytest.raises(RecipeError, match="stop"):
        Study(plan, tmp_path / "s").run(run, 1, False)
    Study(plan, tmp_path / "s").run(run, 1, False)
    assert len(set(drawn.values())) == 6
    broken_off, drawn = drawn, {3: None}
    Study(plan, tmp_path / "whole").run(run, 1, False)
    assert drawn == broken_off


@pytest.mark.parametrize("jobs", [1, 4])
def test_points_are_drawn_for_each_arm_and_the_best_run_at_all_seeds(make, tmp_path, jobs):
    plan = make({**GRID, "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "trials": 8, "rank_by": "nll"})
    ran = []

    def run(index, setting, trial, job):
        time.sleep(0.05 * (index % 3))
        ran.append((index, setting))
        return abs(math.log10(setting["learning_rate"]) + 2)

    Study(plan, tmp_path / "s").run(run, jobs, False)
    ran.sort(key=lambda arm: arm[0])
    assert [index for index, _ in ran] == list(range(plan.count)) == list(range(10))
    drawn = [setting for _, setting in ran[:8]]
    assert all(1e-4 <= setting["learning_rate"] <= 1e-1 and setting["seed"] == 0 for setting in drawn)
    for index, setting in ran[8:]:
        mine = [each for each in drawn if each["objective"] == setting["objective"]]
        assert len(mine) == 4
        best = min(mine, key=lambda each: abs(math.log10(each["learning_rate"]) + 2))
        assert setting == {**best, "seed": 1}, index


def test_an_arm_asked_for_twice_runs_once(make, tmp_path):
    """Workers that find the same arm abandoned may both ask for it; failed arms are run again only when told to."""
    plan, ran = make({**GRID, "seed": [0], "learning_rate": [1e-3]}), []

    def run(index, setting, trial, job):
        ran.append(index)
        if index == 1 and len(ran) < 4:
            raise ArmError("no luck")
        return 0.5

    study = Study(plan, tmp_path / "s")
    study.run(run, 1, False)
    assert ran == [0, 1]
    for index in (0, 1):
        study._ask_again(study.by_arm()[index][0], {})
        study._ask_again(study.by_arm()[index][0], {})
    study.run(run, 2, False)
    assert ran == [0, 1, 1]  # asked for, as by `retry_failed`, and again no more
    study.run(run, 2, True)
    assert ran == [0, 1, 1, 1]
    study.run(run, 2, True)
    assert ran == [0, 1, 1, 1]
    assert {index: trials[-1].state.name for index, trials in study.by_arm().items()} == {0: "COMPLETE", 1: "COMPLETE"}


@pytest.fixture
def quick(make, tmp_path):
    """Returns a function that starts a worker of a sweep whose arms are quick, after writing its files."""
    make(GRID, eval_strategy="steps")

    def start(storage=None, folder=tmp_path, start="Guarded"):
        return Forked(sweeping.forked, folder, folder, storage, start)

    return start


def finish(worker):
    _, said = worker.communicate(timeout=400)
    assert worker.returncode == 0, said[-2000:]


def boards(folder):
    """What a sweep found, but for the time that it took."""
    texts = {name: (folder / name).read_text() for name in ("leaderboard.csv", "leaderboard.md", "winner.yaml")}
    return {name: re.sub(r"(?<=## Cost\n\n).*", "", text) for name, text in texts.items()}


def arms_of(folder):
    """The processes of a sweep's arms, each with the folder of its arm."""
    texts = {str(note.parent): note.read_text() for note in folder.glob(f"arms/*/{guard.NOTE}")}
    notes = {int(text.split()[0]): arm for arm, text in texts.items() if text}
    found = {p: _mark(p, notes) for p in psutil.process_iter()}
    return {p: mark for p, mark in found.items() if mark.startswith(str(folder))}


def _mark(process, notes):
    """The folder of the arm that a process is of: by the session of what was forked, or by its environment."""
    try:
        return notes.get(os.getsid(process.pid)) or process.environ().get(guard.MARK, "")
    except (psutil.Error, OSError):
        return ""


KILLS = 5


@pytest.mark.parametrize("start", ["Guarded", "Forked"])
def test_killed_at_random_again_and_again(start, quick, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("recipe.yaml", "sweep.yaml"):
        shutil.copy(tmp_path / name, whole)
    finish(quick(folder=whole, start=start))
    rng, folder, kills = random.Random(0), tmp_path / "sweep", 0
    arms_killed = Counter()  # a command that is killed each of its `ATTEMPTS` times is a failure, rightly
    worker = quick(start=start)
    deadline = time.monotonic() + 900
    while kills < KILLS:
        assert time.monotonic() < deadline
        while not arms_of(folder) and worker.poll() is None:
            time.sleep(0.01)
        if worker.poll() is not None:  # done before all kills: what is left is to be killed at the start
            assert worker.returncode == 0
            kills += 1
            worker = quick(start=start)
            continue
        time.sleep(rng.uniform(0, 0.4))
        what = rng.choice(["sweep", "arm", "both"])
        arms_now = arms_of(folder)
        arms = [each for each, mark in arms_now.items() if arms_killed[mark] < ATTEMPTS - 1]
        if what != "sweep" and arms:
            chosen = rng.choice([arms, [rng.choice(arms)]])
            arms_killed.update({arms_now[each] for each in chosen})
            for process in chosen:
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself since it was looked up
                    process.kill()
        if what != "arm":
            worker.kill()
            worker.communicate()
            worker = quick(start=start)
        kills += 1
    finish(worker)
    assert boards(folder) == {name: text.replace(str(whole), str(tmp_path)) for name, text in boards(whole / "sweep").items()}
    begun = [int(line) for line in (folder / "begun").read_text().split()]
    assert set(begun) == set(range(8))
    assert not arms_of(folder)


@pytest.mark.parametrize("start", ["Guarded", "Forked"])
def test_an_arm_dies_with_its_sweep(start, quick, tmp_path):
    worker = quick(start=start)
    while not (tmp_path / "sweep" / "arms" / "000" / "model" / "steps").exists():
        assert worker.poll() is None
        time.sleep(0.01)
    worker.kill()
    worker.communicate()
    gone = time.monotonic() + 60
    while arms_of(tmp_path / "sweep"):
        assert time.monotonic() < gone
        time.sleep(0.05)


def test_a_run_killed_before_its_log_is_open_begins_again(tmp_path):
    codes = iter([-signal.SIGKILL, 0])
    arm = Arm.__new__(Arm)
    arm.index, arm.folder, arm.is_whole, arm._watch = 0, tmp_path, True, lambda *args: next(codes)
    arm.runner = SimpleNamespace(tell=lambda *args: None)
    arm._step("train", ["never run"])
    assert next(codes, None) is None
    assert not arm.is_whole


def test_a_killed_guard_costs_nothing(quick, tmp_path):
    worker, killed = quick(), 0
    while killed < 2 and worker.poll() is None:
        guards = [p for p in arms_of(tmp_path / "sweep") if any("guard.py" in part for part in p.cmdline())]
        if guards:
            guards[0].kill()
            killed += 1
        time.sleep(0.2)
    finish(worker)
    assert killed == 2
    with (tmp_path / "sweep" / "leaderboard.csv").open() as file:
        assert [row["failed"] for row in csv.DictReader(file)] == [""] * 8
    assert not arms_of(tmp_path / "sweep")


def shared(quick, tmp_path, *storage):
    """Run two workers on one study, kill one of them, and check that each arm was begun by one."""
    workers = [quick(*storage) for _ in range(2)]
    for worker in workers:
        finish(worker)
    begun = (tmp_path / "sweep" / "begun").read_text().split()
    assert sorted(map(int, begun)) == list(range(8))
    with (tmp_path / "sweep" / "leaderboard.csv").open() as file:
        assert [int(row["arm"]) for row in csv.DictReader(file)] == list(range(8))


def test_two_workers_share_the_arms(quick, tmp_path):
    shared(quick, tmp_path)


@pytest.fixture
def postgres():
    """The URL of an empty PostgreSQL database, of a server of the test's own."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")) or [p for p in [shutil.which("pg_ctl")] if p]
    if not found:
        pytest.skip("PostgreSQL isn't installed")
    pytest.importorskip("psycopg")
    tools = Path(found[-1]).parent
    home = Path(tempfile.mkdtemp(prefix="postgres"))
    as_user = []
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(home, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    run = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
    data = home / "data"
    subprocess.run([*as_user, str(tools / "initdb"), "-D", str(data), "-A", "trust", "-U", "postgres"], **run)
    port = 20000 + os.getpid() % 20000
    options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [*as_user, str(tools / "pg_ctl"), "-D", str(data), "-w", "-l", str(home / "log")]
    subprocess.run([*control, "-o", options, "start"], **run)
    yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], **run)
    shutil.rmtree(home)


def test_two_workers_share_the_arms_on_postgres(quick, tmp_path, postgres):
    shared(quick, tmp_path, postgres)


def test_a_worker_that_dies_on_postgres(quick, tmp_path, postgres):
    first, second = quick(postgres), quick(postgres)
    while not arms_of(tmp_path / "sweep"):
        time.sleep(0.01)
    time.sleep(0.3)
    first.kill()
    first.communicate()
    finish(second)
    with (tmp_path / "sweep" / "leaderboard.csv").open() as file:
        assert [int(row["arm"]) for row in csv.DictReader(file)] == list(range(8))


def test_failed_and_pruned_arms_are_reported_and_the_others_go_on(make, quick, tmp_path):
    make({**GRID, "learning_rate": [1e-3, 5.0], "seed": [0]}, eval_strategy="steps")
    finish(quick())
    with (tmp_path / "sweep" / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["failed"]) for row in rows] == [row["learning_rate"] == "5.0" for row in rows]
    assert sum(bool(row["failed"]) for row in rows) == 2
    assert all(row["failed"].startswith("train: The loss is nan in step 1. (") for row in rows if row["failed"])
    assert (
        "run 001, nll, learning_rate 5, seed 0: train: The loss is nan" in (tmp_path / "sweep" / "leaderboard.md").read_text()
    )

    shutil.rmtree(tmp_path / "sweep")
    pruner = {"name": "ThresholdPruner", "upper": 8.5}
    make({**GRID, "learning_rate": [1e-3, 0.9], "seed": [0], "rank_by": "nll", "pruner": pruner}, eval_strategy="steps")
    finish(quick())
    with (tmp_path / "sweep" / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["failed"] for row in rows if row["learning_rate"] == "0.9"] == ["pruned at step 1, nll 8.9"] * 2
    assert all(not row["failed"] for row in rows if row["learning_rate"] == "0.001")


# Leaderboards


def test_difference_is_the_paired_t_test_where_one_thing_was_sampled():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 12), rng.normal(0.5, 1, 12)
    found = difference(float((a - b).mean()), {"seeds": a - b})
    expected = stats.ttest_rel(a, b)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval()), rel=1e-9)
    assert not found.is_significant or found.mean > 0


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_differences_that_are_all_alike_give_the_sign_tests_p(seeds):
    better, worse = np.array([0.6, 0.7] * 4)[:seeds], np.array([0.5, 0.6] * 4)[:seeds]
    by_seed, rng = better - worse, np.random.default_rng(0)
    alike = difference(0.1, {"seeds": by_seed}, 1.0)
    assert alike.p_value == 2 ** (1 - seeds)
    assert alike.is_significant == (seeds > 5)
    share = 1 - 0.05 ** (1 / seeds)
    assert alike.interval == pytest.approx((0.1 - share * 1.1, 0.1 + share * 0.9))
    assert difference(0.1, {"seeds": by_seed}).interval is None
    items = 0.1 + rng.normal(0, 0.01, 40)
    both = difference(0.1, {"seeds": by_seed, "examples": items}, 1.0)
    assert both.p_value == alike.p_value  # whatever the examples say
    assert both.interval == alike.interval
    none = difference(0.0, {"seeds": 0 * by_seed, "examples": np.zeros(40)}, 1.0)
    assert (none.p_value, none.is_significant) == (1.0, False)
    assert none.interval == pytest.approx((-share, share))


def test_seeds_that_are_all_alike_have_no_interval_without_width(make, tmp_path):
    settings = [{"objective": o, "learning_rate": 1e-2, "seed": s} for o in ("nll", "neg_p") for s in (0, 1, 2)]
    board = board_of(make, [(each, [6 if each["objective"] == "nll" else 5] * 40) for each in settings], (10,) * 40,
                     seed=[0, 1, 2])  # fmt: skip
    share = 1 - 0.05 ** (1 / 3)
    first, second = board.rows
    assert first.values["accuracy"][1] == pytest.approx((0.6 * (1 - share), 0.6 + 0.4 * share))
    assert first.values["nll"][1] is None
    assert second.behind.p_value == 0.25
    assert "no significant difference" in board.verdict()
    by_loss = rank(replace(board.plan, rank_by="nll"), board.arms, lambda index: None, {})
    assert "no interval: all differ alike" in markdown(by_loss, tmp_path, "accelerate launch")


def test_interval_covers_the_difference_over_new_seeds_and_examples():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        seeds, rows = rng.normal(0, 0.5, 4), rng.normal(0, 1, 30)
        table = 0.3 + seeds[:, None] + rows[None] + rng.normal(0, 1, (4, 30))
        found = difference(table.mean(), {"seeds": table.mean(1), "examples": table.mean(0)})
        covered += found.interval[0] <= 0.3 <= found.interval[1]
    assert 940 <= covered <= 1000


def board_of(make, values, tokens=(1, 2, 3), **plan):
    """A leaderboard of arms of which `values` gives each row's hits, by setting."""
    made = make({**GRID, **plan})
    arms, rows = {}, {}
    for index, (setting, hits) in enumerate(values):
        rulers = {
            "accuracy": sum(hits) / sum(tokens),
            "nll": 1.0,
            "target_prob": 0.5,
            "calibration_error": 0.1,
            "drift": 0.0,
        }
        arms[index] = Result(index, setting, rulers, dict(rulers), loss=1.0, tokens=6, examples=3)
        rows[index] = {str(row): (n, hit) for row, (n, hit) in enumerate(zip(tokens, hits, strict=True))}
    return rank(made, arms, rows.get, {})


def test_a_group_stands_for_its_best_rate_and_is_paired_by_seed_and_row(make):
    def setting(objective, rate, seed):
        return {"objective": objective, "learning_rate": rate, "seed": seed}

    values = [
        (setting("nll", 1e-3, 0), (1, 1, 1)), (setting("nll", 1e-3, 1), (1, 1, 2)),
        (setting("nll", 1e-2, 0), (0, 0, 1)), (setting("nll", 1e-2, 1), (0, 0, 1)),
        (setting("neg_p", 1e-3, 0), (0, 0, 0)), (setting("neg_p", 1e-3, 1), (0, 0, 0)),
        (setting("neg_p", 1e-2, 0), (1, 2, 3)), (setting("neg_p", 1e-2, 1), (1, 2, 2)),
    ]  # fmt: skip
    board = board_of(make, values)
    first, second = board.rows
    assert (first.name, first.arms, second.name, second.arms) == ("neg_p", [6, 7], "nll", [0, 1])
    assert second.behind.mean == pytest.approx((3 + 1) / 2 / 6)
    assert second.behind.over == ("seeds", "examples")
    by_seed = np.array([3 / 6, 1 / 6])
    d = np.array([0, 1, 1]) - 2 / 6 * np.array([1, 2, 3])
    form = quadratic_form(np.array([1, 2, 3]) / 6)
    over_seeds, over_rows = by_seed.var(ddof=1) / 2, (d**2).sum() / 36 * (14 / 36) / np.trace(form)
    expected, free_rows = over_seeds + over_rows, np.trace(form) ** 2 / np.trace(form @ form)
    free = expected**2 / (over_seeds**2 / 1 + over_rows**2 / free_rows)
    half = stats.t.ppf(0.975, free) * math.sqrt(expected)
    assert second.behind.interval == pytest.approx((2 / 6 - half, min(1, 2 / 6 + half)))
    assert second.behind.p_value == pytest.approx(2 * stats.t.sf(2 / 6 / math.sqrt(expected), free))
    assert board.verdict() == "neg_p is ahead by accuracy, but with no significant difference from nll."


def forgetting_board(make, lost, **plan):
    """Two objectives at two rates. The higher rate has the better accuracy. `lost`: what each of the four runs forgets."""
    settings = [{"objective": name, "learning_rate": rate, "seed": 0} for name in ("nll", "neg_p") for rate in (1e-3, 1e-2)]
    values = [(setting, (hits,)) for setting, hits in zip(settings, (3, 5, 2, 4), strict=True)]
    board = board_of(make, values, (10,), seed=[0], probe="org/old", **plan)
    for result, each in zip(board.arms.values(), lost, strict=True):
        result.rulers["forgetting"] = each
    return rank(board.plan, board.arms, lambda index: None, {})


FORGETS = "nll: its best by accuracy, learning_rate 0.01, forgets 0.4: "


@pytest.mark.parametrize(
    ("lost", "plan", "names", "rates", "said"),
    [
        ((0.0, 0.04, 0.0, 0.04), {}, ["nll", "neg_p"], [1e-2, 1e-2], None),  # all within the default
        ((0.0, 0.4, 0.0, 0.04), {}, ["neg_p", "nll"], [1e-2, 1e-3], FORGETS + "another setting is shown."),
        ((0.5, 0.4, 0.0, 0.4), {}, ["neg_p", "nll"], [1e-3, 1e-2], FORGETS + "no setting forgets less."),
        ((0.0, 0.4, 0.0, 0.04), {"max_drift": 0.5}, ["nll", "neg_p"], [1e-2, 1e-2], None),
        ((0.0, -0.4, 0.0, 0.0), {"max_drift": 0}, ["nll", "neg_p"], [1e-2, 1e-2], None),  # who gains forgets nothing
    ],
)
def test_what_forgets_too_much_stands_behind(lost, plan, names, rates, said, make, tmp_path):
    board = forgetting_board(make, lost, **plan)
    assert [row.name for row in board.rows] == names
    assert [row.best["learning_rate"] for row in board.rows] == rates
    text = markdown(board, tmp_path, "accelerate launch")
    assert f"A setting that forgets more than {plan.get('max_drift', 0.05):g} (`max_drift`) stands behind" in text
    assert said in text if said else "forgets 0." not in text
    assert "accuracy lost since the base model on the probe set" in text


def test_a_model_that_is_only_surer_forgets_nothing(tokenizer, double_checkpoint, pair_data, tmp_path):
    """Objectives that sharpen cost nll and KL on old data, though no answer changes: the limit is on answers."""
    surer = make_double(tokenizer)
    with torch.no_grad():
        surer.lm_head.weight *= 4
    surer.save_pretrained(tmp_path / "surer")
    tokenizer.save_pretrained(tmp_path / "surer")
    pair_data.to_json(tmp_path / "old.jsonl")
    given = {"model": double_checkpoint, "data": tmp_path / "old.jsonl", "probe": str(tmp_path / "old.jsonl")}
    report = bl_trainer.diagnose(**given, compare=str(tmp_path / "surer"), percentiles=[]).to_json()
    tuned, base = (measured_by(report["compare"], is_base) for is_base in (False, True))
    assert tuned["drift"] > 1
    assert tuned["nll"] > base["nll"] + 1
    assert tuned["forgetting"] == 0


def test_a_sweep_without_old_data_says_so(make, tmp_path):
    board = board_of(make, [({"objective": "nll", "learning_rate": 1e-3, "seed": 0}, (1, 1, 1))])
    assert "Forgetting is not measured: add `probe: DATA`, or" in markdown(board, tmp_path, "accelerate launch")


def test_finalists_do_not_forget(make, tmp_path):
    """The second stage runs the best setting that keeps within the limit; without one, that which forgets least."""
    lost = {("nll", 1e-3): 0.01, ("nll", 1e-2): 0.3, ("neg_p", 1e-3): 0.3, ("neg_p", 1e-2): 0.2}
    plan = make({**GRID, "preset": "short", "seed": [0, 1], "probe": "org/old"})
    study, asked = Study(plan, tmp_path / "s"), []

    def run_arm(index, setting, trial, job):
        asked.append((setting["objective"], setting["learning_rate"], setting["seed"]))
        trial.set_user_attr(FORGETTING, lost[asked[-1][:2]])
        return setting["learning_rate"]

    study.run(run_arm, 1, False)
    assert asked[4:] == [("nll", 1e-3, 1), ("neg_p", 1e-2, 1)]
    more = make({**GRID, "preset": "short", "seed": [0, 1], "probe": "org/old", "max_drift": 0.3})
    assert {name for name in more.fingerprint() if more.fingerprint()[name] != plan.fingerprint().get(name)} == {"max_drift"}


def test_each_is_shown_at_its_best_temperature(make, tmp_path):
    values = [
        ({"objective": name, "learning_rate": 1e-3, "seed": seed}, (1, 1, 1)) for name in ("nll", "neg_p") for seed in (0, 1)
    ]
    board = board_of(make, values)
    for index, result in enumerate(board.arms.values()):
        sampled = {
            "t/m": 0.9,
            "t/m@T1": 0.1 * index,
            "t/m@T0.5": 0.3,
            "t/m@T0.25,pass@2": 0.5,
            "t/loss@T0.5": 2.0,
            "t/loss@T1": 1.0,
        }
        result.rulers.update(with_best(sampled, ["t/loss@T0.5", "t/loss@T1"]))
        result.lower_is_better.extend(["t/loss@T0.5", "t/loss@T1", "t/loss@best"])
    board = rank(replace(board.plan, rank_by="t/m@best"), board.arms, lambda index: None, {})
    nll, neg_p = sorted(board.rows, key=lambda row: row.name, reverse=True)
    assert (nll.values["t/m@best"][0], nll.temperatures["t/m@best"]) == (pytest.approx(0.3), 0.5)
    assert (neg_p.values["t/m@best"][0], neg_p.temperatures["t/m@best"]) == (pytest.approx(0.3), 0.5)
    assert (nll.values["t/loss@best"][0], nll.temperatures["t/loss@best"]) == (1.0, 1.0)
    header, rows = comparison(board)
    assert [name for name in header if name.startswith("t/")] == ["t/m@best", "t/m", "t/m@best,pass@2", "t/loss@best"]
    assert rows[0][header.index("t/m@best")] == "0.3 (0.3, 0.3) at temperature 0.5"
    assert "t/m@T0.5" in arms_csv(board).splitlines()[0]
    assert "METRIC@best is each run's best" in markdown(board, tmp_path, "accelerate launch")


def test_intervals_of_shares_stay_within_their_bounds(make, tmp_path):
    hits = {"nll": [(9, 9, 9), (0, 1, 0), (0, 0, 0)], "neg_p": [(9, 9, 8), (9, 9, 9), (1, 0, 0)]}
    settings = [
        ({"objective": name, "learning_rate": 1e-2, "seed": seed}, each)
        for name, rows in hits.items()
        for seed, each in enumerate(rows)
    ]
    board = board_of(make, settings, (9, 9, 9), seed=[0, 1, 2])
    for index, result in board.arms.items():
        found = result.rulers["accuracy"]
        result.rulers.update({"drift": [0.0, 0.0, 5.0][index % 3], "task/exact_match": found, "task/bleu": 30 * found})
    board = rank(board.plan, board.arms, lambda index: None, {})
    for row in board.rows:
        for name in ("accuracy", "task/exact_match"):
            assert row.values[name][1] == (0, 1)
        assert row.values["drift"][1][0] == 0
        assert row.values["drift"][1][1] > 5
        assert row.values["task/bleu"][1][0] < 0  # of which no bound is known
    low, high = board.rows[1].behind.interval
    assert -1 <= low < high == 1


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_fewer_than_three_seeds_show_their_values(seeds, make, tmp_path):
    settings = [
        ({"objective": name, "learning_rate": 1e-2, "seed": seed}, [base + seed] * 20)
        for name, base in (("nll", 7), ("neg_p", 4))
        for seed in range(seeds)
    ]
    for setting, hits in settings:
        hits[0] += setting["seed"] % 2  # so that the difference is another at each seed
    settings[0][1][1] += 1
    board = board_of(make, settings, (10,) * 20, seed=list(range(seeds)))
    first = board.rows[0]
    assert (first.values["accuracy"][1] is None) == (seeds < 3)
    _, rows = comparison(board)
    shown = {1: "0.705", 2: "0.755 (0.705, 0.805)", 3: "0.8033 (0."}[seeds]
    assert rows[0][3].startswith(shown)
    assert "(by seed: 0.305, 0.3)" in rows[1][4] if seeds == 2 else "by seed" not in rows[1][4]
    assert (" to " in rows[1][4]) == (seeds != 2)
    assert shown in markdown(board, tmp_path, "accelerate launch")
    assert page(board, tmp_path, "accelerate launch")


def test_difference_covers_the_truth_where_examples_weigh_unequally():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(500):
        weights = np.ceil(rng.lognormal(3, 1.5, size=40))
        values = 0.3 + rng.normal(0, 1, size=40)
        mean = (values * weights).sum() / weights.sum()
        items = (values - mean) * weights * 40 / weights.sum() + mean
        found = difference(mean, {"examples": items}, weights=weights)
        covered += found.interval[0] <= 0.3 <= found.interval[1]
    assert 0.925 <= covered / 500 <= 0.995


def test_a_clear_winner_is_called_one(make):
    settings = [{"objective": o, "learning_rate": 1e-2, "seed": s} for o in ("nll", "neg_p") for s in (0, 1)]
    tokens = (10,) * 40
    hits = [[2 + (i + k) % 2 for i in range(40)] for k in range(2)] + [
        [8 + (i * 7 + k) % 2 for i in range(40)] for k in range(2)
    ]
    hits[0][0] += 1  # so that the difference is another at each seed
    board = board_of(make, list(zip(settings, hits, strict=True)), tokens)
    assert board.verdict() == "neg_p is ahead by accuracy; all others are worse by more than chance."


def test_what_is_no_evidence_is_not_called_so(make, tmp_path):
    def setting(objective, seed):
        return {"objective": objective, "learning_rate": 1e-2, "seed": seed}

    tokens = (10,) * 40
    one = board_of(make, [(setting("nll", 0), [6] * 40), (setting("neg_p", 0), [5, 4] * 20)], tokens)
    assert one.verdict() == "nll is ahead by accuracy; chance in training can't be told from that with fewer than two seeds."
    assert "over examples alone" in markdown(one, tmp_path, "accelerate launch")
    apart = board_of(make, [(setting("nll", 0), [6] * 40), (setting("neg_p", 1), [5] * 40)], tokens)
    assert "no interval: nothing to pair by" in markdown(apart, tmp_path, "accelerate launch")
    other = [(setting("nll", s), [h] * 40) for s, h in ((0, 9), (1, 5), (2, 5))]
    other += [(setting("neg_p", s), [6] * 40) for s in (1, 2)]
    board = board_of(make, other, tokens, seed=[0, 1, 2])
    assert board.rows[0].name == "nll"
    assert "no significant difference" in board.verdict()  # neg_p is better at each seed that both have
    assert "2 of 3 seeds finished" in markdown(board, tmp_path, "accelerate launch")
    both = [(setting(o, s), [h] * 40) for o, h in (("nll", 5), ("neg_p", 5), ("power", 2)) for s in (0, 1)]
    for each, hits in both[4:]:
        each["objective"] = {"name": "power", "alpha": 2}
        hits[0] += each["seed"]  # so that the difference is another at each seed
    assert board_of(make, both, tokens).verdict() == "nll; neg_p tie by accuracy; all others are worse by more than chance."
    tie = board_of(make, [(setting(o, s), [5] * 40) for o in ("nll", "neg_p") for s in (0, 1)], tokens)
    assert tie.verdict() == "All tie by accuracy, at 0.5: it tells nothing here. Rank by another metric."
    nothing = rank(tie.plan, {}, lambda index: None, {0: ({"objective": "nll"}, "no luck")})
    assert nothing.verdict() == "No run finished."
    assert "no luck" in page(nothing, tmp_path, "accelerate launch")


def test_rulers_are_made_of_results_or_known():
    found = rulers_in([Result(0, {}, {"task/acc": 0.5, "nll": 2.0})])
    assert [ruler.name for ruler in found] == ["nll", "perplexity", "task/acc"]
    assert RULERS["perplexity"].of({"nll": 2.0}) == pytest.approx(math.exp(2))
    assert RULERS["perplexity"].of({"nll": 1e5}) == math.inf
    with pytest.raises(RecipeError, match="`rank_by: drift` is not among what was measured: nll"):
        RULERS["drift"].of({"nll": 2.0})
    diverse = Result(0, {}, {"t/distinct_answers": 0.5, "t/answer_entropy:macro": 0.5})
    assert [(ruler.better, ruler.bounds, ruler.sign) for ruler in rulers_in([diverse])] == [
        (None, (0, 1), 1), (None, (0, math.inf), 1),
    ]  # fmt: skip
    assert with_best({"t/acc@T1": 0.5, "t/answer_entropy@T1": 0.5}).keys() == {"t/acc@T1", "t/acc@best", "t/answer_entropy@T1"}
    results = [Result(0, {}, {"a": 0.5, "b": 7.0, "c": 0.5}, lower_is_better=["c"])]
    made = {name: ruler_named(name, results) for name in "abc"}
    assert {name: (ruler.better, ruler.bounds) for name, ruler in made.items()} == {
        "a": ("higher", (0, 1)), "b": ("higher", (-math.inf, math.inf)), "c": ("lower", (-math.inf, math.inf)),
    }  # fmt: skip
    assert (study_direction("c"), study_value("c", results[0])) == ("maximize", -0.5)
    assert (study_direction("nll"), study_value("nll", Result(0, {}, {"nll": 2.0}))) == ("minimize", 2.0)


def test_a_report_on_held_out_data_is_read_whole_or_not_at_all(tmp_path):
    path = tmp_path / "held_out" / "report.json"
    path.parent.mkdir()
    part = dict.fromkeys(("kl", "base_prob", "prob", "base_nll", "nll", "base_top1", "top1"), 0.5)
    part |= {"calibration": {"base": {"error": 0.1}, "tuned": {"error": 0.2}}, "examples": 3, "tokens": 9}
    probe = {"kl": 0.7, "base_top1": 0.8, "top1": 0.5}
    report = {"compare": {"train": part, "probe": probe}, "versions": {"torch": "2"}}
    path.write_text(json.dumps(report))
    found = read_held_out(tmp_path)
    assert (found.examples, found.tokens, found.versions) == (3, 9, {"torch": "2"})
    assert (found.rulers["drift"], found.base["drift"], found.rulers["calibration_error"]) == (0.7, 0.0, 0.2)
    assert (found.rulers["forgetting"], found.base["forgetting"]) == (pytest.approx(0.3), 0.0)
    for text, why in (
        ("{", "Expecting property name"),
        ("[]", "list indices must be"),
        (json.dumps({}), "it has no `compare`"),
    ):
        path.write_text(text)
        with pytest.raises(MeasurementError, match=rf"Cannot read .*report\.json: {why}.* again with `--retry_failed`\."):
            read_held_out(tmp_path)
    path.unlink()
    with pytest.raises(MeasurementError, match=r"report\.json: .*No such file"):
        read_held_out(tmp_path)


def test_runs_of_different_versions_are_told(make, tmp_path):
    settings = [{"objective": o, "learning_rate": 1e-2, "seed": 0} for o in ("nll", "neg_p")]
    board = board_of(make, [(setting, (1, 1, 1)) for setting in settings])
    assert "different versions" not in summary(board, tmp_path)
    for index, version in enumerate(("0.1", "0.2")):
        board.arms[index].versions.update({"bl_trainer": version, "lm_eval": "0.4", "torch": version})
    said = "Runs used different versions of bl_trainer (0.1, 0.2)."
    for text in (summary(board, tmp_path), markdown(board, tmp_path, "x"), page(board, tmp_path, "x")):
        assert said in text
    assert "lm_eval" not in summary(board, tmp_path)


def test_odd_values(make, tmp_path):
    settings = [{"objective": o, "learning_rate": 1e-2, "seed": s} for o in ("nll", "neg_p") for s in (0, 1)]
    board = board_of(make, [(each, (1, 1, i % 3)) for i, each in enumerate(settings)])
    for result in board.arms.values():
        is_nll = result.setting["objective"] == "nll"
        result.rulers.update({"nll": 4e4 if is_nll else 1.0, "wiki/word_perplexity": 10.0 if is_nll else 5000.0})
        result.lower_is_better.append("wiki/word_perplexity")
    again = rank(replace(board.plan, rank_by="wiki/word_perplexity"), board.arms, lambda index: None, {})
    assert [row.name for row in again.rows] == ["nll", "neg_p"]
    assert "inf" in arms_csv(again)
    assert "inf" in markdown(again, tmp_path, "accelerate launch")
    assert page(again, tmp_path, "accelerate launch")


def test_text_from_data_is_escaped_and_odd_arms_are_named(make, tmp_path):
    settings = [{"objective": "nll", "run_name": "<b>|$x$", "learning_rate": 1e-3, "seed": s} for s in (0, 1)]
    board = board_of(make, [(setting, (1, 1, 1)) for setting in settings])
    board.failed[7] = ({"objective": "neg_p"}, "<script>")
    text = page(board, tmp_path, "accelerate launch")
    assert "<b>" not in text
    assert text.count("<script>") == 1, "the page's own, of the copy buttons"
    assert "&lt;script&gt;" in text
    assert "<b>\\|$x$" in markdown(board, tmp_path, "accelerate launch")
    board.arms[1] = replace(board.arms[1], tokens=7)
    assert "Their metrics can't be compared" in markdown(board, tmp_path, "accelerate launch")


def test_a_best_rate_at_the_edge_is_said(make, tmp_path):
    rates = (1e-3, 1e-2, 1e-1)
    values = [({"objective": "nll", "learning_rate": rate, "seed": 0}, (i, 1, 1)) for i, rate in enumerate(rates)]
    board = board_of(make, values, (3, 1, 1), learning_rate=list(rates))
    assert board.rows[0].at_edge == ["its best learning rate, 0.1, is the greatest tried"]
    assert "nll: its best learning rate, 0.1, is the greatest tried; a wider range may do better." in summary(board, tmp_path)


def test_the_edge_is_that_of_the_objectives_own_rates(make):
    """nll was tried at 1e-4 to 1e-2 and is best at 1e-2, neg_p at 1e-2 to 1, is best at 1e-1, and failed at 1."""
    tried = {"nll": (1e-4, 1e-3, 1e-2), "neg_p": (1e-2, 1e-1, 1.0)}
    arms = [{"objective": name, "learning_rate": rate} for name, rates in tried.items() for rate in rates]
    merits = (0, 1, 3, 1, 2)
    values = [({**arm, "seed": 0}, (merit, 1, 1)) for arm, merit in zip(arms, merits, strict=False)]
    board = board_of(make, values, (3, 1, 1), arms=arms, seed=[0])
    edges = {row.name: row.at_edge for row in board.rows}
    assert edges == {"nll": ["its best learning rate, 0.01, is the greatest tried"], "neg_p": []}


# The verb


def verb(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main(["sweep", *argv])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_mistakes_on_the_command_line(make, tmp_path, capsys, monkeypatch):
    make(GRID)
    config = ["--config", str(tmp_path / "recipe.yaml")]
    both = [*config, "--sweep", str(tmp_path / "sweep.yaml")]
    assert "error: `--sweep` is missing" in verb(capsys, *config)
    assert "error: Cannot read the sweep file" in verb(capsys, *config, "--sweep", str(tmp_path / "no.yaml"))
    assert "error: `--jobs 0` must be at least 1" in verb(capsys, *both, "--jobs", "0")
    assert "error: `push_to_hub: true` would push every run" in verb(capsys, *both, "--push_to_hub", "true")
    assert "has no split 'nope' to hold out, only 'train', 'test'" in verb(
        capsys, *both, "--dataset_test_split", "nope", "--eval_strategy", "no"
    )
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**GRID, "held_out": str(tmp_path / "nope.jsonl")}))
    assert "nope.jsonl`: there is no such file" in verb(capsys, *both)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**GRID, "held_out": "nobody/nothing"}))
    assert "error: Cannot load the test data nobody/nothing" in verb(capsys, *both)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**GRID, "arms": [{"objective": "nll"}, {"objective": "asft"}]}))
    assert "In the run asft, learning_rate 0.01: Objective 'asft' needs a reference" in verb(capsys, *both, "--dry_run", "true")
    assert "Objective 'asft' needs a reference model" in verb(capsys, *both)
    assert "Cannot use `--gpu_ids` in `--launch`" in verb(capsys, *both, "--launch", "--gpu_ids 0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "A sweep launches its runs itself" in verb(capsys, *both)
    assert not (tmp_path / "out-sweep").exists()


def test_dry_run_shows_arms_and_cost(make, tmp_path, capsys):
    make({**GRID, "seed": [0, 1, 2]}, max_steps=5, per_device_train_batch_size=4)
    main(["sweep", "--config", str(tmp_path / "recipe.yaml"), "--sweep", str(tmp_path / "sweep.yaml"), "--dry_run", "true"])
    said = capsys.readouterr().out
    assert "12 runs: 4 settings at seeds 0, 1, 2:\n  nll, learning_rate 0.001\n" in said
    each, total = (int(n.replace(",", "")) for n in re.search(r"about ([\d,]+) tokens .* on about ([\d,]+)\.", said).groups())
    assert total == pytest.approx(12 * each, abs=12)
    assert "5 steps of 4 rows" in said
    assert not (tmp_path / "out-sweep").exists()


def test_an_arm_is_named_by_the_whole_loss_that_it_trains(make):
    """What an arm leaves to the recipe is part of its name and of its group."""
    rate = {"learning_rate": [1e-3], "seed": [0]}
    arms = [{"objective": "nll"}, {"objective": "nll", "threshold": None}, {"threshold": 0.5}, {"weight_decay": 0.1}]
    plan = make({"arms": arms, **rate}, objective="neg_p", threshold=0.2)
    names = ["nll, p >= 0.2", "nll", "neg_p, p >= 0.5", "weight_decay 0.1"]
    assert [describe(plan.group_of(point)) for point in plan.points()] == names
    assert [plan.recipe_of(point).get("threshold") for point in plan.points()] == [0.2, None, 0.5, 0.2]
    assert [describe(point) for point in make({"objective": ["nll"], **rate}, threshold=0.2).points()] == [
        "nll, p >= 0.2, learning_rate 0.001"
    ]


def test_dropped_rows_cost_nothing(make, data_folder, tmp_path, capsys):
    """`drop_rows` leaves half of the rows to the runs that have it; scores of other data stop the sweep."""
    rows = [json.loads(line) for line in (data_folder / "train.jsonl").read_text().splitlines()]
    scores = {"row": [*range(len(rows))], "row_hash": [*map(row_hash, rows)], "score": [i % 2 for i in range(len(rows))]}
    pq.write_table(pa.table(scores), tmp_path / "scores.parquet")
    rule = f"{tmp_path / 'scores.parquet'} score > 0"
    make({**GRID, "arms": [{"objective": "nll"}, {"objective": "nll", "drop_rows": rule}]})
    argv = ["sweep", "--config", str(tmp_path / "recipe.yaml"), "--sweep", str(tmp_path / "sweep.yaml"), "--dry_run", "true"]
    main(argv)
    said = capsys.readouterr().out
    pattern = r"about ([\d,]+) tokens \(\d epoch\(s\) of (\d+) rows"
    (every, of_all), (some, of_kept) = ((int(n.replace(",", "")), int(rows)) for n, rows in re.findall(pattern, said))
    assert (of_all, of_kept) == (len(rows), len(rows) / 2)
    lengths = [len(row["prompt"] + row["completion"]) for row in rows]  # a token a character
    assert some / every == pytest.approx(sum(lengths[::2]) / sum(lengths), rel=0.02)
    pq.write_table(pa.table({**scores, "row_hash": scores["row_hash"][::-1]}), tmp_path / "scores.parquet")
    with pytest.raises(SystemExit):
        main(argv)
    assert "row 0 of the training set is another one in the scores" in capsys.readouterr().err


def test_an_arm_s_data_are_looked_at_with_its_own_rate(make, tmp_path, capsys):
    """A schedule that ends at 1e-3 is refused at TRL's own learning rate, and not at these."""
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-3}, "learning_rate": 1e-2}
    ranges = {"arms": GRID["arms"], "learning_rate": {"low": 2e-3, "high": 1e-1}, "trials": 6}
    for sweep in ({**GRID, "learning_rate": [1e-2, 1e-1]}, ranges):
        make(sweep, **schedule)
        config = ["--config", str(tmp_path / "recipe.yaml"), "--sweep", str(tmp_path / "sweep.yaml")]
        main(["sweep", *config, "--launch", "--multi_gpu", "--dry_run", "true"])
        assert "Each trains on about" in capsys.readouterr().out


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    assert device_shares(1, True) is None
    assert device_shares(2, False) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    assert device_shares(3, False) == ["3", "5", "7"]
    with pytest.raises(RecipeError, match=r"`--jobs 4`: there are 3 GPUs\. Write at most 3 jobs"):
        device_shares(4, False)


def test_a_run_keeps_its_share_whatever_the_launchers_configuration_names(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    config = Path(__file__).parents[1] / "configs" / "accelerate" / "single_gpu.yaml"
    runner = SimpleNamespace(launch=f"--config_file {config}", devices=["3"], jobs=1)
    _, environment = launching(*Arm._launched(SimpleNamespace(runner=runner), "train")[3:])
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_run_has_its_share_of_the_cores_unless_the_user_sets_threads(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    arm = SimpleNamespace(runner=Runner(None, Path("s"), None, None, 2), folder=Path("s"), job=0)
    for threads in ("4", "3"):
        assert Arm._launched(arm, "train")[3:][: len(CPU_LAUNCH.split()) + 1] == [*CPU_LAUNCH.split(), threads]
        assert Arm._environment(arm, "held_out")["OMP_NUM_THREADS"] == threads
        monkeypatch.setenv("OMP_NUM_THREADS", "3")


# Real arms


def test_real_arms_survive_a_kill_and_are_judged_by_what_they_left(checkpoint, data_folder, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    recipe = write_recipe(tmp_path, checkpoint, data_folder, stop_on_nan=True, learning_rate=1e-2, **options)
    arms = [{"objective": "nll"}, {"objective": "neg_p"}, {"objective": "nll", "learning_rate": 1e30}]
    sweep = {"arms": arms, "learning_rate": [1e-2], "seed": [0], "probe": str(data_folder / "train.jsonl")}
    sweep["evaluate"] = {"tasks": ["completion"], "data": [f"completion={data_folder / 'test.jsonl'}"], "max_new_tokens": 3}
    sweep["evaluate"] |= {"temperatures": [1.0, 0.5], "samples": 2}
    sweep |= {"rank_by": "completion/exact_match", "retain": "completion/normalised_match", "max_drift": 0.5}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))

    argv = ["--config", str(recipe), "--sweep", str(tmp_path / "sweep.yaml"), "--sweep_dir", str(tmp_path / "s")]
    argv += ["--launch", f"{CPU_LAUNCH} 2"]

    worker = Forked(sweeping.verb, tmp_path, argv)
    model = tmp_path / "s" / "arms" / "000" / "model"
    while not list(model.glob("checkpoint-*")):
        assert worker.poll() is None
        time.sleep(0.01)
    worker.kill()
    worker.communicate()
    _, said = (worker := Forked(sweeping.verb, tmp_path, argv)).communicate(timeout=900)
    assert worker.returncode == 0, said
    assert "Runs start as new processes" not in said
    assert "Leaderboard: " in said
    with (tmp_path / "s" / "leaderboard.csv").open() as file:
        first, second, failed = csv.DictReader(file)
    assert "train: The loss is nan in step" in failed["failed"] or "train: The gradient of step" in failed["failed"]
    for row in (first, second):
        report = tmp_path / "s" / "arms" / f"{int(row['arm']):03d}" / "held_out"
        with (report / "compare.csv").open() as file:
            rows = [{key: float(value) for key, value in each.items()} for each in csv.DictReader(file)]
        tokens = sum(each["tokens"] for each in rows)
        assert len(rows) == 8
        assert float(row["nll"]) == pytest.approx(sum(each["nll"] for each in rows) / tokens, rel=1e-9)
        assert float(row["perplexity"]) == pytest.approx(math.exp(float(row["nll"])))
        assert float(row["accuracy"]) == pytest.approx(sum(each["top1"] for each in rows) / tokens)
        assert float(row["target_prob"]) == pytest.approx(sum(each["prob"] for each in rows) / tokens)
        with (report / "probe.csv").open() as file:
            probe = [{key: float(value) for key, value in each.items()} for each in csv.DictReader(file)]
        assert float(row["drift"]) == pytest.approx(sum(e["kl"] for e in probe) / sum(e["tokens"] for e in probe))
        log = [json.loads(line) for line in (report.parent / "model" / "metrics.jsonl").read_text().splitlines()]
        last = [line["eval_nll"] for line in log if "eval_nll" in line][-1]
        assert last == pytest.approx(float(row["nll"]), rel=1e-5)  # the trainer's own evaluation of the same data
        assert float(row["loss"]) == pytest.approx(log[-1]["train_loss"])
        tasks = report.parent / "tasks"
        (samples,) = tasks.glob("samples/*/completion.jsonl")
        hits = [json.loads(line)["metrics"]["exact_match"] for line in samples.read_text().splitlines()]
        assert len(hits) == 8
        assert float(row["completion/exact_match"]) == pytest.approx(sum(hits) / 8)
        sampled = [float(row[f"completion/exact_match@{at}"]) for at in ("T1", "T0.5", "best")]
        assert sampled[2] == max(sampled[:2])
        assert {"completion@T1.jsonl", "completion@T0.5.jsonl"} <= {path.name for path in tasks.glob("samples/*/*")}
        base = base_scores(tmp_path / "s")["completion/normalised_match"]
        assert float(row["forgetting"]) == pytest.approx(base - float(row["completion/normalised_match"]))
    assert "| the base model |" in (tmp_path / "s" / "leaderboard.md").read_text()
    page = (tmp_path / "s" / "leaderboard.html").read_text()
    assert page.count("<picture>") == 3
    assert page.count("<script") == 1
    winner = yaml.safe_load((tmp_path / "s" / "winner.yaml").read_text())
    assert winner["learning_rate"] == 1e-2
    assert Recipe.read(["--config", str(tmp_path / "s" / "winner.yaml")]).training.objective in ("nll", "neg_p")


def test_composed_arms_have_names_and_are_no_points_of_the_family():
    setting = {"objective": {"name": "power", "alpha": {"from": 0, "to": 2}, "mix": {"nll": 0.1}}, "learning_rate": 1e-5}
    assert describe(setting) == "power 0 to 2 + 0.1 nll, learning_rate 1e-05"
    groups = [{"name": "power", "alpha": 3}, "neg_p", setting["objective"], {"name": "neg_p", "floor": 0.1}]
    rows = [SimpleNamespace(group={"objective": group}, values={"nll": i}) for i, group in enumerate(groups)]
    assert alpha_curves(SimpleNamespace(rows=rows, plan=SimpleNamespace(rank_by="nll"))) == {3.0: 0, 1.0: 1}
