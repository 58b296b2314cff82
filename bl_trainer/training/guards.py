"""What would let a run end without having learnt: nothing trainable, no step, names that match nothing."""

import functools
import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from accelerate.logging import get_logger
from datasets import Dataset
from torch import nn

from .._util.text import nearest
from ..errors import RecipeError
from ..objectives.threshold import Threshold
from ..tokens.labels import check_ids
from ..tokens.names import WEIGHT

logger = get_logger(__name__)


def leaves_no_empty_folder(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a trainer's method that may refuse: empty folders that the trainer has made for its output go away again."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception:
            for folder in getattr(self, "made_folders", ()):
                with suppress(OSError):  # it is not empty, or another process was first
                    folder.rmdir()
            raise

    return wrapped


def missing_folders(folder: Path) -> list[Path]:
    """Return what of `folder` and its parents isn't there yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def refuse_frozen(model: nn.Module) -> None:
    """Raise RecipeError if no parameter of `model` trains."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(
            f"Cannot train {type(model).__name__}: all its parameters are frozen. Load an adapter with `is_trainable=True`, "
            "or call `requires_grad_(True)` on what is to train."
        )


def refuse_dropped(rows: int, per_step: int, name: str, key: str) -> None:
    """Raise RecipeError if `dataloader_drop_last` drops all `rows` of a set, of which `per_step` make a batch."""
    if rows < per_step:
        raise RecipeError(
            f"Cannot use the {name} set: `dataloader_drop_last: true` drops its only batch, {rows} rows where all processes "
            f"take {per_step}. Remove the key, or lower `{key}`."
        )


def refuse_dropped_sets(trainer: Any) -> None:
    """Raise RecipeError if `dataloader_drop_last` leaves nothing of a trainer's set; of a stream nothing is dropped."""
    args, accelerator = trainer.args, trainer.accelerator
    if not args.dataloader_drop_last:
        return
    sharers = getattr(accelerator.parallelism_config, "non_data_parallel_size", 1)
    processes = 1 if accelerator.split_batches else accelerator.num_processes // sharers
    evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    evaluated = {} if args.eval_strategy == "no" else evaluated
    for name, dataset in {"train": trainer.train_dataset, **evaluated}.items():
        kind = "train" if name == "train" else "eval"
        if isinstance(dataset, Dataset):
            size = getattr(args, f"{kind}_batch_size") * processes
            refuse_dropped(len(dataset), size, name, f"per_device_{kind}_batch_size")


def refuse_unlearnt(has_begun: bool, has_met_targets: bool) -> None:
    """Raise RecipeError if training has ended without a step, or without a target in all its steps."""
    if not has_begun:
        raise RecipeError(
            "Nothing trained: the training set gave no complete batch, so no step was made. Check its size, "
            "`dataloader_drop_last` and `per_device_train_batch_size`."
        )
    if not has_met_targets:
        raise RecipeError(
            "Nothing trained: no row of any step had a target. Every label was -100. Check `labels`, the masks and the "
            "`data_collator`."
        )


def warn_of_idle(means: dict[str, float], threshold: Threshold, grad_norm: float | None = None) -> None:
    """Warn if nothing has trained since the last log, by its `means`, or if its `grad_norm` is not finite."""
    if math.isnan(means.get("kept_fraction", 0)):
        logger.warning(
            "Nothing trains: since the last log no row had a target; every label was -100. Check `labels`, the masks and "
            "`max_length`."
        )
    elif means.get("kept_fraction") == 0:
        logger.warning(
            f"Nothing trains: since the last log no target token was within the threshold {threshold.to_dict()} "
            f"(kept_fraction 0, mean target_prob {means['target_prob']:.2g}). Widen `threshold`."
        )
    elif means.get("gradient_weight") == 0:
        logger.warning(
            "Nothing trains: since the last log every target token had the weight 0 (gradient_weight 0, mean target_prob "
            f"{means['target_prob']:.2g}). Take an objective with more weight there, or larger numbers in the column "
            f"`{WEIGHT}`, if there is one."
        )
    if grad_norm is not None and not math.isfinite(grad_norm):
        logger.warning(
            f"grad_norm is {grad_norm}: this step changes nothing, or breaks the optimizer's state. If `alpha` is negative "
            "keep the least probable tokens out, e.g. by `threshold: 1.0e-6`."
        )


def refuse_unmatched(peft_model: Any) -> None:
    """Raise RecipeError on a name in the active adapter's configuration that matches nothing in the model."""
    config, base = peft_model.peft_config[peft_model.active_adapter], peft_model.get_base_model()
    modules = [name for name, _ in base.named_modules(remove_duplicate=False)]
    parameters = [name.replace(".base_layer", "") for name, _ in base.named_parameters(remove_duplicate=False)]
    for key, present, ends in (
        ("target_modules", modules, _ends_at_dot),
        ("exclude_modules", modules, _ends_at_dot),
        ("target_parameters", parameters, _ends_at_dot),
        ("modules_to_save", modules, str.endswith),  # for which PEFT doesn't ask for a dot
    ):
        wanted = getattr(config, key, None) or ()
        if isinstance(wanted, str) and not any(re.fullmatch(wanted, each) for each in modules):
            _refuse_name(wanted, key, base, modules)
        for name in () if isinstance(wanted, str) else sorted(wanted):
            if not any(ends(each, name) for each in present):
                _refuse_name(name, key, base, present)


def _ends_at_dot(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _refuse_name(name: str, key: str, base: nn.Module, present: list[str]) -> NoReturn:
    recipe_key = key if key == "exclude_modules" else f"lora_{key}"
    near = nearest(name.split(".")[-1], sorted({each.split(".")[-1] for each in present}))
    raise RecipeError(
        f"Cannot apply `{recipe_key}`: {name!r} matches nothing in {type(base).__name__}.{near} Correct the name or remove it."
    )


def refuse_unknown_ids(trainer: Any, given: dict[str, Any]) -> Any:
    """Return the training set; raises RecipeError on a token id without an embedding, in a stream when the row is read."""
    size = getattr(trainer.model.get_input_embeddings(), "num_embeddings", None)
    for name in ("train", "eval"):
        source = given.get(f"{name}_dataset")  # whose rows have the numbers that the user knows
        for part in source.values() if isinstance(source, dict) else [source]:
            if isinstance(part, Dataset):
                check_ids(part, name, size)
    return check_ids(trainer.train_dataset, "prepared train", size)
