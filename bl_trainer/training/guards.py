"""What would let a run end without having learnt: nothing trainable, no step, names that match nothing."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn

from .._util.logs import get_logger
from .._util.text import nearest
from .._util.transformers import Conv1D, has_length
from ..errors import MeasurementError, RecipeError
from ..objectives.threshold import Threshold, spell_probability
from ..tokens.labels import check_ids
from ..tokens.names import WEIGHT

logger = get_logger(__name__)

FEW = 0.05  # share of the target tokens within a threshold below which a user is told


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


def refuse_half(model: nn.Module, has_copies: bool) -> None:
    """Raise RecipeError if a weight that trains is in float16, where AdamW's epsilon of 1e-8 is 0 and small steps are lost.

    `has_copies`: whether float32 copies train in its place, as under DeepSpeed.
    """
    names = [name for name, each in model.named_parameters() if each.requires_grad and each.dtype == torch.float16]
    if names and not has_copies:
        raise RecipeError(
            f"Cannot train weights in float16, such as {names[0]}: steps below its resolution are lost. Write "
            "`dtype: float32`, with `fp16: true` for mixed precision, or `dtype: bfloat16`."
        )


def refuse_other_weights(model: nn.Module, optimizer: Any) -> None:
    """Raise RecipeError if `optimizer`, a user's own, holds nothing of `model` that trains; warn if it leaves some out."""
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:  # accelerate's stand-in for an optimizer of DeepSpeed's configuration has none
        return
    held = {id(parameter) for group in groups for parameter in group["params"]}
    trains = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    lost = [name for name, parameter in trains if id(parameter) not in held]
    if lost and len(lost) == len(trains):
        raise RecipeError(
            "Cannot train: the optimizer in `optimizers` holds no parameter that trains. Make it over those of the "
            "model that you give, with its adapter, or give `optimizer_cls_and_kwargs`."
        )
    if lost:
        logger.warning(
            f"The optimizer in `optimizers` leaves out {len(lost)} of {len(trains)} parameters, such as {lost[0]}: they do not "
            "train."
        )


def refuse_dropped(rows: int, per_step: int, name: str, key: str) -> None:
    """Raise RecipeError if `dataloader_drop_last` drops all `rows` of a set; `per_step` rows make a batch."""
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


def refuse_empty(threshold: Threshold, above: float) -> None:
    """Raise MeasurementError if the probability `above`, that a percentile has come to, leaves nothing within `threshold`."""
    if above > threshold.below:
        raise MeasurementError(
            f"`threshold` keeps no token: percentile {threshold.above_percentile} is p = {spell_probability(above, 6)}, above "
            f"`below: {threshold.below}`. Raise `below`, or lower `above_percentile`."
        )


def refuse_unevaluated(means: dict[str, float], name: str) -> None:
    """Raise RecipeError if the evaluation set `name` had no target, by its `means`."""
    if math.isnan(means.get("kept_fraction", math.nan)):
        raise RecipeError(f"Cannot evaluate the {name} set: no row has a target. It is empty, or every label is -100.")


def warn_of_repeats(dataset: Any, processes: int) -> None:
    """Warn if an evaluation set is a stream: several processes may get some rows twice."""
    if processes > 1 and not has_length(dataset):
        logger.warning(
            f"The evaluation set is streamed to {processes} processes: if its length is not a multiple of their batches, "
            "accelerate repeats examples to fill the last, and they count twice in the metrics."
        )


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


def _spelled(threshold: Threshold) -> str:
    """Return a threshold as a recipe has it."""
    given = {key: value for key, value in threshold.to_dict().items() if value != Threshold().to_dict().get(key)}
    if threshold.above_percentile is not None:
        given.pop("above", None)  # which it has come to
    text = f"{threshold.above}" if [*given] == ["above"] else f"{{{', '.join(f'{key}: {given[key]}' for key in given)}}}"
    return f"`threshold: {text}`"


def _idle(means: dict[str, float]) -> str | None:
    """Return what a log's means lack where nothing has trained: targets, kept ones, weight."""
    kept = means.get("kept_fraction", 1)
    return "target" if math.isnan(kept) else "kept" if kept == 0 else "weight" if means.get("gradient_weight") == 0 else None


def warn_of_idle(
    means: dict[str, float], threshold: Threshold, history: list[dict[str, float]], grad_norm: float | None = None
) -> None:
    """Warn if nothing has trained since the last log, by its `means`, or if its `grad_norm` is not finite.

    Not again while the last log in `history` lacked the same.
    """
    lacks = _idle(means)
    if lacks == _idle(next((entry for entry in reversed(history) if "loss" in entry), {})):
        lacks = None
    if lacks == "target":
        logger.warning(
            "Nothing trains: since the last log no row had a target; every label was -100. Check `labels`, the masks and "
            "`max_length`."
        )
    elif lacks == "kept":
        logger.warning(
            f"Nothing trains: since the last log no target token was within {_spelled(threshold)} "
            f"(kept_fraction 0, mean target_prob {means['target_prob']:.2g}). Widen `threshold`."
        )
    elif lacks == "weight":
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


def warn_of_few(means: dict[str, float], threshold: Threshold, history: list[dict[str, float]]) -> None:
    """Warn in the first log of a run, which `history` shows, if next to nothing trains by its `means`.

    A percentile gets no warning, since it asks for its share.
    """
    share, is_first = means.get("kept_fraction", math.nan), not any("loss" in entry for entry in history)
    if is_first and 0 < share < FEW and threshold.above_percentile is None:
        logger.warning(
            f"Only {100 * share:.2g} % of the target tokens train: the others are outside {_spelled(threshold)} "
            f"(mean target_prob {means['target_prob']:.2g}). Widen `threshold` unless this is meant; `bl-trainer diagnose` "
            "shows how probable the tokens are."
        )


def check_length(model: Any, dataset: Any, name: str) -> None:
    """Warn of rows that are longer than the positions `model` was made for; raise RecipeError where positions are learnt."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    column = "seq_lengths" if "seq_lengths" in dataset.column_names else "input_ids"  # of the examples in a packed row
    longest = 0
    for batch in dataset.select_columns(column).with_format("arrow").iter(1000):
        each = batch[column]
        longest = max(longest, *(pc.list_flatten(each) if column == "seq_lengths" else pc.list_value_length(each)).to_pylist())
    if longest <= most:
        return
    said = f"the longest example of the {name} set has {longest} tokens, {type(model).__name__} was made for {most}"
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding) and each is not model.get_input_embeddings()]
    if any(most <= each.num_embeddings <= most + 2 for each in tables):  # some families leave out the first two
        raise RecipeError(f"Cannot train: {said}, whose positions it has learnt. Write `max_length: {most}`.")
    logger.warning(f"{said[0].upper()}{said[1:]}. Write `max_length: {most}` to train on no longer ones.")


def check_lengths(trainer: Any) -> None:
    """Check the rows of all sets of a `BLTrainer` as `check_length` does."""
    model = trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model
    for name, dataset in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        for each in dataset.values() if isinstance(dataset, dict) else [dataset]:
            check_length(model, each, name)


def refuse_no_target(model: Any, config: Any) -> None:
    """Raise RecipeError if no module of `model` is what `config` puts adapters on, and say which there are."""
    wanted = getattr(config, "target_modules", None)
    if model is None or not wanted or wanted == "all-linear" or getattr(config, "target_parameters", None):
        return
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    head = model.get_output_embeddings()
    if not any(_is_named(wanted, name) for name in modules):
        linear = [name for name, each in modules.items() if isinstance(each, (nn.Linear, Conv1D)) and each is not head]
        layers = sorted({name.split(".")[-1] for name in linear})
        shown = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted))
        raise RecipeError(
            f"Cannot apply `lora_target_modules`: {shown!r} matches nothing in {type(model).__name__}. Write some of its "
            f"linear layers, {', '.join(layers)}, or `all-linear`."
        )


def refuse_unmatched(peft_model: Any) -> None:
    """Raise RecipeError on a name in the active adapter's configuration that matches nothing in the model.

    Lists of targets may be written for several families: while others match, such a name is a warning. So is what is excluded.
    """
    config, base = peft_model.peft_config[peft_model.active_adapter], peft_model.get_base_model()
    modules = [name for name, _ in base.named_modules(remove_duplicate=False)]
    parameters = [name.replace(".base_layer", "") for name, _ in base.named_parameters(remove_duplicate=False)]
    for key, present, is_match in (
        ("target_modules", modules, _is_named),
        ("exclude_modules", modules, _is_named),
        ("target_parameters", parameters, _is_named),
        ("modules_to_save", modules, _ends),  # for which PEFT doesn't ask for a dot
    ):
        wanted = getattr(config, key, None) or ()
        names = {wanted: wanted} if isinstance(wanted, str) else {name: [name] for name in sorted(wanted)}
        lost = [name for name, each in names.items() if not any(is_match(each, one) for one in present)]
        needs_all = key == "modules_to_save" or (key != "exclude_modules" and len(lost) == len(names))
        for name in lost:
            said = _unmatched(name, key, base, present)
            if needs_all:
                raise RecipeError(f"Cannot apply {said}")
            logger.warning(said)


def _is_named(wanted: Any, name: str) -> bool:
    """Whether PEFT takes the module `name` for one of `wanted`, a pattern or a list of endings."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in wanted)


def _ends(wanted: Any, name: str) -> bool:
    return name.endswith(wanted if isinstance(wanted, str) else tuple(wanted))


def _unmatched(name: str, key: str, base: nn.Module, present: list[str]) -> str:
    recipe_key = key if key == "exclude_modules" else f"lora_{key}"
    near = nearest(name.split(".")[-1], sorted({each.split(".")[-1] for each in present}))
    return f"`{recipe_key}`: {name!r} matches nothing in {type(base).__name__}.{near} Correct the name or remove it."


def check_loaded(trainer: Any, given: Mapping[str, Any]) -> Any:
    """Check the model of a `BLTrainer` and its rows against each other; returns the training set.

    Raises RecipeError on a name of an adapter that matches nothing, and as `refuse_unknown_ids` and `check_length`.
    """
    if given.get("peft_config") is not None:
        refuse_unmatched(trainer.model)
    check_lengths(trainer)
    return refuse_unknown_ids(trainer, given)


def check_another(trainer: Any, given: Any, prepared: Any, name: str) -> Any:
    """Return a set that a trainer gets later, `prepared` of what is `given`; raises as `check_length` and `check_ids`."""
    model = trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model
    size = _embeddings_of(trainer)
    check_length(model, prepared, name)
    if isinstance(given, Dataset):
        check_ids(given, name, size)
    return check_ids(prepared, f"prepared {name}", size)


def _embeddings_of(trainer: Any) -> int | None:
    return getattr(trainer.model.get_input_embeddings(), "num_embeddings", None)


def refuse_unknown_ids(trainer: Any, given: Mapping[str, Any]) -> Any:
    """Return the training set; raises RecipeError on a token id without an embedding, in a stream when the row is read.

    The evaluation sets are replaced by ones that are checked.
    """
    size = _embeddings_of(trainer)
    for name in ("train", "eval"):
        source = given.get(f"{name}_dataset")  # whose rows have the numbers that the user knows
        for part in source.values() if isinstance(source, dict) else [source]:
            if isinstance(part, Dataset):
                check_ids(part, name, size)
    evaluated = trainer.eval_dataset
    if isinstance(evaluated, dict):
        trainer.eval_dataset = {name: check_ids(part, f"prepared {name}", size) for name, part in evaluated.items()}
    elif evaluated is not None:
        trainer.eval_dataset = check_ids(evaluated, "prepared eval", size)
    return check_ids(trainer.train_dataset, "prepared train", size)
