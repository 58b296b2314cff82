"""One arm of a sweep: the recipe in its folder, trained, measured on held-out data, and evaluated, by commands of their own."""

import json
import math
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import yaml
from filelock import FileLock

from .._util.files import write_text
from ..errors import RecipeError
from ..training.checkpoints import quantization_of
from ..training.metrics_log import Curve
from . import guard, study
from .checks import check_arm
from .design import MODEL_KEYS, evaluate_argv
from .outcome import Result, arm_folder, base_scores, read_held_out, task_scores, task_versions
from .plan import Plan
from .process import LAUNCHER, Guarded, Running, Start
from .rulers import RULERS, show, study_value, temperatures_of, with_best
from .study import FORGETTING, REASON, ArmError

ATTEMPTS = 3  # of an arm that something kills

KILLED = re.compile(r"SIGKILL|SIGTERM|SIGSEGV|SIGBUS|exitcode\s*: -\d+|Signal \d+")

CPU_LAUNCH = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process"


@dataclass
class Runner:
    """Runs arms in `folder`/arms.

    `launch`: options of `accelerate launch`, or None for its configured ones, or one process on a CPU. `devices`: for each
    job the GPUs that it may use, as CUDA_VISIBLE_DEVICES takes them; None on a CPU. `tell`: takes an arm, what it does, and the
    share of its training that is done, None if that is as before. `held_out`: the recipe to measure by on held-out data, but
    for an arm's model. `start`: how commands are run.
    """

    plan: Plan
    folder: Path
    launch: str | None
    devices: list[str] | None
    jobs: int
    held_out: dict[str, Any] = field(default_factory=dict)
    start: Start = Guarded
    tell: Callable[[int, str, float | None], None] = lambda index, what, share: None
    running: set[Running] = field(default_factory=set)
    lock: Any = field(default_factory=threading.RLock)

    @property
    def threads(self) -> str:
        """How many threads a process may use: OMP_NUM_THREADS if that is set, else a run's share of the cores."""
        return os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // self.jobs))

    def __call__(self, index: int, setting: dict[str, Any], trial: optuna.Trial, job: int) -> float:
        """Run an arm, or what is left of it, and return the ruler that it is ranked by. Raises ArmError, TrialPruned."""
        arm = Arm(self, index, setting, job)
        found = Result.read(arm.folder)
        if found is None:
            found = arm.run(trial)
        elif found.setting != setting:
            raise RecipeError(f"{arm.folder} holds the results of {found.setting}, not of {setting}. Remove the folder.")
        if trial is not None and "forgetting" in found.rulers:
            trial.set_user_attr(FORGETTING, found.rulers["forgetting"])
        value = study_value(self.plan.rank_by, found)
        if not math.isfinite(value):
            raise ArmError(f"{self.plan.rank_by} is {value}")
        return value

    def close(self) -> None:
        """Stop all arms."""
        with self.lock:
            for process in self.running:
                process.stop()


class Arm:
    """One arm, in its folder."""

    def __init__(self, runner: Runner, index: int, setting: dict[str, Any], job: int):
        self.runner, self.plan, self.index, self.setting, self.job = runner, runner.plan, index, setting, job
        self.folder = arm_folder(runner.folder, index)
        self.model = self.folder / "model"
        self.is_whole = True  # nothing has killed a step

    def run(self, trial: optuna.Trial) -> Result:
        is_new, begun = not self.folder.exists(), time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = {**self.plan.recipe_of(self.setting), "output_dir": str(self.model)}
        if recipe.get("report_to") not in (None, "none", [], ["none"]):
            recipe["run_name"] = f"{self.runner.folder.name}-{self.index:03d}"
        write_yaml(self.folder / "recipe.yaml", recipe)
        write_yaml(self.folder / "held_out.yaml", self._held_out())
        self._step("train", self._launched("train", "--config", str(self.folder / "recipe.yaml")), trial)
        probe = ["--probe", self.plan.probe] if self.plan.probe else []
        measured = ["--report", str(self.folder / "held_out"), "--overwrite", "--max_tokens", "0"]
        measured += ["--draw", "false", "--compare", str(self.model)]
        config = ["--config", str(self.folder / "held_out.yaml")]
        self._step("measure", [sys.executable, "-m", "bl_trainer", "diagnose", *config, *measured, *probe])
        if self.plan.evaluate:
            self._step("evaluate", evaluation(self.plan, self.model, self.folder / "tasks"))
        result = self._result(time.monotonic() - begun if is_new and self.is_whole else None)
        for name, value in result.rulers.items():
            if not math.isfinite(value):
                raise ArmError(f"measure: {name} is {value}")
        result.write(self.folder)
        return result

    def _held_out(self) -> dict[str, Any]:
        """Return the recipe to measure by: the sweep's own, so that all arms are measured alike, with this arm's model."""
        own = {key: value for key, value in self.setting.items() if key in MODEL_KEYS}
        return {**self.runner.held_out, **own, "output_dir": str(self.folder / "unused")}

    def _launched(self, *command: str) -> list[str]:
        launch = self.runner.launch
        if launch is None and self.runner.devices is None:
            launch = f"{CPU_LAUNCH} {self.runner.threads}"
        options = shlex.split(launch or "")
        if self.runner.jobs > 1 and "--main_process_port" not in options:
            options += ["--main_process_port", str(_free_port())]
        if self.runner.devices is not None:
            options += ["--gpu_ids", "all"]  # of its share; a configuration may name one for all runs
        return [sys.executable, "-m", LAUNCHER, *options, "-m", "bl_trainer", *command]

    def _environment(self, step: str) -> dict[str, str]:
        own = {guard.MARK: str(self.folder.absolute()), "PYTHONUNBUFFERED": "1"}
        if self.runner.devices is not None:
            share = self.runner.devices[self.job]
            own["CUDA_VISIBLE_DEVICES"] = share if step == "train" else share.split(",")[0]
        elif step != "train":
            own["OMP_NUM_THREADS"] = self.runner.threads
        return {**os.environ, **own}

    def _step(self, name: str, command: list[str], trial: optuna.Trial | None = None) -> None:
        """Run a command to its end, again if something kills it. Raises ArmError, TrialPruned."""
        for attempt in range(1, ATTEMPTS + 1):
            self.is_whole &= attempt == 1
            self.runner.tell(self.index, name, None if name == "train" else 1.0)
            log = self.folder / f"{name}.log"
            log.touch()  # a process may be killed before it opens it
            start = log.stat().st_size
            guard.stop(str(self.folder.absolute()))  # of a guard, or a sweep, that was killed
            code = self._watch(name, command, log, trial)
            if code == 0:
                return
            said = _said(log, start)
            reason = _reason(said)
            if reason is not None or attempt == ATTEMPTS or not (code > 128 or code < 0 or KILLED.search(said)):
                killed = f"killed {attempt} times, perhaps for lack of memory" if attempt == ATTEMPTS else f"exit code {code}"
                raise ArmError(f"{name}: {reason or killed} ({log})")

    def _watch(self, name: str, command: list[str], log: Path, trial: optuna.Trial | None) -> int:
        """Run a command, and report how far training is meanwhile."""
        folder, runner = str(self.folder.absolute()), self.runner
        with runner.lock:
            process = runner.start(folder, command, self._environment(name), log)
            runner.running.add(process)
        try:
            curve = Curve(self.model)
            while (code := process.poll()) is None:
                time.sleep(study.POLL / 4)
                if trial is not None:
                    self._report(curve, trial)
            return code
        finally:
            with runner.lock:
                runner.running.discard(process)
            process.stop()
            process.wait()
            guard.stop(folder)

    def _report(self, curve: Curve, trial: optuna.Trial) -> None:
        """Show how far training is, and let the pruner see the ruler."""
        logged = RULERS[self.plan.rank_by].logged if self.plan.rank_by in RULERS else None
        for line in curve.new():
            self.runner.tell(self.index, f"step {line['step']}/{line['max_steps']}", line["step"] / line["max_steps"])
            value = line.get(logged or "")
            if value is not None:
                trial.report(value, line["step"])
                if trial.should_prune():
                    trial.set_user_attr(REASON, f"pruned at step {line['step']}, {self.plan.rank_by} {show(value)}")
                    raise optuna.TrialPruned

    def _result(self, seconds: float | None) -> Result:
        """Return what the reports on the held-out data and on tasks say, of the arm and of the base model."""
        held_out, tasks = read_held_out(self.folder), task_scores(self.folder / "tasks")
        lower_is_better = [name for name, score in tasks.items() if score["higher_is_better"] is False]
        scores = with_best({name: score["value"] for name, score in tasks.items()}, lower_is_better)
        lower_is_better += [name for name in scores if {*temperatures_of(name, scores)} & {*lower_is_better}]
        losses, tokens = (Curve(self.model).points(key) for key in ("train_loss", "num_tokens"))
        devices = self.runner.devices
        return Result(
            index=self.index,
            setting=self.setting,
            rulers=held_out.rulers | self._forgetting(scores, lower_is_better) | scores,
            base=held_out.base,
            lower_is_better=lower_is_better,
            loss=losses[-1][1] if losses else None,
            examples=held_out.examples,
            tokens=held_out.tokens,
            versions={**task_versions(self.folder / "tasks"), **held_out.versions},
            trained_tokens=int(tokens[-1][1]) if tokens else None,
            seconds=seconds,
            devices=devices[self.job].count(",") + 1 if devices else 0,
        )

    def _forgetting(self, scores: dict[str, float], lower_is_better: list[str]) -> dict[str, float]:
        """Return what of `retain` this run has lost, if the plan names it."""
        name = self.plan.retain
        if name is None:
            return {}
        base = base_scores(self.runner.folder)
        if name not in scores or name not in base:
            raise RecipeError(f"`retain: {name}` is not among what is measured: {', '.join(scores)}.")
        return {"forgetting": (base[name] - scores[name]) * (-1 if name in lower_is_better else 1)}


def write_yaml(path: Path, recipe: dict[str, Any]) -> None:
    """Write a recipe in one go."""
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))


def evaluation(plan: Plan, model: str | Path, output: Path, **others: str) -> list[str]:
    """Return the command that evaluates a checkpoint on a plan's tasks, with these options of the verb besides."""
    options = evaluate_argv({**(plan.evaluate or {}), **others})
    return [sys.executable, "-m", "bl_trainer", "evaluate", "--model", str(model), "--output", str(output), *options]


def base_evaluation(plan: Plan, output: Path) -> list[str]:
    """Return the command that evaluates the model that the first run starts from, as that run loads it."""
    recipe = check_arm(plan.recipe_at(plan.points()[0]))
    config = recipe.quantization_config
    recorded = quantization_of({"quantization": config.to_dict()}) if config else {}
    others = {"quantization": json.dumps(recorded)} if recorded else {}
    return evaluation(plan, str(recipe.model.model_name_or_path), output, **others)


def evaluate_base(plan: Plan, folder: Path, start: Start) -> None:
    """Evaluate the recipe's model in `folder`/base, quantised as the runs' base is, once for all workers.

    Raises RecipeError if that fails, or if the ruler is not among what it gives.
    """
    base = folder / "base"
    base.mkdir(exist_ok=True)
    log, mark = base / "evaluate.log", str(base.absolute())
    with FileLock(base / "evaluate.lock"):
        log.touch()
        place = log.stat().st_size
        command = base_evaluation(plan, base / "tasks")
        process = start(mark, command, {**os.environ, guard.MARK: mark}, log)
        try:
            while (code := process.poll()) is None:
                time.sleep(study.POLL / 4)
        finally:
            process.stop()
            process.wait()
        if code:
            said = _said(log, place)
            raise RecipeError(f"The base model can't be evaluated: {_reason(said) or f'exit code {code}'} ({log})")
    scores = base_scores(folder)
    for key, name in (("rank_by", plan.rank_by), ("retain", plan.retain)):
        if name is not None and name not in RULERS and name not in scores:
            raise RecipeError(f"`{key}: {name}` is not among what is measured: {', '.join([*RULERS, *scores])}.")


def _said(log: Path, place: int) -> str:
    """Return what a log holds from a place on."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(place)
        return file.read()


def _reason(said: str) -> str | None:
    """Return what a command said of its failure: our own sentence, or the last exception's line."""
    lines = said.splitlines()
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if own:
        return own[0]
    plain = [re.sub(r"^\[\w+\]:\s*", "", line) for line in lines]  # [rank0]: of a launcher
    raised = [line for line in plain if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    raised = [line for line in raised if "CalledProcessError" not in line and "ChildFailedError" not in line]
    return raised[-1] if raised else None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
