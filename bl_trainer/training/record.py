"""What a run leaves behind of itself: its metrics.jsonl, to be read while it goes on, and what its checkpoints record."""

import json
import math
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .._util.files import write_text
from .card import add_objective
from .checkpoints import RECORD_FILE

FILE = "metrics.jsonl"


PACKAGES = ("bl_trainer", "trl", "transformers", "accelerate", "peft", "datasets", "torch")

PAPER = {
    "title": "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model "
    "Capability Continuum",
    "id": "2510.00526",
    "citation": """@inproceedings{li2026beyond,
  title     = {Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model
               Capability Continuum},
  author    = {Li, Gaotang and Qiu, Ruizhong and Chen, Xiusi and Ji, Heng and Tong, Hanghang},
  booktitle = {International Conference on Machine Learning},
  year      = {2026},
  note      = {arXiv:2510.00526}
}""",
}


@dataclass(frozen=True)
class RunRecord:
    """What a run was trained with, as every checkpoint and the model card record it; `recipe` is fit for JSON."""

    objective: dict[str, Any]
    threshold: dict[str, Any]
    loss_head: str
    recipe: dict[str, Any] | None
    processes: int
    save_only_model: bool
    num_train_epochs: float
    versions: dict[str, str]

    @classmethod
    def of(cls, trainer: Any) -> "RunRecord":
        """Return the record of a `BLTrainer`."""
        return cls(
            objective=trainer.parsed_objective.resolved.to_dict(),
            threshold=trainer.threshold.to_dict(),
            loss_head=trainer.loss_head,
            recipe=trainer.recipe,
            processes=trainer.accelerator.num_processes,
            save_only_model=trainer.args.save_only_model,
            num_train_epochs=trainer.args.num_train_epochs,
            versions={package: version(package) for package in PACKAGES},
        )

    def write(self, folder: Path) -> None:
        """Write the record into `folder`, which is made if it isn't there."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD_FILE, json.dumps(vars(self), indent=2, default=str) + "\n")

    def append_to_card(self, path: Path) -> None:
        """Append the objective, the threshold and the versions to the model card at `path`."""
        add_objective(path, vars(self))


class MetricsLog(TrainerCallback):
    """Appends `step`, `max_steps` and what is logged to `output_dir`/metrics.jsonl.

    A run that goes on from a checkpoint repeats the steps after it: of lines of the same step the last counts.
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
