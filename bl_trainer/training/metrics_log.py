"""A run's metrics: in metrics.jsonl, written during the run for those who watch it, and their names in trackers."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

FILE = "metrics.jsonl"

GROUPED = re.compile(r"((?:eval|test)_(?:.+_)?)?(?:(nll|perplexity|target_prob|kept_fraction|gradient_weight)|objective_(.+))")


def group(key: str) -> str | None:
    """Return the name of one of our metrics in a tracker, `objective/nll` or `objective/eval_nll`; None for others'."""
    match = GROUPED.fullmatch(key)
    return None if match is None else f"objective/{match[1] or ''}{match[2] or match[3]}"


class MetricsLog(TrainerCallback):
    """Appends `step`, `max_steps` and what is logged to `output_dir`/metrics.jsonl.

    A run that resumes from a checkpoint repeats the steps after it. Of lines of the same step the last counts.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            line = {"step": state.global_step, "max_steps": state.max_steps, **(logs or {})}
            finite = {key: value for key, value in line.items() if not isinstance(value, float) or math.isfinite(value)}
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            with (Path(args.output_dir) / FILE).open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read(1) == b"\n" else b"\n")  # after a line that a kill has cut short
                file.write(json.dumps(finite, default=float).encode() + b"\n")


class Curve:
    """Reads a run's metrics.jsonl as it grows."""

    def __init__(self, folder: Path):
        self.path, self.place = folder / FILE, 0

    def new(self) -> list[dict[str, Any]]:
        """Return the lines that have come since the last call; one that is still being written comes next time."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.place)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self.place += len(whole)
        return [line for line in map(_parsed, whole.splitlines()) if line is not None]

    def points(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) wherever `key` was logged, from the beginning."""
        self.place = 0
        found = {line["step"]: line[key] for line in self.new() if key in line}
        return sorted(found.items())


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return a line's figures, or None if a run was killed while it wrote it."""
    try:
        return json.loads(line)
    except ValueError:
        return None
