"""The rules of a recipe that ask the libraries, one function each: it returns what is wrong with a recipe, or None.

They read what the recipe names (a template, a tokenizer, a configuration), and load neither data nor model.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
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


def optimizer_reads_its_keys(recipe: "Recipe") -> str | None:
    """A key is read if without it, or with another value, the optimizer would be made otherwise."""
    training: Any = recipe.training
    faults: list[str] = []

    def is_read(key: str, other: Any) -> bool:
        changed = copy.copy(training)
        setattr(changed, key, other)
        with suppress(Exception):  # `optimizer_is_installed` reports a wrong value; some need the model
            return bool(Trainer.get_optimizer_cls_and_kwargs(changed) != Trainer.get_optimizer_cls_and_kwargs(training))
        return True

    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if key in recipe.given and not is_read(key, getattr(training, key) / 2 + 1e-9):
            faults.append(key)
    if training.optim_target_modules and not is_read("optim_target_modules", None):
        faults.append("optim_target_modules")
    pairs = (training.optim_args or "").replace(" ", "").split(",")
    for pair in filter(None, pairs):
        name, _, value = pair.partition("=")
        another = f"{name}={'true' if value.lower() == 'false' else 1 + 2 * int(value) if value.isdigit() else 0.625}"
        texts = (",".join(each for each in (*(part for part in pairs if part != pair), new) if each) for new in ("", another))
        if not any(is_read("optim_args", text or None) for text in texts):
            faults.append(f"optim_args: {pair}")
    names = ", ".join(f"`{name}`" for name in faults)
    return f"`optim: {training.optim.value}` does not read {names}. Remove what it does not read." if faults else None


def warmup_is_part_of_the_schedule(recipe: "Recipe") -> str | None:
    """A schedule has a warmup if its first steps are others without one."""
    training: Any = recipe.training
    steps = training.get_warmup_steps(100)
    if not steps:
        return None
    rates = []
    for warmup in (steps, 0):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
        own = training.lr_scheduler_kwargs or {}
        try:
            schedule: Any = get_scheduler(training.lr_scheduler_type, optimizer, warmup, max(100, steps), own)
        except Exception:  # `schedule_takes_its_arguments` reports it
            return None
        rates.append([rate(step) for rate in getattr(schedule, "lr_lambdas", ()) for step in range(steps + 1)])
    if rates[0] != rates[1]:
        return None
    key = "warmup_ratio" if "warmup_ratio" in recipe.given else "warmup_steps"  # an older transformers has both
    what, name = f"`{key}: {getattr(training, key):g}`", training.lr_scheduler_type.value
    return f"{what} does nothing under `lr_scheduler_type: {name}`. Remove it, or write `constant_with_warmup` or another."


def schedule_takes_its_arguments(recipe: "Recipe") -> str | None:
    """The libraries would complain only once the model is there."""
    training: Any = recipe.training
    kwargs = training.lr_scheduler_kwargs
    own = {} if kwargs is None else kwargs
    name, warmup = training.lr_scheduler_type, training.get_warmup_steps(100)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    try:
        get_scheduler(name, optimizer, warmup, 100, own)
    except Exception as error:  # a wrong argument is a TypeError or whatever the schedule makes of it
        given = "" if kwargs is None else f" with `lr_scheduler_kwargs: {kwargs!r}`"
        return f"`lr_scheduler_type: {name.value}`{given} can't be had: {sentence(error)}"
    if not own:
        return None
    try:
        get_scheduler(name, optimizer, warmup, 100, {**own, "an argument of no schedule": 0})
    except Exception:  # it reads its arguments
        return None
    return f"`lr_scheduler_type: {name.value}` does not read `lr_scheduler_kwargs`. Remove one of them."


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
    optimizer_reads_its_keys,
    warmup_is_part_of_the_schedule,
    schedule_takes_its_arguments,
    best_metric_is_reported,
    chat_template_can_be_read,
    attention_is_installed,
    adapter_spares_the_head,
)

# For a run that trains, besides
TRAINING_RULES: tuple[Rule, ...] = (hub_can_be_pushed_to,)
