"""How far a sweep is, on the terminal."""

import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .design import Setting, describe
from .outcome import arm_folder, read_result
from .plan import Plan


class Progress:
    """Shows how far the sweep is: a bar, beside it what each arm does, and a line for each arm that is done."""

    def __init__(self, plan: Plan, folder: Path):
        self.now: dict[int, str] = {}
        self.done = sum(read_result(arm_folder(folder, index)) is not None for index in range(plan.count))
        self.count = plan.count
        self.bar = tqdm(total=plan.count, initial=self.done, desc="Runs", disable=not sys.stderr.isatty())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *args: Any) -> None:
        self.bar.close()

    def begin(self, index: int, setting: Setting) -> None:
        """An arm begins."""
        self.tell(index, "starts")
        tqdm.write(f"run {index:03d} ({describe(setting)})")

    def tell(self, index: int, what: str) -> None:
        """An arm does something else."""
        self.now[index] = what
        self.bar.set_postfix_str("; ".join(f"{i:03d} {each}" for i, each in sorted(self.now.items())))

    def end(self, index: int, how: str) -> None:
        """An arm ends, whichever way."""
        self.now.pop(index, None)
        self.done += 1
        tqdm.write(f"run {index:03d}, {self.done} of {self.count}: {how}")
        self.bar.update()
