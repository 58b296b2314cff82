"""What a run leaves behind of itself: what its checkpoints and its model card record, and the commands that use it."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from .._util.files import write_text
from ..objectives.objective import Objective
from ..tokens.row_hash import sample_of
from .card import before_and_after, write_card
from .checkpoints import RECORD_FILE, quantization_in
from .config import choice_of
from .pace import Pace

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
    """What a run was trained with, as every checkpoint and the model card record it; `recipe` is fit for JSON.

    `quantization`: bitsandbytes' configuration of the base model, None if it was not quantised. `metrics`: of evaluations,
    before training and afterwards. `drop_rows`: what `drop_rows` left out, None if the recipe has no such key. `rows`: how many
    the training set has, and a hash of 64 of them. `objective_source`: a hash of the code of objectives of one's own, None
    without any. `best`: by what the best checkpoint is chosen. `pace`: a `Pace`'s fields.
    """

    objective: dict[str, Any]
    objective_source: str | None
    threshold: dict[str, Any]
    loss_head: str
    drop_rows: dict[str, Any] | None
    rows: dict[str, Any] | None
    recipe: dict[str, Any] | None
    processes: int
    save_only_model: bool
    best: dict[str, Any] | None
    pace: dict[str, Any]
    versions: dict[str, str]
    base_model: str | None
    is_adapter: bool
    quantization: dict[str, Any] | None
    metrics: dict[str, Any]

    @classmethod
    def of(cls, trainer: Any) -> "RunRecord":
        """Return the record of a `BLTrainer`."""
        return cls(
            objective=trainer.parsed_objective.resolved.to_dict(),
            objective_source=source_of(trainer.parsed_objective),
            threshold=trainer.threshold.to_dict(),
            loss_head=trainer.loss_head,
            drop_rows=trainer.kept_rows.record if trainer.kept_rows else None,
            rows=sample_of(trainer.train_dataset),
            recipe=trainer.recipe,
            processes=trainer.accelerator.num_processes,
            save_only_model=trainer.args.save_only_model,
            best=choice_of(trainer.args),
            pace=asdict(Pace.of(trainer, trainer.callback_handler.train_dataloader)),
            versions={package: version(package) for package in PACKAGES},
            base_model=getattr(trainer.model.config, "name_or_path", None) or None,
            is_adapter=is_peft_model(trainer.model),
            quantization=quantization_in(trainer.model.config),
            metrics=before_and_after(trainer.state.log_history, _best_step(trainer)),
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

    def write_card(self, trainer: Any, name: str | None, data: str | None) -> None:
        """Write the model card of a `BLTrainer`'s `output_dir` over TRL's; `name`: the model's, `data`: on the Hub."""
        folder = Path(str(trainer.args.output_dir))
        where = trainer.hub_model_id or str(folder)
        chats = bool(getattr(trainer.processing_class, "chat_template", None))
        write_card(folder / "README.md", vars(self), name or Path(where).name, where, chats, data)


def source_of(objective: Objective) -> str | None:
    """Return a hash of the code of an objective's functions that come by an import path; None without any, or any code."""
    found = []
    with suppress(OSError, TypeError):  # what was typed at a prompt has no code to read
        found = [inspect.getsource(part.function) for _, part in objective.walk() if ":" in part.name]
    return hashlib.blake2b("\n".join(found).encode(), digest_size=8).hexdigest() if found else None


def _best_step(trainer: Any) -> int | None:
    """Return the step of the weights that the trainer has loaded at the end, None if these are the last step's."""
    return trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
