"""The `--help` of a verb: its own options and the recipe keys, in titled groups."""

import re
import shutil
import textwrap
from collections.abc import Iterator

from .fields import Field, fields_of, recipe_fields

# Verbs -> the dataclass of their options
OPTIONS = {
    "train": "TrainArguments",
    "diagnose": "DiagnoseArguments",
    "sweep": "SweepArguments",
    "evaluate": "EvaluateArguments",
    "merge": "MergeArguments",
    "convert": "ConvertArguments",
    "prepare-data": "PrepareArguments",
    "score": "ScoreArguments",
}

# What must be given stands outside of brackets
USAGE = {
    "train": "--config RECIPE [--OPTION VALUE ...] [--KEY VALUE ...]",
    "diagnose": "{--config RECIPE | --model NAME --data FILE} {--report FOLDER | --scores FOLDER} "
    "[--OPTION VALUE ...] [--KEY VALUE ...]",
    "sweep": "--config RECIPE --sweep FILE [--OPTION VALUE ...] [--KEY VALUE ...]",
    "evaluate": "--model MODEL [MODEL ...] --tasks TASK[,TASK] --output FOLDER [--OPTION VALUE ...]",
    "merge": "RUN --output FOLDER [--OPTION VALUE ...]",
    "convert": "RECIPE --output FILE",
    "prepare-data": "NAME --output FOLDER [--OPTION VALUE ...]",
    "score": "OBJECTIVE --output FOLDER [--OPTION VALUE ...]",
}

# What stands below a verb's description
REMARKS = {"prepare-data": "Names: math, medical, figfont, coding, low_resource, instruction, openbookqa."}

# Recipe keys by what a user looks for; a key stands in the first group whose pattern it matches
GROUPS = {
    "Objective": r"objective|threshold|loss_head|stop_on_nan",
    "Model": r"model_.*|dtype|attn_implementation|trust_remote_code|chat_template_path|(eos|pad)_token|router_aux_loss_coef",
    "Data": r"dataset.*|drop_rows|streaming|test_split_size|max_length|truncation_mode|(eval_)?packing.*|pad.*|.*_only_loss"
    r"|shuffle_dataset|remove_unused_columns|label_names|train_sampling_strategy|length_column_name|dataloader_.*",
    "LoRA and quantisation": r"use_peft|lora_.*|use_rslora|use_dora|load_in_.*|bnb_.*|use_bnb_.*",
    "Evaluation": r"eval_.*|.*_eval_.*|.*_full_eval|metric_.*|greater_.*|load_best_.*|include_for_metrics",
    "Training": r"per_device_.*|num_train_epochs|max_(steps|grad_norm)|learning_rate|lr_.*|warmup_.*|optim.*|weight_decay"
    r"|adam.*|gradient_.*|seed|data_seed|bf16|fp16|tf32|activation_.*|use_cpu|neftune_.*|resume_.*|.*liger.*|torch_compile.*"
    r"|use_cache",
    "Logging and saving": r"output_dir|log.*|report_to|run_name|project|trackio_.*|save_.*|push_.*|hub_.*|disable_tqdm"
    r"|include_.*",
    "Several devices, and the rest": r".*",
}

INDENT = 30
METAVARS = {bool: "true|false", float: "X", int: "N", dict: "JSON"}


def verb_help(verb: str, description: str) -> str:
    """Return the help of a verb, read from the sources of its options and of the recipe's keys.

    Raises DependencyError where these are not in their place.
    """
    required = dict(re.findall(r"--(\w+) ([A-Z]+)", re.sub(r"\[.*?\]", "", USAGE[verb])))
    options = {name: field for name, field in fields_of(OPTIONS[verb]).items() if field.text}  # not what is given by its place
    by_name = options | (recipe_fields() if "config" in required else {})
    groups: dict[str, list[str]] = {title: [] for title in ("Required", "Options", *GROUPS)}
    for name, metavar in required.items():
        what = by_name[name].text if name in by_name else "The recipe: a YAML file of the keys below."
        groups["Required"] += _entry(f"--{name} {metavar}", what)
    for name in sorted(by_name, key=_rank):
        if name not in required:
            group = _group(name) if "config" in required else "Options"
            groups[group] += _entry(_spelled(by_name[name]), _described(by_name[name]))
    lines = [f"usage: bl-trainer {verb} {USAGE[verb]}", "", description, *([REMARKS[verb]] if verb in REMARKS else [])]
    for title, entries in groups.items():
        lines += ["", f"{title}:", *entries] if entries else []
    if "config" in required:
        lines += ["", "Write a key in the recipe as `key: value`, or on the command line as `--key value`, which wins."]
    return "\n".join(lines) + "\n"


def _rank(key: str) -> int:
    """Return where a key stands within its group: TRL's and ours before those of any training by transformers."""
    return 2 if key in fields_of("TrainingArguments") else 1 if key in fields_of("BLConfig") else 0


def _group(key: str) -> str:
    """Return the title of the group that an option of a recipe's verb stands in."""
    if key not in recipe_fields():
        return "Options"
    return next(title for title, pattern in GROUPS.items() if re.fullmatch(pattern, key))


def _spelled(field: Field) -> str:
    """Return an option with what it takes: `--seed N`."""
    choices = [str(choice) for choice in field.choices]
    if field.metavar:
        what = field.metavar
    elif choices and sum(map(len, choices)) < 60:
        what = "|".join(choices)
    else:
        taken = field.items if list in field.kinds else field.kinds
        what = next((METAVARS[kind] for kind in METAVARS if kind in taken), "NAME")
    return f"--{field.name} {what}" + (f" [{what} ...]" if list in field.kinds else "")


def _described(field: Field) -> str:
    text = " ".join(field.text.replace("%%", "%").split())
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return text if default in (None, "", [], {}) else f"{text} (default: {default})"


def _entry(option: str, text: str) -> Iterator[str]:
    """Yield the lines of one option."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    lines = textwrap.wrap(text, width - INDENT) or [""]
    option = f"  {option}"
    if len(option) < INDENT - 1:
        yield f"{option:<{INDENT}}{lines.pop(0)}".rstrip()
    else:
        yield option
    yield from (f"{'':{INDENT}}{line}" for line in lines)
