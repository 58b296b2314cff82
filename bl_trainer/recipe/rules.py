"""The rules of a recipe that its keys alone decide, one function each: it takes the keys and yields what is wrong with them.

They need neither torch nor TRL. `checks` has those that ask the libraries.
"""

import json
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.text import nearest
from ..errors import RecipeError
from ..tokens.row_cut import RowCut
from .fields import recipe_fields
from .keys import CHECKPOINTING, IDLE_UNDER, NEEDS, PACKAGES, RANGES, TRACKERS
from .paths import is_path, missing

if TYPE_CHECKING:
    from .reading import Keys

Rule = Callable[["Keys"], Iterator[str]]


def keys_do_something(keys: "Keys") -> Iterator[str]:
    for key in sorted(keys.given & NEEDS.keys()):
        other, line = NEEDS[key]
        is_read = key == "packing_strategy" and keys["eval_packing"]
        is_default = key == "dataset_test_split" and keys[key] == recipe_fields()[key].default  # TRL's, written out
        if other not in keys and not is_read and not is_default:
            yield f"`{key}` does nothing without `{other}`. Write `{line}`, or remove `{key}`."
    for key in sorted(keys.given & IDLE_UNDER.keys()):
        other, values = IDLE_UNDER[key]
        if keys[other] in values:
            yield f"`{key}` does nothing under `{other}: {keys[other]}`. Remove one of them."
    if "ignore_bias_buffers" in keys:
        yield "`ignore_bias_buffers` does nothing in SFT. Remove it."
    if "do_train" in keys and not keys["do_train"]:
        yield "`do_train: false` does nothing: `train` trains. Remove it; `diagnose` measures without training."
    if keys["do_predict"]:
        yield "`do_predict: true` does nothing. Remove it; `bl-trainer evaluate` writes a model's answers."
    if "do_eval" in keys and keys["do_eval"] != (keys["eval_strategy"] != "no"):
        yield (
            f"`do_eval: {str(keys['do_eval']).lower()}` does nothing: `eval_strategy: {keys['eval_strategy']}` decides. Remove "
            "it, or write `eval_strategy: steps` to evaluate and `no` not to."
        )


def compilation_is_decided_once(keys: "Keys") -> Iterator[str]:
    for key in ("torch_compile_backend", "torch_compile_mode"):
        if keys[key] is not None and "torch_compile" in keys and not keys["torch_compile"]:
            yield f"`{key}` switches compilation on, and `torch_compile: false` off. Remove one of them."


def keyword_arguments_are_mappings_without_tokens(keys: "Keys") -> Iterator[str]:
    for key in ("model_init_kwargs", "dataset_kwargs"):
        value = keys[key]
        if value is not None and not isinstance(value, dict):
            yield f"`{key}` must be a mapping, got {value!r}."
        elif {"token", "use_auth_token"} & set(value or {}):
            yield f"A token in `{key}` would be logged. Put it in the environment variable HF_TOKEN instead."


def packing_has_a_length(keys: "Keys") -> Iterator[str]:
    if keys["packing"] and keys["max_length"] is None:
        yield "`packing: true` needs `max_length`, the length of a packed row; the recipe says null."


def numbers_are_in_range(keys: "Keys") -> Iterator[str]:
    for key, (least, greatest) in RANGES.items():
        value = keys[key]
        if value is not None and not least <= value <= greatest:
            bounds = f"at least {least}" if greatest == math.inf else f"from {least} to {greatest}"
            bounds = f"at least {least} and below 1" if 0 < 1 - greatest < 1e-9 else bounds
            yield f"`{key}: {value}` must be {bounds}."


def something_trains(keys: "Keys") -> Iterator[str]:
    steps, epochs = keys["max_steps"], keys["num_train_epochs"]
    if steps == 0:
        yield "`max_steps: 0` trains nothing. Write a number above 0, or -1 to train by `num_train_epochs`."
    if steps < 0 and epochs <= 0:
        yield f"`num_train_epochs: {epochs:g}` trains nothing. Write a number above 0."
    if keys["learning_rate"] == 0:
        yield "`learning_rate: 0` trains nothing. Write a number above 0."
    for key, idle in (("lora_alpha", 0), ("lora_dropout", 1)):
        if keys["use_peft"] and keys[key] == idle:
            yield f"`{key}: {idle}` trains nothing: the adapter's part is 0. Write another number."


def intervals_are_positive(keys: "Keys") -> Iterator[str]:
    for kind in ("save", "logging", "eval"):
        steps = keys[f"{kind}_steps"]
        if keys[f"{kind}_strategy"] == "steps" and steps is not None and steps <= 0:
            yield f"`{kind}_steps: {steps:g}` must be above 0; to switch it off write `{kind}_strategy: no`."


def checkpoints_hold_what_resuming_needs(keys: "Keys") -> Iterator[str]:
    if keys["save_only_model"] and str(keys["resume_from_checkpoint"]).lower() == "true":
        yield (
            "`save_only_model: true` leaves out of the checkpoints what `resume_from_checkpoint: true` needs: the "
            "optimizer's state and the random numbers. Remove one of them."
        )


def first_evaluation_has_a_set(keys: "Keys") -> Iterator[str]:
    if keys["eval_on_start"] and keys["eval_strategy"] == "no":
        yield "`eval_on_start` needs an evaluation set. Write `eval_strategy: steps` or `epoch`."


def best_model_is_evaluated(keys: "Keys") -> Iterator[str]:
    evaluate, save = keys["eval_strategy"], keys["save_strategy"]
    if not keys["load_best_model_at_end"] or save == "best":
        return
    wanted = next((strategy for strategy in (evaluate, save) if strategy != "no"), "steps")
    lines = [f"`{key}: {wanted}`" for key in ("eval_strategy", "save_strategy") if keys[key] != wanted]
    if lines:
        yield (
            f"`load_best_model_at_end: true` needs an evaluation at each checkpoint, got `eval_strategy: {evaluate}` and "
            f"`save_strategy: {save}`. Write {' and '.join(lines)}."
        )
    every, steps = keys["eval_steps"] or keys["logging_steps"], keys["save_steps"]
    if not lines and wanted == "steps" and min(every, steps) >= 1 and steps % every:
        yield (
            f"`load_best_model_at_end: true` needs an evaluation at each checkpoint: `save_steps: {steps:g}` must be a "
            f"multiple of `eval_steps: {every:g}`. Write `save_steps: {every:g}`."
        )


def data_has_one_source(keys: "Keys") -> Iterator[str]:
    if {"datasets", "dataset_name"} & (keys.given - keys.values.keys()):
        return  # one has a mistake of its own
    if bool(keys["datasets"]) == bool(keys["dataset_name"]):
        both = "names both `dataset_name` and `datasets`" if keys["dataset_name"] else "names no data set"
        yield f"The recipe {both}. Write one of `dataset_name: ...` and `datasets: [{{path: ...}}]`."


def streams_are_used_as_such(keys: "Keys") -> Iterator[str]:
    if not (keys["dataset_streaming"] or keys["streaming"]):
        return
    if keys["max_steps"] < 0:
        key = "streaming" if keys["streaming"] else "dataset_streaming"
        yield f"A streamed data set (`{key}: true`) has no length. Write `max_steps: ...`, the training steps."
    if keys["dataloader_drop_last"]:
        yield "`dataloader_drop_last` has no effect on a streamed data set. Remove it."
    if (strategy := _sampling(keys)) in ("group_by_length", "batch_rebalance"):
        yield f"`train_sampling_strategy: {strategy}` has no effect on a streamed data set. Remove it."
    if keys["streaming"] and keys["test_split_size"] is not None:
        yield "`test_split_size` can't split a streamed mixture. Remove it, or `streaming: true`."


def _sampling(keys: "Keys") -> str:
    """Return the order of training rows; older transformers have no key for it."""
    return keys["train_sampling_strategy"] if "train_sampling_strategy" in keys else "random"


def order_is_drawn_by_its_seed(keys: "Keys") -> Iterator[str]:
    """Accelerate's seedable sampler alone reads `data_seed`, and takes the place of a random one only."""
    if keys["data_seed"] is None:
        return
    key = "streaming" if keys["streaming"] else "dataset_streaming"
    own = keys["accelerator_config"]
    if keys[key]:
        why = f"`{key}: true`"
    elif _sampling(keys) != "random":
        why = f"`train_sampling_strategy: {_sampling(keys)}`"
    elif isinstance(own, dict) and own.get("use_seedable_sampler") is False:
        why = "`accelerator_config: {use_seedable_sampler: false}`"
    else:
        return
    yield f"`data_seed` does not order the training rows under {why}. Remove one of them."


def checkpointing_is_decided_once(keys: "Keys") -> Iterator[str]:
    for old, new in CHECKPOINTING.items():
        if old in keys and new in keys and keys[old] != keys[new]:
            yield f"`{old}` is another name of `{new}`, and the recipe gives both another value. Remove `{old}`."


def model_is_there(keys: "Keys") -> Iterator[str]:
    name = keys["model_name_or_path"]
    if not name:
        yield "The recipe names no model. Write `model_name_or_path: ...`, a folder or a Hub id."
    elif is_path(name) and not Path(name).is_dir():
        yield f"`model_name_or_path: {name}` is not a folder."
    elif (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        try:
            base = json.loads((Path(name) / "adapter_config.json").read_text()).get("base_model_name_or_path")
        except (ValueError, AttributeError):
            yield f"`model_name_or_path: {name}` has an adapter_config.json that can't be read. Write another model."
            return
        yield (
            f"`model_name_or_path: {name}` is an adapter of {base}. Write `model_name_or_path: {base}` to train a new one, "
            "`resume_from_checkpoint` besides to resume a checkpoint, or merge the adapter first."
        )


def model_keys_are_given_once(keys: "Keys") -> Iterator[str]:
    own = keys["model_init_kwargs"]
    for key, top in (("dtype", "dtype"), ("revision", "model_revision"), ("attn_implementation", "attn_implementation")):
        if top in keys and isinstance(own, dict) and key in own:
            yield f"`{top}` and `{key}` in `model_init_kwargs` say the same thing. Keep one of them."


def files_are_there(keys: "Keys") -> Iterator[str]:
    if fault := missing(keys["dataset_name"] or ""):
        yield f"Cannot load `dataset_name: {keys['dataset_name']}`: {fault}."
    if keys["dataset_config"] and Path(keys["dataset_name"] or "").expanduser().is_file():
        yield f"`dataset_config` does nothing beside a file, `dataset_name: {keys['dataset_name']}`. Remove it."
    for entry in filter(lambda entry: isinstance(entry, dict), keys["datasets"] or ()):
        path = str(entry.get("path", ""))
        if fault := missing(path):
            yield f"Cannot load `path: {path}` in `datasets`: {fault}."
        for key in ("name", "data_dir", "data_files"):
            if entry.get(key) and Path(path).expanduser().is_file():
                yield f"`{key}` does nothing beside a file, `path: {path}` in `datasets`. Remove it."
        if isinstance(entry.get("fraction"), (int, float)) and entry["fraction"] < 0:
            yield f"`fraction: {entry['fraction']}` of {path} must be at least 0."
    template = Path(keys["chat_template_path"] or ".")
    if template.suffix in (".jinja", ".j2") and not template.is_file():
        yield f"`chat_template_path: {template}` can't be read: No such file or directory."


def dropped_rows_have_scores(keys: "Keys") -> Iterator[str]:
    if keys["drop_rows"] is None:
        return
    try:
        cut = RowCut.parse(keys["drop_rows"])
    except RecipeError as error:
        yield str(error)
        return
    if not cut.path.exists():
        yield f"Cannot use `drop_rows: {cut}`: {cut.path} does not exist. Run `diagnose --scores` first, and name its folder."


def quantised_models_train_adapters(keys: "Keys") -> Iterator[str]:
    for key in ("load_in_4bit", "load_in_8bit"):
        if keys[key] and not keys["use_peft"]:
            yield f"`{key}`: such a model can't be trained as it is. Write `use_peft: true` for QLoRA."


def packages_are_installed(keys: "Keys") -> Iterator[str]:
    for key, (module, package) in PACKAGES.items():
        if keys[key] and find_spec(module) is None:
            yield f"Cannot use `{key}: true`: {package} is not installed. Run `pip install {package}`, or remove `{key}`."


def trackers_are_installed(keys: "Keys") -> Iterator[str]:
    asked: Any = keys["report_to"] or []
    for name in map(str, asked if isinstance(asked, list) else [asked]):
        if name in ("all", "none"):
            continue
        what = f"Cannot report to `report_to: {name}`"
        if name not in TRACKERS:
            near = nearest(name, TRACKERS)
            yield f"{what}: it is unknown.{near} Write one of {', '.join(TRACKERS)}, or set `report_to: none`."
        elif find_spec(TRACKERS[name][0]) is None:
            package = TRACKERS[name][1]
            yield f"{what}: {package} is not installed. Run `pip install {package}`, or set `report_to: none`."


# Of any recipe, wherever it is to be used
KEY_RULES: tuple[Rule, ...] = (
    model_keys_are_given_once,
    streams_are_used_as_such,
    order_is_drawn_by_its_seed,
    checkpointing_is_decided_once,
    keys_do_something,
    compilation_is_decided_once,
    keyword_arguments_are_mappings_without_tokens,
    packing_has_a_length,
    numbers_are_in_range,
    something_trains,
    intervals_are_positive,
    checkpoints_hold_what_resuming_needs,
    first_evaluation_has_a_set,
    best_model_is_evaluated,
    quantised_models_train_adapters,
)

# Of a recipe that is to be used here and now
PLACE_RULES: tuple[Rule, ...] = (
    model_is_there,
    data_has_one_source,
    files_are_there,
    dropped_rows_have_scores,
    packages_are_installed,
)

# For a run that trains, besides
TRAINING_RULES: tuple[Rule, ...] = (trackers_are_installed,)
