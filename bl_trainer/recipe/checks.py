"""The rules of a recipe, one function each: it takes a recipe and returns what is wrong with it, or None.

They read what the recipe names (a template, a tokenizer, a configuration), and load neither data nor model.
"""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from .._util.process import processes
from .._util.text import nearest, sentence
from .._util.transformers import TRACKERS
from ..errors import RecipeError
from ..objectives.pricing import METRICS
from .keys import NEEDS, RANGES
from .model_checks import (
    adapter_has_a_part,
    adapter_spares_the_head,
    attention_is_installed,
    chat_template_can_be_read,
    model_is_no_adapter,
    model_is_there,
    model_keys_are_given_once,
    quantised_models_train_adapters,
)

if TYPE_CHECKING:
    from .recipe import Recipe

Rule = Callable[["Recipe"], str | None]


def check(recipe: "Recipe", rules: Iterable[Rule]) -> None:
    """Raise RecipeError with what the first rule that `recipe` breaks says."""
    for rule in rules:
        if fault := rule(recipe):
            raise RecipeError(fault)


def keys_do_something(recipe: "Recipe") -> str | None:
    for key in sorted(recipe.given.keys() & NEEDS.keys()):
        other, line = NEEDS[key]
        if other not in recipe.given and not (key == "packing_strategy" and recipe.training.eval_packing):
            return f"`{key}` does nothing without `{other}`. Write `{line}`, or remove `{key}`."
    return "`ignore_bias_buffers` does nothing in SFT. Remove it." if "ignore_bias_buffers" in recipe.given else None


def keyword_arguments_are_mappings_without_tokens(recipe: "Recipe") -> str | None:
    for key in ("model_init_kwargs", "dataset_kwargs"):
        value = getattr(recipe.training, key)
        if value is not None and not isinstance(value, dict):
            return f"`{key}` must be a mapping, got {value!r}."
        if {"token", "use_auth_token"} & set(value or {}):
            return f"A token in `{key}` would be logged. Put it in the environment variable HF_TOKEN instead."
    return None


def processes_train_together(recipe: "Recipe") -> str | None:
    if processes() > 1 and recipe.training.world_size == 1:
        return (
            f"{processes()} processes were launched, and each would train alone. On CPUs write `use_cpu: true`; on GPUs "
            "launch no more processes than there are."
        )
    return None


def packing_has_a_length(recipe: "Recipe") -> str | None:
    if recipe.training.packing and recipe.training.max_length is None:
        return "`packing: true` needs `max_length`, the length of a packed row; the recipe says null."
    return None


def numbers_are_in_range(recipe: "Recipe") -> str | None:
    for key, (least, greatest) in RANGES.items():
        value = getattr(recipe.training, key, getattr(recipe.model, key, None))
        if value is not None and not least <= value <= greatest:
            bounds = f"at least {least}" if greatest == math.inf else f"from {least} to {greatest}"
            return f"`{key}: {value}` must be {bounds}."
    return None


def something_trains(recipe: "Recipe") -> str | None:
    training = recipe.training
    if training.max_steps == 0:
        return "`max_steps: 0` trains nothing. Write a number above 0, or -1 to train by `num_train_epochs`."
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        return f"`num_train_epochs: {training.num_train_epochs}` trains nothing. Write a number above 0."
    if training.learning_rate == 0:
        return "`learning_rate: 0` trains nothing. Write a number above 0."
    return None


def intervals_are_positive(recipe: "Recipe") -> str | None:
    for kind in ("save", "logging", "eval"):
        steps = getattr(recipe.training, f"{kind}_steps")
        if getattr(recipe.training, f"{kind}_strategy") == "steps" and steps is not None and steps <= 0:
            return f"`{kind}_steps: {steps}` must be above 0; to switch it off write `{kind}_strategy: no`."
    return None


def optimizer_is_installed(recipe: "Recipe") -> str | None:
    """The libraries would complain only once the model is there."""
    training: Any = recipe.training
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except Exception as error:  # of whatever package the optimizer comes from
        if "model" not in str(error):  # which some need
            given = f" with `optim_args: {training.optim_args}`" if training.optim_args else ""
            return f"`optim: {training.optim.value}`{given} can't be had: {sentence(error)}"
    return None


def schedule_takes_its_arguments(recipe: "Recipe") -> str | None:
    """The libraries would complain only once the model is there."""
    training: Any = recipe.training
    kwargs = training.lr_scheduler_kwargs
    own = {} if kwargs is None else kwargs
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
        get_scheduler(training.lr_scheduler_type, optimizer, training.get_warmup_steps(100), 100, own)
    except Exception as error:  # a wrong argument is a TypeError or whatever the schedule makes of it
        given = "" if kwargs is None else f" with `lr_scheduler_kwargs: {kwargs!r}`"
        return f"`lr_scheduler_type: {training.lr_scheduler_type.value}`{given} can't be had: {sentence(error)}"
    return None


def checkpoints_hold_what_resuming_needs(recipe: "Recipe") -> str | None:
    if recipe.training.save_only_model and str(recipe.training.resume_from_checkpoint).lower() == "true":
        return (
            "`save_only_model: true` leaves out of the checkpoints what `resume_from_checkpoint: true` needs to go on: the "
            "optimizer's state and the random numbers. Remove one of them."
        )
    return None


def first_evaluation_has_a_set(recipe: "Recipe") -> str | None:
    if recipe.training.eval_on_start and recipe.training.eval_strategy == "no":
        return "`eval_on_start` needs an evaluation set. Write `eval_strategy: steps` or `epoch`."
    return None


def best_metric_is_reported(recipe: "Recipe") -> str | None:
    reported = [*METRICS, "loss", "perplexity", "aux_loss", "num_tokens"]
    reported += ["runtime", "samples_per_second", "steps_per_second"]
    best = recipe.training.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in reported:
        near = nearest(best, [f"eval_{name}" for name in reported])
        return f"`metric_for_best_model: {best}` is not reported.{near} Allowed: {', '.join(reported)}."
    return None


def data_has_one_source(recipe: "Recipe") -> str | None:
    script, mixture = recipe.script, recipe.mixture
    if bool(mixture.datasets) == bool(script.dataset_name):
        both = "names both `dataset_name` and `datasets`" if script.dataset_name else "names no data set"
        return f"The recipe {both}. Write one of `dataset_name: ...` and `datasets: [{{path: ...}}]`."
    return None


def streams_are_used_as_such(recipe: "Recipe") -> str | None:
    script, mixture, training = recipe.script, recipe.mixture, recipe.training
    if not (script.dataset_streaming or mixture.streaming):
        return None
    if training.max_steps <= 0:
        key = "streaming" if mixture.streaming else "dataset_streaming"
        return f"A streamed data set (`{key}: true`) has no length. Write `max_steps: ...`, the training steps."
    if training.dataloader_drop_last:
        return "`dataloader_drop_last` has no effect on a streamed data set. Remove it."
    if mixture.streaming and mixture.test_split_size is not None:
        return "`test_split_size` can't split a streamed mixture. Remove it, or `streaming: true`."
    return None


def trackers_are_installed(recipe: "Recipe") -> str | None:
    names: Any = recipe.training.report_to
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except Exception as error:  # each asks for its package in its own way
        near = "".join(nearest(name, TRACKERS) for name in names if name not in TRACKERS)
        why, install, rest = sentence(error).partition(" Run `pip install")
        advice = " Correct it" if near else f"{install}{rest}".removesuffix(".") or " Install it"
        return f"Cannot report to `report_to: {', '.join(names)}`: {why}{near}{advice}, or set `report_to: none`."
    return None


def hub_can_be_pushed_to(recipe: "Recipe") -> str | None:
    if not recipe.training.push_to_hub:
        return None
    if HF_HUB_OFFLINE:
        return "Cannot push to the Hub: HF_HUB_OFFLINE is set. Unset it, or set `push_to_hub: false`."
    if not (recipe.training.hub_token or get_token()):
        return "Cannot push to the Hub: there is no token. Run `hf auth login`, or set HF_TOKEN."
    return None


# In the order in which a reader of the recipe would want to hear of them: what costs nothing first
RULES: tuple[Rule, ...] = (
    keys_do_something,
    keyword_arguments_are_mappings_without_tokens,
    processes_train_together,
    packing_has_a_length,
    numbers_are_in_range,
    something_trains,
    intervals_are_positive,
    optimizer_is_installed,
    schedule_takes_its_arguments,
    checkpoints_hold_what_resuming_needs,
    first_evaluation_has_a_set,
    best_metric_is_reported,
    data_has_one_source,
    streams_are_used_as_such,
    chat_template_can_be_read,
    model_is_there,
    model_is_no_adapter,
    model_keys_are_given_once,
    adapter_has_a_part,
    quantised_models_train_adapters,
    attention_is_installed,
    adapter_spares_the_head,
)

# For a run that trains, besides
TRAINING_RULES: tuple[Rule, ...] = (trackers_are_installed, hub_can_be_pushed_to)
