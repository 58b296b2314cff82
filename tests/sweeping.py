"""A sweep with arms that are quick, in a process that was forked; its arms' commands are this file.

The study, its storage, the processes, their guards, checkpoints and kills are real; what an arm computes is not.
"""

import csv
import json
import os
import sys
import time
from pathlib import Path

import yaml

STEPS = 6
ROWS = 5


def value_at(setting, step):
    """What an arm has after a step; each needs the one before."""
    value = 0.0
    for i in range(step):
        value = (value * 31 + sum(map(ord, json.dumps(setting))) + i) % 97
    return value


def train(recipe):
    output = Path(recipe["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    if (output / "final").exists():
        return
    state = output / "checkpoint"
    step = int(state.read_text()) if state.exists() else 0
    setting = {key: recipe.get(key) for key in ("objective", "learning_rate", "seed")}
    if recipe["learning_rate"] > 1:
        print("error: The loss is nan in step 1.", file=sys.stderr)
        sys.exit(2)
    while step < STEPS:
        time.sleep(0.03)
        step += 1
        with (output / "steps").open("a") as file:
            file.write(f"{step}\n")
        line = {"step": step, "max_steps": STEPS, "eval_nll": 9 - step + recipe["learning_rate"]}
        with (output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        part = output / "part"
        part.write_text(str(step))
        part.replace(state)
    (output / "final").write_text(str(value_at(setting, STEPS)))


def measure(model, report):
    value = float((model / "final").read_text())
    report.mkdir(exist_ok=True)
    rows = [[row, row + 1, *(value * (row + 1) / 100 for _ in range(9))] for row in range(ROWS)]
    names = ("kl", "reverse_kl", "js", "base_prob", "prob", "base_nll", "nll", "base_top1", "top1")
    with (report / "compare.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["row", "tokens", *names], *rows])
    calibration = {"base": {"error": 0.1}, "tuned": {"error": 0.2}}
    part = {**dict.fromkeys(names, value / 100), "calibration": calibration, "tokens": 15, "examples": ROWS}
    (report / "report.json").write_text(json.dumps({"compare": {"train": part}, "versions": {"bl_trainer": "0"}}))


def sweep(folder, storage, start):
    from bl_trainer.recipe.recipe import Recipe
    from bl_trainer.sweep import process, study
    from bl_trainer.sweep.arm import Arm, Runner
    from bl_trainer.sweep.leaderboard import judge
    from bl_trainer.sweep.page import write_leaderboard
    from bl_trainer.sweep.plan import Plan
    from bl_trainer.sweep.verb import failures

    study.HEARTBEAT, study.GRACE, study.POLL = 1, 4, 0.1
    Arm._launched = lambda self, *command: [sys.executable, __file__, *command]
    step = Arm._step

    def quick(self, name, command, trial=None):
        step(self, name, command if name == "train" else [sys.executable, __file__, "measure", str(self.folder)], trial)

    Arm._step = quick
    recipe = Recipe.read(["--config", str(folder / "recipe.yaml")])
    own = folder / "sweep"
    plan = Plan.read(recipe, str(folder / "sweep.yaml"), own)
    own.mkdir(exist_ok=True)
    kept = study.Study(plan, own, storage)
    runner = Runner(plan, own, None, None, 2, start=getattr(process, start))

    def run(index, setting, trial, job):
        with (own / "begun").open("a") as file:
            file.write(f"{index}\n")
        return runner(index, setting, trial, job)

    kept.run(run, 2, False)
    runner.close()
    write_leaderboard(judge(plan, own, failures(kept)), own, "accelerate launch")


def verb(log, argv):
    """Run the sweep verb in a process that was forked, with its output in a file."""
    from bl_trainer.cli import main

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    main(["sweep", *argv])


def forked(log, folder, storage=None, start="Guarded"):
    """Sweep in a process that was forked, with its output in a file; `start`: how it starts its arms."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sweep(folder, storage, start)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(yaml.safe_load(Path(sys.argv[3]).read_text()))
    elif sys.argv[1] == "measure":
        measure(Path(sys.argv[2]) / "model", Path(sys.argv[2]) / "held_out")
