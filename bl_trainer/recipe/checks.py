"""The rules of a recipe that ask the libraries, one function each: it returns what is wrong with a recipe, or None.

They read what the recipe names (a template, a tokenizer, a configuration), and load neither data nor model.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import Trainer, get_scheduler

from .._util.process import processes
from .._util.text import listed, nearest, sentence
from ..errors import RecipeError
from ..objectives.pricing import METRICS
from .model_checks import adapter_spares_the_head, attention_is_installed, chat_template_can_be_read

if TYPE_CHECKING:
    from .recipe import Recipe

Rule = Callable[["Recipe"], str | None]


def check(recipe: "Recipe", rules: Iterable[Rule]) -> None:
    """Raise RecipeError with what each of `rules` that `recipe` breaks says."""
    faults = []
    for rule in rules:
        try:
            faults.append(rule(recipe))
        except RecipeError as error:  # what the rule asks about can't be read
            faults.append(str(error))
    if found := [*dict.fromkeys(filter(None, faults))]:
        raise RecipeError(listed(found, "the recipe"))


def processes_train_together(recipe: "Recipe") -> str | None:
    if processes() > 1 and recipe.training.world_size == 1:
        return (
            f"{processes()} processes were launched, and each would train alone. On CPUs write `use_cpu: true`; on GPUs "
            "launch no more processes than there are."
        )
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


def best_metric_is_reported(recipe: "Recipe") -> str | None:
    reported = [*METRICS, "loss", "perplexity", "aux_loss", "num_tokens"]
    reported += ["runtime", "samples_per_second", "steps_per_second"]
    best = recipe.training.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in reported:
        near = nearest(best, [f"eval_{name}" for name in reported])
        return f"`metric_for_best_model: {best}` is not reported.{near} Allowed: {', '.join(reported)}."
    return None


def hub_can_be_pushed_to(recipe: "Recipe") -> str | None:
    if not recipe.training.push_to_hub:
        return None
    if HF_HUB_OFFLINE:
        return "Cannot push to the Hub: HF_HUB_OFFLINE is set. Unset it, or set `push_to_hub: false`."
    if not (recipe.training.hub_token or get_token()):
        return "Cannot push to the Hub: there is no token. Run `hf auth login`, or set HF_TOKEN."
    return None


RULES: tuple[Rule, ...] = (
    processes_train_together,
    optimizer_is_installed,
    schedule_takes_its_arguments,
    best_metric_is_reported,
    chat_template_can_be_read,
    attention_is_installed,
    adapter_spares_the_head,
)

# For a run that trains, besides
TRAINING_RULES: tuple[Rule, ...] = (hub_can_be_pushed_to,)
