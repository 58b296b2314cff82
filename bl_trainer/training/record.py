"""What a run leaves behind of itself: what its checkpoints and its model card record."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._util.files import write_text
from .card import add_objective
from .checkpoints import RECORD_FILE

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

    @classmethod
    @contextmanager
    def last_in(cls, trainer: Any, folder: Path) -> Iterator[None]:
        """Let `trainer` save a model in `folder`, and then its record: the model of a save that was killed has none."""
        if trainer.args.should_save:
            (folder / RECORD_FILE).unlink(missing_ok=True)
        yield
        if trainer.args.should_save:
            cls.of(trainer).write(folder)

    def append_to_card(self, path: Path) -> None:
        """Append the objective, the threshold and the versions to the model card at `path`."""
        add_objective(path, vars(self))
