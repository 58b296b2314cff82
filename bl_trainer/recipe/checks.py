"""The rules of a recipe, one function each: it takes a recipe and returns what is wrong with it, or None.

They read what the recipe names (a template, a tokenizer, a configuration), and load neither data nor model.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from accelerate.utils import is_bnb_available
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from .._util.process import processes
from .._util.text import nearest, sentence
from .._util.transformers import TRACKERS
from ..errors import RecipeError
from ..objectives.pricing import METRICS
from ..training.refusals import refuse_lm_head_adapter
from .keys import NEEDS, RANGES
from .local_files import is_path

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


def chat_template_can_be_read(recipe: "Recipe") -> str | None:
    if not recipe.training.chat_template_path:
        return None
    path = Path(recipe.training.chat_template_path)
    what = f"`chat_template_path: {path}`"
    if path.suffix in (".jinja", ".j2"):
        try:
            text = re.sub(r"{%-? *(end)?generation *-?%}", "", path.read_text(encoding="utf-8"))
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        except OSError as error:
            return f"{what} can't be read: {error.strerror}."
        except jinja2.TemplateSyntaxError as error:
            return f"{what}, line {error.lineno}: {error.message}"
        return None
    try:  # a model whose template is taken
        AutoTokenizer.from_pretrained(path)
    except Exception as error:  # it can be told in many ways that there is no such model
        return f"{what} has no tokenizer, and is no .jinja file: {sentence(error)}"
    return None


def model_is_there(recipe: "Recipe") -> str | None:
    name = recipe.model.model_name_or_path
    if not name:
        return "The recipe names no model. Write `model_name_or_path: ...`, a folder or a Hub id."
    return f"`model_name_or_path: {name}` is not a folder." if is_path(name) and not Path(name).is_dir() else None


def model_is_no_adapter(recipe: "Recipe") -> str | None:
    folder = Path(str(recipe.model.model_name_or_path))
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() or (folder / "config.json").is_file():
        return None
    base = json.loads(adapter.read_text()).get("base_model_name_or_path")
    return (
        f"`model_name_or_path: {recipe.model.model_name_or_path}` is an adapter of {base}. Write `model_name_or_path: {base}` "
        "to train a new one, `resume_from_checkpoint` besides to go on with a checkpoint, or merge the adapter first."
    )


def model_keys_are_given_once(recipe: "Recipe") -> str | None:
    for key, top in (("dtype", "dtype"), ("revision", "model_revision"), ("attn_implementation", "attn_implementation")):
        if top in recipe.given and key in (recipe.training.model_init_kwargs or {}):
            return f"`{top}` and `{key}` in `model_init_kwargs` say the same thing. Keep one of them."
    return None


def adapter_has_a_part(recipe: "Recipe") -> str | None:
    for key, idle in (("lora_alpha", 0), ("lora_dropout", 1)):
        if recipe.model.use_peft and getattr(recipe.model, key) == idle:
            return f"`{key}: {idle}` trains nothing: the adapter's part is 0. Write another number."
    return None


def quantised_models_train_adapters(recipe: "Recipe") -> str | None:
    model = recipe.model
    quantised = model.load_in_4bit or model.load_in_8bit
    if quantised and not model.use_peft:
        key = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        return f"`{key}`: such a model can't be trained as it is. Write `use_peft: true` for QLoRA."
    if quantised and not is_bnb_available():
        return "`load_in_4bit` and `load_in_8bit` need bitsandbytes. Run `pip install bitsandbytes`."
    return None


def attention_is_installed(recipe: "Recipe") -> str | None:
    asked: Any = recipe.model_init_kwargs()["attn_implementation"]
    if not isinstance(asked, str) or asked in ("eager", "sdpa"):
        return None
    config = recipe.pretrained(AutoConfig, "configuration")
    trusted = recipe.training.trust_remote_code
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=asked, trust_remote_code=trusted)
    except Exception as error:  # a kernel may come from the Hub
        return f"Cannot use `attn_implementation: {asked}`: {sentence(error)} Install it, or set `attn_implementation: sdpa`."
    return None


def adapter_spares_the_head(recipe: "Recipe") -> str | None:
    try:
        refuse_lm_head_adapter(recipe.peft_config)
    except ValueError as error:
        return sentence(error)
    return None


def model_knows_the_end(recipe: "Recipe") -> str | None:
    """TRL says that `eos_token` is none of the model's only once the model is there."""
    end = recipe.training.eos_token
    if end is None:
        return None
    tokenizer = recipe.pretrained(AutoTokenizer, "tokenizer")
    if end in tokenizer.get_vocab():
        return None
    return (
        f"`eos_token: {end}` is not in the vocabulary of {recipe.model.model_name_or_path}. Write `--eos_token` with what "
        f"ends a turn in its chat template, or, for data without one, its own `--eos_token '{tokenizer.eos_token}'`."
    )


def trackers_are_installed(recipe: "Recipe") -> str | None:
    names: Any = recipe.training.report_to
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except Exception as error:  # each asks for its package in its own way
        near = "".join(nearest(name, TRACKERS) for name in names if name not in TRACKERS)
        advice = "Correct" if near else "Install"
        return (
            f"Cannot report to `report_to: {', '.join(names)}`: {sentence(error)}{near} {advice} it, or set `report_to: none`."
        )
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
