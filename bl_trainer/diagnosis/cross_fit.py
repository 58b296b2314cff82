"""Cross-fitting: two adapters of the learnability probe, each trained on half of the rows, score the other half."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .._util.files import replacing
from ..errors import MeasurementError, RecipeError
from ..recipe.recipe import Recipe
from ..tokens.labels import columns_of
from ..tokens.names import REFERENCE, WEIGHT
from ..training.checkpoints import take_average
from ..training.trainer import BLTrainer
from .diagnoser import Diagnoser
from .learnability import FEWEST, half_of, probe_arguments, probe_learning_rate
from .score_files import ADAPTERS, ScoreFolder

RECORD = "bl_trainer.adapter"  # of a file's metadata: JSON, all that its adapter depends on

PROCESSES = "processes"  # key of that: adapters of another number of them are as good, but not beside one of this number


def halves_of(dataset: Dataset, text_field: str) -> np.ndarray:
    """Return which half each row is in, (rows,) of 0 and 1: rows that begin alike are in the same, as the probe has it.

    Raises RecipeError if a half has fewer than `FEWEST` rows.
    """
    halves = np.array([half_of(row, text_field) for row in dataset], dtype=np.int8)
    least = int(np.bincount(halves, minlength=2).min())
    if least < FEWEST:
        raise RecipeError(
            f"`--noise_steps` needs at least {FEWEST} rows in each half of the data, one has {least} (rows that begin alike "
            "stay together). Leave it out, or add data."
        )
    return halves


class CrossFit:
    """
    The adapter of `diagnoser`, which does nothing yet, fitted to either half of a data set's rows by NLL.

    `halves`: (rows,), 0 or 1, of `halves_of`. Raises RecipeError if the model is sharded.
    """

    def __init__(self, diagnoser: Diagnoser, recipe: Recipe, dataset: Dataset, halves: np.ndarray, steps: int):
        if diagnoser.is_fsdp_enabled or diagnoser.is_deepspeed_enabled:
            raise RecipeError("`--noise_steps` needs a whole model on each device. Launch it without FSDP and DeepSpeed.")
        self.diagnoser, self.dataset, self.halves, self.steps = diagnoser, dataset, halves, steps
        self.learning_rate = probe_learning_rate(recipe)
        self.start = _state(diagnoser.model)
        self.adapters: list[dict[str, torch.Tensor]] = []

    def fit(self, folder: ScoreFolder, weights: str | None) -> str:
        """Train both adapters, or read those that an interrupted run of the same left; return a hash of their weights.

        The same is that of rows, settings and the model's `weights`, a hash. The model is as it was afterwards. Raises
        MeasurementError if training diverges or makes no step.
        """
        accelerator = self.diagnoser.accelerator
        paths = [folder.path / ADAPTERS / f"half-{half}.safetensors" for half in (0, 1)]
        record = self._record(folder, weights)
        usable = gather_object([_usable([_recorded(path) for path in paths], record)])
        for half, path in enumerate(paths):
            if not all(each[half] for each in usable):
                self._train(half, path, record)
        accelerator.wait_for_everyone()
        self.adapters = [load_file(path) for path in paths]
        digest = hashlib.sha256()
        for adapter in self.adapters:
            for name in sorted(adapter):
                digest.update(name.encode() + adapter[name].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    def use(self, half: int) -> None:
        """Let the model be that which has not seen this half."""
        set_peft_model_state_dict(self.diagnoser.model, self.adapters[1 - half])

    def leave(self) -> None:
        """Let the adapter do nothing, as before."""
        set_peft_model_state_dict(self.diagnoser.model, self.start)

    def _record(self, folder: ScoreFolder, weights: str | None) -> dict[str, Any]:
        """Return all that the adapters depend on."""
        settings = {key: value for key, value in folder.settings.items() if key != "tokens"}
        processes = self.diagnoser.accelerator.num_processes
        return {**settings, "weights": weights, "row_hashes": folder.hash_of_rows(), PROCESSES: processes}

    def _train(self, half: int, path: Path, record: dict[str, Any]) -> None:
        diagnoser = self.diagnoser
        rows = self._rows(half)
        args = probe_arguments(diagnoser.args, self.steps, self.learning_rate)
        diagnoser.accelerator.print(
            f"Cross-fitting, half {half + 1} of 2: {self.steps} steps of an adapter by nll at learning rate "
            f"{self.learning_rate:.2g} on {len(rows):,} rows."
        )
        trainer = BLTrainer(diagnoser.model, args, train_dataset=rows, processing_class=diagnoser.processing_class)
        trainer.train()
        take_average(trainer.optimizer)
        found = _state(diagnoser.model)
        self.leave()
        if not all(bool(each.isfinite().all()) for each in found.values()):
            raise MeasurementError("Cross-fitting diverged: weights are NaN or infinite. Lower `--learning_rate`.")
        if diagnoser.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                save_file(found, part, metadata={RECORD: json.dumps(record, sort_keys=True)})

    def _rows(self, half: int) -> Dataset:
        """Return rows of a half in random order, prepared as they train, as many as the steps take at most."""
        args = self.diagnoser.args
        numbers = np.random.default_rng(args.seed).permutation(np.flatnonzero(self.halves == half))
        present = [name for name in (WEIGHT, REFERENCE) if name in columns_of(self.dataset)]
        dataset = self.dataset.remove_columns(present) if present else self.dataset
        count = self.steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows = self.diagnoser.training_rows(dataset.select(numbers[:count]), packing=False)
        if not len(rows):
            raise MeasurementError("No row of a half of the data has a target token. Raise `max_length`.")
        if not args.packing:
            return rows
        count = math.ceil(count * args.max_length * len(rows) / sum(map(len, rows["input_ids"])))
        return self.diagnoser.training_rows(dataset.select(numbers[:count]), packing=True)


def _recorded(path: Path) -> dict[str, Any] | None:
    """Return what the adapter in a file depends on; None if there is no such file, or it can't be read."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[RECORD])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _usable(found: list[dict[str, Any] | None], record: dict[str, Any]) -> list[bool]:
    """Return which of the adapters, by their records, serve a run of this record. Both are of one number of processes."""
    pair = [{**each, PROCESSES: record[PROCESSES]} if each else None for each in found]
    return [True, True] if found[0] == found[1] and pair[0] == record else [each == record for each in found]


def _state(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of an adapter's weights."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
