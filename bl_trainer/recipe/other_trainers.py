"""The dialects of axolotl and LLaMA-Factory, as far as their keys have a counterpart."""

from typing import Any

from ..errors import RecipeError
from .dialects import TRL, Dialect, Draft, Handler, to_environment

FLASH = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "sdpa": "sdpa", "disabled": "eager"}


def _losing(key: str, why: str) -> Handler:
    """Return what notes a key that changes training, unless it is switched off."""

    def handle(draft: Draft, value: Any) -> None:
        if value:
            draft.lose(key, why)
        else:
            draft.drop(key, "it is switched off")

    return handle


def _evaluates(draft: Draft, size: Any, key: str) -> None:
    """Split off an evaluation set, unless its size is 0."""
    if size:
        draft.put("test_split_size", size, f"was `{key}`")
        draft.new.setdefault("eval_strategy", "steps")
    else:
        draft.drop(key, "it is 0")


def _train_on_inputs(draft: Draft, value: Any) -> None:
    if value:
        draft.put("completion_only_loss", False, "was `train_on_inputs: true`")
    else:
        draft.drop("train_on_inputs", "rows of prompt and completion train on completions by default")


def _special_tokens(draft: Draft, value: Any) -> None:
    for key, token in value.items():
        if key in ("pad_token", "eos_token"):
            draft.put(key, token, "was in `special_tokens`")
        else:
            draft.lose(f"special_tokens.{key}", "the tokenizer's own is used")


# axolotl


def _axolotl_datasets(draft: Draft, value: Any) -> None:
    entries = []
    for each in value:
        kind, path = each.get("type"), str(each["path"])
        entry = {key: each[key] for key in ("path", "name", "split", "data_files") if each.get(key) is not None}
        entries.append(entry)
        if kind == "chat_template":
            if not draft.old.get("train_on_inputs"):
                draft.put("assistant_only_loss", True, "axolotl trains on the assistant's turns alone")
        elif kind not in ("completion", "chat_template"):
            draft.lose("datasets", f"{path} is of type {kind}, which axolotl renders; write its rows as prompt and completion")
    draft.put("datasets", entries, "only the parts that have a counterpart")


def _per_epoch(draft: Draft, value: Any, kind: str) -> None:
    """Take how often an epoch evaluates or saves, as a share of all steps."""
    times = value * float(draft.old.get("num_epochs", 1))
    if value == 1:
        draft.put(f"{kind}_strategy", "epoch", f"was `{kind}s_per_epoch`")
    elif times > 1:
        draft.put(f"{kind}_strategy", "steps", f"was `{kind}s_per_epoch`")
        draft.put(f"{kind}_steps", round(1 / times, 6), f"a share of all steps: {times:g} times in all")
    else:
        draft.drop(f"{kind}s_per_epoch", f"{value:g} is less than once; write `{kind}_steps`")


def _adapter(draft: Draft, value: Any) -> None:
    if value not in ("lora", "qlora"):
        raise RecipeError(f"Cannot convert `adapter: {value}`: bl_trainer trains LoRA alone. Remove it.")
    draft.put("use_peft", True, f"was `adapter: {value}`")


def _refuse_preferences(draft: Draft, value: Any) -> None:
    raise RecipeError(f"Cannot convert `rl: {value}`: bl_trainer trains supervised objectives alone.")


def _bf16(draft: Draft, value: Any) -> None:
    if value == "auto":
        draft.drop("bf16", "auto is the default")
    else:
        draft.put("bf16", value in (True, "full"))


_IDLE_AXOLOTL = {
    **dict.fromkeys(("strict", "debug", "local_rank", "model_type", "tokenizer_type"), "bl_trainer finds it by itself"),
    **dict.fromkeys(("is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model"), "it has no effect"),
    **dict.fromkeys(("dataset_prepared_path", "wandb_watch", "wandb_log_model", "eval_table_size"), "it is axolotl's own"),
    "eval_max_new_tokens": "it is axolotl's own",
    "pad_to_sequence_len": "padding has no effect on the loss",
    "plugins": "bl_trainer has none",
}
_CHANGES_AXOLOTL = {
    "loss_watchdog_threshold": "bl_trainer has `stop_on_nan` alone",
    "early_stopping_patience": "bl_trainer trains all steps; see `load_best_model_at_end`",
    "lora_fan_in_fan_out": "PEFT decides it by the layer",
    "s2_attention": "bl_trainer has no such attention",
    "lora_model_dir": "merge the adapter first",
    "rope_scaling": "write it into the model's configuration",
    "chat_template": "the model's own template is used; write `chat_template_path` for another",
    "tokens": "bl_trainer adds no tokens",
    "excess_length_strategy": "`max_length` truncates",
    "curriculum_sampling": "write `train_sampling_strategy: sequential`",
}

AXOLOTL = Dialect(
    "axolotl",
    renamed={
        **TRL.renamed,
        "base_model": "model_name_or_path", "revision_of_model": "model_revision", "sequence_len": "max_length",
        "sample_packing": "packing", "eval_sample_packing": "eval_packing", "num_epochs": "num_train_epochs",
        "micro_batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
        "optimizer": "optim", "lr_scheduler": "lr_scheduler_type", "peft_use_dora": "use_dora", "peft_use_rslora": "use_rslora",
        "wandb_name": "run_name", "dataset_processes": "dataset_num_proc",
    },
    values={**TRL.values, ("optim", "adamw_torch_8bit"): "adamw_8bit"},
    flags={
        **TRL.flags,
        "flash_attention": ("attn_implementation", "flash_attention_2"), "sdp_attention": ("attn_implementation", "sdpa"),
        "eager_attention": ("attn_implementation", "eager"), "lora_target_linear": ("lora_target_modules", "all-linear"),
        "xformers_attention": ("attn_implementation", "sdpa"),
    },
    idle={**TRL.idle, **_IDLE_AXOLOTL, "loss_watchdog_patience": "it belongs to `loss_watchdog_threshold`"},
    handlers={
        **TRL.handlers, **{key: _losing(key, why) for key, why in _CHANGES_AXOLOTL.items()},
        "datasets": _axolotl_datasets, "adapter": _adapter, "rl": _refuse_preferences, "bf16": _bf16,
        "val_set_size": lambda draft, value: _evaluates(draft, value, "val_set_size"),
        "evals_per_epoch": lambda draft, value: _per_epoch(draft, value, "eval"),
        "saves_per_epoch": lambda draft, value: _per_epoch(draft, value, "save"),
        "special_tokens": _special_tokens, "wandb_project": to_environment("WANDB_PROJECT"),
        "train_on_inputs": _train_on_inputs,
        "test_datasets": _losing("test_datasets", "write `test_split_size`, or a test split"),
    },
    defaults={"lora_dropout": 0.0},
)  # fmt: skip


# LLaMA-Factory


def _stage(draft: Draft, value: Any) -> None:
    if value != "sft":
        raise RecipeError(f"Cannot convert `stage: {value}`: bl_trainer trains supervised objectives alone.")
    draft.drop("stage", "bl_trainer does nothing else")


def _finetuning_type(draft: Draft, value: Any) -> None:
    if value not in ("lora", "full"):
        raise RecipeError(f"Cannot convert `finetuning_type: {value}`: bl_trainer trains LoRA, or the full model.")
    if value == "lora":
        draft.put("use_peft", True, "was `finetuning_type: lora`")
        rank = draft.old.get("lora_rank", 8)
        if not draft.old.get("lora_alpha"):
            draft.put("lora_alpha", 2 * rank, "LLaMA-Factory's default, twice the rank")
    else:
        draft.drop("finetuning_type", "full is the default")


def _names(value: Any) -> list[str]:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)


def _lora_target(draft: Draft, value: Any) -> None:
    draft.put("lora_target_modules", "all-linear" if value == "all" else _names(value), "was `lora_target`")


def _dataset(draft: Draft, value: Any) -> None:
    most = draft.old.get("max_samples")
    split = f"train[:{most}]" if most else "train"
    note = "was `dataset`" + ("; the slice was `max_samples`" if most else "")
    draft.put("datasets", [{"path": name, "split": split} for name in _names(value)], note)
    draft.lose("dataset", "its names are of dataset_info.json; write the file, folder or Hub id of each as `path`")
    draft.lose("dataset", "rows must be messages, or prompt and completion, not instruction and output")
    if not draft.old.get("train_on_prompt"):
        draft.lose("train_on_prompt", "LLaMA-Factory trains on answers alone; for messages write `assistant_only_loss: true`")


def _quantization(draft: Draft, value: Any) -> None:
    draft.put(f"load_in_{value}bit", True, "was `quantization_bit`")


def _flash_attn(draft: Draft, value: Any) -> None:
    if value in FLASH:
        draft.put("attn_implementation", FLASH[value], f"was `flash_attn: {value}`")
    else:
        draft.drop("flash_attn", "auto is the default")


def _nothing(draft: Draft, value: Any) -> None:
    """The key is read with another."""


LLAMA_FACTORY = Dialect(
    "LLaMA-Factory",
    renamed={
        **TRL.renamed, "lora_rank": "lora_r", "cutoff_len": "max_length", "use_rslora": "use_rslora",
        "additional_target": "lora_modules_to_save",
    },
    values=TRL.values,
    flags={**TRL.flags, "enable_liger_kernel": ("use_liger_kernel", True)},
    idle={
        **TRL.idle,
        **dict.fromkeys(("overwrite_cache", "plot_loss", "dataloader_num_workers_eval"), "it is LLaMA-Factory's own"),
    },
    handlers={
        **TRL.handlers,
        "stage": _stage, "finetuning_type": _finetuning_type, "lora_target": _lora_target, "dataset": _dataset,
        "max_samples": _nothing, "train_on_prompt": _nothing,
        "val_size": lambda draft, value: _evaluates(draft, value, "val_size"),
        "quantization_bit": _quantization, "flash_attn": _flash_attn,
        "template": _losing("template", "the model's own template is used; write `chat_template_path` for another"),
        "eval_dataset": _losing("eval_dataset", "write `test_split_size`, or a test split"),
        "dataset_dir": _losing("dataset_dir", "write paths in `datasets`"),
        "neat_packing": lambda draft, value: draft.put("packing", value, "was `neat_packing`"),
    },
    defaults={
        "learning_rate": 5e-5, "max_length": 2048, "lora_r": 8, "lora_dropout": 0.0, "lora_target_modules": "all-linear",
    },
)  # fmt: skip


def dialect_of(old: dict[str, Any]) -> Dialect:
    """Return the dialect of a recipe, by the keys that only one of them has."""
    if "base_model" in old:
        return AXOLOTL
    return LLAMA_FACTORY if {"stage", "finetuning_type", "cutoff_len"} & old.keys() else TRL
