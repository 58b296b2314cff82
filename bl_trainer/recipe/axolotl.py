"""The dialect of axolotl, as far as its keys have a counterpart."""

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from .dialects import TRL, Dialect, Draft, evaluates, losing, to_environment


def _train_on_inputs(draft: Draft, value: Any) -> None:
    if value:
        draft.put("completion_only_loss", False, "was `train_on_inputs: true`")
    else:
        draft.drop("train_on_inputs", "rows of prompt and completion train on completions by default")


def _plugins(draft: Draft, value: Any) -> None:
    for name in [value] if isinstance(value, str) else value:
        if any(kernel in name.lower() for kernel in KERNELS):
            draft.drop("plugins", f"{name} has kernels, not another loss")
        else:
            draft.lose("plugins", f"bl_trainer has no {name}")


def _lora_linear(draft: Draft, value: Any) -> None:
    named = draft.old.get("lora_target_modules")
    if not value:
        draft.drop("lora_target_linear", "it is false, which is the default")
    elif named:
        draft.lose("lora_target_modules", f"{named} are joined by all linear layers, since `lora_target_linear` is true")
    if value:
        draft.put("lora_target_modules", "all-linear", "was `lora_target_linear`")


def _lora_modules(draft: Draft, value: Any) -> None:
    if not draft.old.get("lora_target_linear"):
        draft.put("lora_target_modules", value)


def _wandb_project(draft: Draft, value: Any) -> None:
    if value:
        to_environment("WANDB_PROJECT")(draft, value)
        draft.put("report_to", "wandb", "axolotl tracks a run that has a `wandb_project`")


def _special_tokens(draft: Draft, value: Any) -> None:
    for key, token in value.items():
        if key in ("pad_token", "eos_token"):
            draft.put(key, token, "was in `special_tokens`")
        else:
            draft.lose(f"special_tokens.{key}", "the tokenizer's own is used")


def _axolotl_datasets(draft: Draft, value: Any) -> None:
    entries = []
    for each in value:
        kind, path = each.get("type"), str(each["path"])
        entry = {key: each[key] for key in ("path", "name", "split", "data_files") if each.get(key) is not None}
        entries.append(entry)
        for key in [key for key in each if key not in (*entry, "type")]:
            if each[key] is not None and each[key] not in IDLE_OF_DATASETS.get(key, ()):
                draft.lose(f"datasets.{key}", f"{each[key]!r} of {path} has no counterpart")
        if kind == "chat_template":
            if not draft.old.get("train_on_inputs"):
                draft.put("assistant_only_loss", True, "axolotl trains on the assistant's turns alone")
        elif kind == "completion":
            draft.lose(
                "datasets.type", f"the long texts of {path} were cut into rows of `sequence_len`; see `packing_strategy`"
            )
        else:
            draft.lose("datasets", f"{path} is of type {kind}, which axolotl renders; write its rows as prompt and completion")
    draft.put("datasets", entries, "only the parts that have a counterpart")


def _per_epoch(draft: Draft, value: Any, kind: str) -> None:
    """Take how often an epoch evaluates or saves, as a share of all steps."""
    times = value * float(draft.old.get("num_epochs") or 1)
    if kind == "eval" and not draft.old.get("val_set_size"):
        draft.drop("evals_per_epoch", "no rows are held out")
    elif value == 1:
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
    if value:
        draft.put("dtype", "bfloat16", "axolotl loads the weights in bf16")


def _fp16(draft: Draft, value: Any) -> None:
    draft.put("fp16", value)
    if value and draft.old.get("adapter"):
        draft.put("dtype", "float16", "axolotl loads the base in fp16")


def _load_in_4bit(draft: Draft, value: Any) -> None:
    draft.put("load_in_4bit", value)
    if value:
        draft.put("use_bnb_nested_quant", True, "axolotl does so with `load_in_4bit`")


def _lr_scheduler(draft: Draft, value: Any) -> None:
    rate = draft.old.get("cosine_min_lr_ratio")
    if rate and value == "cosine":
        draft.put("lr_scheduler_type", "cosine_with_min_lr", "was `lr_scheduler: cosine` with `cosine_min_lr_ratio`")
        draft.put("lr_scheduler_kwargs", {"min_lr_rate": rate})
    else:
        draft.put("lr_scheduler_type", value, "was `lr_scheduler`")


def _excess_length(draft: Draft, value: Any) -> None:
    if value == "truncate":
        draft.drop("excess_length_strategy", "`max_length` truncates")
    else:
        draft.lose("excess_length_strategy", f"{value}: axolotl trains on no row beyond `sequence_len`; it is truncated here")


def _axolotl_template(draft: Draft, value: Any) -> None:
    if value == "tokenizer_default" or (value == "jinja" and draft.old.get("chat_template_jinja")):
        draft.drop("chat_template", "the model's own, or the given one, is used")
    else:
        draft.lose("chat_template", f"{value}: the model's own template is used; write `chat_template_path` for another")


def _axolotl_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {"micro_batch_size": 1, "num_epochs": 1, "sequence_len": 512, "lr_scheduler": "cosine"}
    found |= {"excess_length_strategy": "drop"}
    found |= {} if given.keys() & {"warmup_steps", "warmup_ratio"} else {"warmup_ratio": 0.03}
    found |= {} if given.keys() & {"bf16", "fp16", "bfloat16", "float16"} else {"bf16": "auto"}
    found |= {"lora_dropout": 0.0} if given.get("adapter") else {}
    return {key: value for key, value in found.items() if key not in given}


KERNELS = ("liger", "cut_cross_entropy")  # in the names of plugins that compute the same loss faster

# What an entry of `datasets` says without changing how its rows are read
IDLE_OF_DATASETS: dict[str, tuple[Any, ...]] = {
    "ds_type": ("json", "csv", "parquet", "arrow", "text"),
    "field": ("text",),
    "field_messages": ("messages", "conversations"),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
    "roles": ({"user": ["user"], "assistant": ["assistant"]},),
    "roles_to_train": (["assistant"],),
    "train_on_eos": ("turn",),
}
_IDLE_AXOLOTL = {
    **dict.fromkeys(("strict", "debug", "local_rank", "model_type", "tokenizer_type"), "bl_trainer finds it by itself"),
    **dict.fromkeys(("is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model"), "it has no effect"),
    **dict.fromkeys(("dataset_prepared_path", "wandb_watch", "wandb_log_model", "eval_table_size"), "it is axolotl's own"),
    "eval_max_new_tokens": "it is axolotl's own",
    "pad_to_sequence_len": "padding has no effect on the loss",
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), "it is a kernel"),
    **dict.fromkeys(
        ("flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp"), "it is a kernel"
    ),
    **dict.fromkeys(("cosine_min_lr_ratio",), "it is read with `lr_scheduler`"),
}
_CHANGES_AXOLOTL = {
    "loss_watchdog_threshold": "bl_trainer has `stop_on_nan` alone",
    "early_stopping_patience": "bl_trainer trains all steps; see `load_best_model_at_end`",
    "lora_fan_in_fan_out": "PEFT decides it by the layer",
    "s2_attention": "bl_trainer has no such attention",
    "lora_model_dir": "merge the adapter first",
    "rope_scaling": "write it into the model's configuration",
    "tokens": "bl_trainer adds no tokens",
    "curriculum_sampling": "write `train_sampling_strategy: sequential`",
}

AXOLOTL = Dialect(
    "axolotl",
    renamed={
        **TRL.renamed,
        "base_model": "model_name_or_path", "revision_of_model": "model_revision", "sequence_len": "max_length",
        "sample_packing": "packing", "eval_sample_packing": "eval_packing", "num_epochs": "num_train_epochs",
        "micro_batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
        "optimizer": "optim", "noisy_embedding_alpha": "neftune_noise_alpha",
        "peft_use_dora": "use_dora", "peft_use_rslora": "use_rslora",
        "wandb_name": "run_name", "dataset_processes": "dataset_num_proc",
    },
    values={**TRL.values, ("optim", "adamw_torch_8bit"): "adamw_8bit"},
    flags={
        **TRL.flags,
        "flash_attention": ("attn_implementation", "flash_attention_2"), "sdp_attention": ("attn_implementation", "sdpa"),
        "eager_attention": ("attn_implementation", "eager"),
        "xformers_attention": ("attn_implementation", "sdpa"),
        "use_dynamic_finetuning": ("objective", "dft"), "use_eaft": ("objective", "eaft"),
    },
    idle={**TRL.idle, **_IDLE_AXOLOTL, "loss_watchdog_patience": "it belongs to `loss_watchdog_threshold`"},
    handlers={
        **TRL.handlers, **{key: losing(key, why) for key, why in _CHANGES_AXOLOTL.items()},
        "datasets": _axolotl_datasets, "adapter": _adapter, "rl": _refuse_preferences, "bf16": _bf16,
        "fp16": _fp16, "load_in_4bit": _load_in_4bit, "lr_scheduler": _lr_scheduler, "excess_length_strategy": _excess_length,
        "chat_template": _axolotl_template, "chat_template_jinja": TRL.handlers["chat_template"],
        "val_set_size": lambda draft, value: evaluates(draft, value, "val_set_size"),
        "evals_per_epoch": lambda draft, value: _per_epoch(draft, value, "eval"),
        "saves_per_epoch": lambda draft, value: _per_epoch(draft, value, "save"),
        "special_tokens": _special_tokens, "wandb_project": _wandb_project,
        "train_on_inputs": _train_on_inputs, "plugins": _plugins, "lora_target_linear": _lora_linear,
        "lora_target_modules": _lora_modules,
        "test_datasets": losing("test_datasets", "write `test_split_size`, or a test split"),
    },
    defaults=_axolotl_defaults,
)  # fmt: skip
