"""The study: which arms are done, under way, or to be run, kept by Optuna so that any number of workers share it.

A worker asks the study for a trial. The trial's place among the fresh ones says which arm it is. So no arm is handed out
twice, and none has to be written down beforehand. A trial whose worker is gone is failed, and asked for again.
"""

import copy
import json
import random
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from .._util.text import sentence
from ..errors import RecipeError
from .design import Setting, are_whole
from .journal import open_journal
from .plan import Plan
from .rulers import study_direction
from .samplers import ArmSampler, pruner_of
from .signature import digest, sign

HEARTBEAT, GRACE = 30, 120  # seconds, in databases
POLL = 1.0  # seconds

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


# What a trial has in its user attributes
WORKER, ARM, SETTING, REASON, SURPLUS = "worker", "arm", "setting", "reason", "surplus"
FORGETTING = "forgetting"


class ArmError(Exception):
    """An arm that failed; the message is its reason."""


class Study:
    """A sweep's study, and this worker's place in it.

    `storage`: the URL of a database, or None for a journal file in `folder`, which must be the same for all workers. Raises
    RecipeError if the study is another sweep's.
    """

    def __init__(self, plan: Plan, folder: Path, storage: str | None = None):
        self.plan, self.folder = plan, folder
        self.name = f"{folder.name}-{digest(plan)}" if storage else "sweep"  # of the many in a database
        (folder / "workers").mkdir(parents=True, exist_ok=True)
        self.worker = uuid.uuid4().hex
        self.is_local = storage is None
        self.lock = self._lock_of(self.worker)  # held for as long as this process lives
        self.lock.acquire()
        self.sampler = ArmSampler(plan, self.index_of)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sign(plan, folder)
        try:
            self.study = self._open(storage)
        except RecipeError:
            raise
        except Exception as error:  # of whatever database it is
            where = f"`--storage {storage.partition(':')[0]}:...`" if storage else f"The study in {folder}"
            raise RecipeError(f"{where} can't be used: {sentence(error)}") from error

    def _open(self, storage: str | None) -> optuna.Study:
        for attempt in range(3):
            try:
                return optuna.create_study(
                    study_name=self.name,
                    storage=self._storage(storage),
                    sampler=self.sampler,
                    pruner=pruner_of(self.plan),
                    direction=study_direction(self.plan.rank_by),
                    load_if_exists=True,
                )
            except Exception:  # two workers that set a new database up at the same time get in each other's way
                if storage is None or attempt == 2:
                    raise
                time.sleep(attempt + random.random())
        raise AssertionError

    def _storage(self, url: str | None) -> Any:
        if url is None:
            return JournalStorage(open_journal(self.folder / "study.journal"))
        retry = RetryHeartbeatStaleTrialCallback()
        return RDBStorage(
            url,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=retry,
            skip_table_creation=False,
        )

    def index_of(self, trial: FrozenTrial) -> int:
        """Return which arm a trial is of: its place among the trials that were not asked for again."""
        trials = self.study.get_trials(deepcopy=False)
        first = trial.system_attrs.get("failed_trial", trial.number)
        return sum("failed_trial" not in other.system_attrs for other in trials[:first])

    def by_arm(self) -> dict[int, list[FrozenTrial]]:
        """Return each arm's trials, but for surplus ones, in the order in which they were made."""
        found: dict[int, list[FrozenTrial]] = {}
        fresh, index = 0, dict[int, int]()
        for trial in self.study.get_trials(deepcopy=False):
            if "failed_trial" in trial.system_attrs:
                index[trial.number] = index[trial.system_attrs["failed_trial"]]
            else:
                index[trial.number], fresh = fresh, fresh + 1
            if index[trial.number] < self.plan.count and SURPLUS not in trial.user_attrs:
                found.setdefault(index[trial.number], []).append(trial)
        return found

    def run(self, run_arm: Callable[[int, Setting, optuna.Trial, int], float], jobs: int, retry_failed: bool) -> None:
        """Call `run_arm(index, setting, trial, job)`, which returns the ruler, in `jobs` threads until no arm is left.

        An arm whose run raises ArmError has failed, and the others continue; failed ones of earlier calls are run again if
        `retry_failed`. Returns when the arms of all workers are done; what else `run_arm` raises ends all threads.
        """
        if retry_failed:
            for trials in self.by_arm().values():
                if _is_over(trials) and trials[-1].state == TrialState.FAIL:
                    self._ask_again(trials[-1], {**trials[-1].user_attrs, REASON: None})
        errors: list[BaseException] = []
        threads = [threading.Thread(target=self._work, args=(run_arm, job, errors), daemon=True) for job in range(jobs)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not errors:
            time.sleep(POLL / 4)
        if errors:
            raise errors[0]

    def _work(self, run_arm: Any, job: int, errors: list[BaseException]) -> None:
        try:
            while True:
                self._reclaim()
                step = self._next()
                if step == "done":
                    return
                if step == "wait":
                    time.sleep(POLL)
                else:
                    try:
                        self.study.optimize(lambda trial: self._run(run_arm, job, trial), n_trials=1, catch=(ArmError, _NotNow))
                    except optuna.exceptions.UpdateFinishedTrialError:  # another worker took this one for dead
                        continue
        except BaseException as error:
            errors.append(error)

    def _next(self) -> str:
        """Say whether there is an arm to run now, whether one may come to be, or whether all are done."""
        arms = self.by_arm()
        known = self.plan.first_stage if self._is_searching(arms) else self.plan.count
        waiting = any(arms[index][-1].state == TrialState.WAITING for index in arms if index < known)
        if waiting or len(arms) < known:
            return "run"
        return "wait" if len(arms) < self.plan.count or not all(map(_is_over, arms.values())) else "done"

    def _is_searching(self, arms: dict[int, list[FrozenTrial]]) -> bool:
        """Whether the first stage isn't over, so that its best settings aren't known."""
        return not all(index in arms and _is_over(arms[index]) for index in range(self.plan.first_stage))

    def _run(self, run_arm: Any, job: int, trial: optuna.Trial) -> float:
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        index, arms = self.index_of(frozen), self.by_arm()
        if index >= self.plan.count or any(_has_right(other, frozen) for other in arms[index]):
            trial.set_user_attr(SURPLUS, True)
            raise optuna.TrialPruned
        trial.set_user_attr(WORKER, [self.worker, socket.gethostname()])
        if index >= self.plan.first_stage and self._is_searching(arms):
            self._ask_again(frozen, {})
            raise _NotNow
        trial.set_user_attr(ARM, index)
        try:
            setting = self._setting(index, trial, arms)
            trial.set_user_attr(SETTING, setting)
            return run_arm(index, setting, trial, job)
        except (RecipeError, optuna.TrialPruned, optuna.exceptions.UpdateFinishedTrialError):
            raise
        except Exception as error:  # whatever an arm comes to is its own; the others go on
            reason = str(error) if isinstance(error, ArmError) else f"{type(error).__name__}: {sentence(error)}"
            trial.set_user_attr(REASON, reason)
            raise ArmError(reason) from error

    def _setting(self, index: int, trial: optuna.Trial, arms: dict[int, list[FrozenTrial]]) -> Setting:
        """Return an arm's settings, and have the study know them."""
        plan = self.plan
        fixed = self._fixed(index, arms)
        self.sampler.fixed[trial.number] = fixed
        for key in list(fixed):
            if key not in plan.ranges:
                choices = [json.dumps(each) for each in plan.values_of(key)]
                trial.suggest_categorical(key, choices)
        for key, bounds in plan.ranges.items():  # under a name of its own for each point: each is searched for by itself
            if key not in fixed:
                suggest = trial.suggest_int if are_whole(bounds) else trial.suggest_float
                fixed[key] = suggest(f"{key} of arm {plan.drawn_at(index)[0]}", **bounds)
        return fixed

    def _fixed(self, index: int, arms: dict[int, list[FrozenTrial]]) -> Setting:
        """Return the settings of an arm, without what is to be drawn. Raises ArmError if those of the best can't be known."""
        plan = self.plan
        if plan.trials:
            return self._drawn(index, arms)
        return plan.listed()[index] if index < plan.first_stage else self._finalist(index, arms)

    def _drawn(self, index: int, arms: dict[int, list[FrozenTrial]]) -> Setting:
        """Return the same of a search."""
        plan = self.plan
        place, seed = plan.drawn_at(index)
        fixed = {**plan.points()[place], "seed": plan.seeds[0] if seed is None else seed}
        if seed is None:
            return fixed
        ranked = self._ranked([arms[i][-1] for i in range(place, plan.first_stage, len(plan.points()))])
        if not ranked:
            raise ArmError("none of the points drawn for it finished")
        return {**{key: ranked[0][key] for key in plan.ranges}, **fixed}

    def _finalist(self, index: int, arms: dict[int, list[FrozenTrial]]) -> Setting:
        """Return the settings of an arm of the second stage: one of the best groups at its best, with a fresh seed.

        What its place has begun with stays, though a run of the first stage that failed is repeated later.
        """
        plan = self.plan
        place, seed = plan.finalist_at(index)
        same = [i for i in range(plan.first_stage, plan.count) if plan.finalist_at(i)[0] == place]
        chosen = [trial.user_attrs[SETTING] for i in same for trial in arms.get(i, []) if SETTING in trial.user_attrs]
        if not chosen:
            best: dict[str, Setting] = {}
            for setting in self._ranked([arms[i][-1] for i in range(plan.first_stage)]):
                best.setdefault(json.dumps(plan.group_of(setting), sort_keys=True), setting)
            chosen = [*best.values()][place:]
        if not chosen:
            raise ArmError("too few objectives finished the first stage")
        return {**chosen[0], "seed": seed}

    def _ranked(self, trials: list[FrozenTrial]) -> list[Setting]:
        """Return the settings of the trials that finished, the best first; those that forgot too much last."""
        done = [each for each in trials if each.state == TrialState.COMPLETE]
        way = -1 if self.study.direction == optuna.study.StudyDirection.MAXIMIZE else 1

        def place(trial: FrozenTrial) -> tuple[float, float, int]:
            return self.plan.excess(trial.user_attrs.get(FORGETTING)), way * trial.values[0], trial.number

        return [each.user_attrs[SETTING] for each in sorted(done, key=place)]

    def _reclaim(self) -> None:
        """Ask again for what workers that are gone have left."""
        if not self.is_local:
            optuna.storages.fail_stale_trials(self.study)
        for trials in self.by_arm().values():
            last = trials[-1]
            if last.state == TrialState.RUNNING and self._is_abandoned(last):
                try:
                    self.study.tell(last.number, state=TrialState.FAIL)
                except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    continue  # another worker was faster
                self._ask_again(last, last.user_attrs)
            elif last.state == TrialState.FAIL and not _is_over(trials):
                self._ask_again(last, last.user_attrs)  # failed by a worker that went before it could ask

    def _is_abandoned(self, trial: FrozenTrial) -> bool:
        worker, host = trial.user_attrs.get(WORKER, (None, None))
        if worker is None:
            age = (datetime.now() - trial.datetime_start).total_seconds() if trial.datetime_start else GRACE
            return age > (GRACE / 4 if self.is_local else 2 * GRACE)
        if worker == self.worker or not (self.is_local or host == socket.gethostname()):
            return False
        try:
            with self._lock_of(worker).acquire(timeout=0):
                return True
        except Timeout:
            return False

    def _lock_of(self, worker: str) -> FileLock:
        return FileLock(self.folder / "workers" / f"{worker}.lock")

    def _ask_again(self, trial: FrozenTrial, user_attrs: dict[str, Any]) -> None:
        again = copy.copy(trial)
        again.user_attrs = {key: value for key, value in user_attrs.items() if key not in (WORKER, REASON)}
        RetryHeartbeatStaleTrialCallback()(self.study, again)


def _is_over(trials: list[FrozenTrial]) -> bool:
    """Whether an arm is done: by any of its trials, unless it was asked for again since it failed."""
    if any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials):
        return True
    return trials[-1].state == TrialState.FAIL and trials[-1].user_attrs.get(REASON) is not None


def _has_right(other: FrozenTrial, trial: FrozenTrial) -> bool:
    """Whether another trial of the same arm goes before this one: it is done, or it was begun first."""
    if other.number == trial.number:
        return False
    if other.state == TrialState.FAIL:
        return other.user_attrs.get(REASON) is not None and other.number not in trial.system_attrs.get("retry_history", [])
    is_first = other.state == TrialState.RUNNING and other.number < trial.number
    return is_first or other.state in (TrialState.COMPLETE, TrialState.PRUNED)


class _NotNow(Exception):
    """A best point is asked for before it is known."""
