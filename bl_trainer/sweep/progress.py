"""How far a sweep is, on the terminal."""

import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .cost import Spent, time_text
from .design import Setting, describe
from .outcome import Result, finished
from .plan import Plan


class Progress:
    """Shows how far the sweep is: a bar, beside it what each arm does, and a line for each arm that is done."""

    def __init__(self, plan: Plan, folder: Path, jobs: int):
        self.plan, self.folder, self.jobs = plan, folder, jobs
        self.now: dict[int, str] = {}
        self.shares: dict[int, float] = {}  # of their training that runs have done
        self.done, self.is_announced = len(finished(plan.count, folder, Result)), False
        self.bar = tqdm(total=plan.count, initial=self.done, desc="Runs", disable=not sys.stderr.isatty())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *args: Any) -> None:
        self.bar.close()

    def begin(self, index: int, setting: Setting) -> None:
        """An arm begins."""
        self.tell(index, "starts", 0.0)
        tqdm.write(f"run {index:03d} ({describe(setting)})")

    def tell(self, index: int, what: str, share: float | None = None) -> None:
        """An arm does something else; `share`: of its training it has done, None where that is as before."""
        self.now[index] = what
        self.shares[index] = self.shares.get(index, 0.0) if share is None else share
        self.bar.n = self.done + sum(self.shares.values())
        self.bar.set_postfix_str("; ".join(f"{i:03d} {each}" for i, each in sorted(self.now.items())))

    def end(self, index: int, how: str) -> None:
        """An arm ends, whichever way."""
        self.now.pop(index, None)
        self.shares.pop(index, None)
        self.done += 1
        self.bar.n = self.done
        spent = Spent.of(finished(self.plan.count, self.folder, Result).values())
        runs_left = self.plan.count - self.done
        left = f" ({time_text(spent.seconds_left(runs_left, self.jobs))} left)" if spent.timed and runs_left else ""
        tqdm.write(f"run {index:03d}, {self.done} of {self.plan.count}{left}: {how}")
        if spent.timed and not self.is_announced:
            tqdm.write(f"Expected of all {self.plan.count} runs, by those that have finished: {spent.scaled(self.plan.count)}.")
            self.is_announced = True
        self.bar.refresh()
