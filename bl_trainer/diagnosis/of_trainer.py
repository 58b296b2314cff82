"""The diagnosis of a trainer that exists already: its model and its prepared rows, as they are now."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..errors import RecipeError
from ..recipe.recipe import Recipe
from ..tokens.collators import TokenCollator
from ..tokens.labels import plain
from ..tokens.names import GROUP, LENGTH, POSITION, REFERENCE, ROW, TEMPLATE, WEIGHT
from ..training.config import BLConfig
from ..training.trainer import BLTrainer
from .diagnoser import Diagnoser, deal
from .options import DiagnoseArguments
from .report import Report
from .run import Diagnosis

ELSEWHERE = ("model", "data", "compare", "probe", "probe_steps", "by", "scores", "noise_steps")  # options that need a recipe

OWN = (ROW, GROUP, TEMPLATE, POSITION, LENGTH, WEIGHT, REFERENCE)


@dataclass
class TrainerRecipe(Recipe):
    """What a diagnosis asks a recipe, answered by a trainer; the data set is prepared already."""

    trainer: Any = None

    @classmethod
    def of(cls, trainer: BLTrainer, options: DiagnoseArguments) -> "TrainerRecipe":
        """Return the recipe of a trainer."""
        recipe = trainer.recipe or {}
        name = getattr(trainer.model.config, "name_or_path", "") or type(trainer.model).__name__
        data = recipe.get("dataset_name") or "the trainer's training set"
        args: Any = trainer.args
        prepared = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        # the rows are packed and truncated
        own = {"packing": False, "eval_packing": None, "max_length": None, "padding_free": _collator(trainer).padding_free}
        training = replace(args, dataset_kwargs=prepared, drop_rows=None, **own)
        script, model = ScriptArguments(dataset_name=data), ModelConfig(model_name_or_path=name)
        return cls(script, training, model, DatasetMixtureConfig(), options, trainer=trainer)

    def load_datasets(self) -> tuple[Any, Any]:
        """Return the trainer's prepared rows without columns that belong to training."""
        rows = plain(self.trainer.train_dataset)
        present = [name for name in OWN if name in (rows.column_names or ())]
        return (rows.remove_columns(present) if present else rows), None

    def model_init_kwargs(self) -> Any:
        """Return None: the model is loaded."""
        return None


class TrainerDiagnosis(Diagnosis):
    """A trainer's model and data, ready to be measured; the trainer can train afterwards as it could before.

    Chat-template tokens count as content: prepared rows no longer tell them apart. Raises RecipeError on options that need a
    recipe, on streams and images, a collator of the user's own, and a model that is sharded.
    """

    def __init__(self, trainer: BLTrainer, options: DiagnoseArguments):
        _refuse(trainer, options)
        self.given = trainer
        super().__init__(TrainerRecipe.of(trainer, options))

    def _make_trainer(self, dataset: Any, args: Any) -> Diagnoser:
        limit = math.ceil(self.options.max_tokens / args.world_size) if self.options.max_tokens else None
        given = self.given
        return Diagnoser(
            None,
            limit,
            model=given.model,
            args=args,
            train_dataset=deal(dataset, args),
            processing_class=given.processing_class,
        )

    def _adapter(self) -> None:
        return None


def diagnose_trainer(trainer: BLTrainer, options: DiagnoseArguments) -> tuple[Report, bool]:
    """Diagnose a trainer. Returns the report, and whether this is the process that writes it. Raises as `TrainerDiagnosis`."""
    with _left_as_it_is(trainer.model):
        diagnosis = TrainerDiagnosis(trainer, options)
        return diagnosis.run(), diagnosis.trainer.is_world_process_zero()


@contextmanager
def _left_as_it_is(model: Any) -> Iterator[None]:
    """Give a model back its forward, its mode and the state of torch's random numbers."""
    base, trains = model.get_base_model() if is_peft_model(model) else model, model.training
    forward = base.forward
    with torch.random.fork_rng():
        try:
            yield
        finally:
            base.forward = forward
            model.train(trains)


def _refuse(trainer: BLTrainer, options: DiagnoseArguments) -> None:
    for key in ELSEWHERE:
        if getattr(options, key):
            raise RecipeError(f"Cannot use `{key}` with a trainer: it needs a recipe. Give `diagnose` the recipe instead.")
    if not isinstance(trainer.args, BLConfig):
        raise RecipeError("Cannot diagnose a trainer with a plain `SFTConfig`. Build it with a `BLConfig`.")
    if not isinstance(trainer.train_dataset, Dataset) or trainer.sees_images:
        raise RecipeError("Cannot diagnose this trainer: its training set is a stream or has images. Give a recipe instead.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise RecipeError("Cannot diagnose a trainer under FSDP or DeepSpeed. Run `diagnose` on a recipe instead.")
    if not isinstance(_collator(trainer), TokenCollator):
        raise RecipeError("Cannot diagnose a trainer with a `data_collator` of your own. Build the trainer without it.")


def _collator(trainer: BLTrainer) -> Any:
    """Return the collator of a trainer's tokens, which another one may wrap."""
    return getattr(trainer.data_collator, "collator", trainer.data_collator)
