"""The dialect of LLaMA-Factory, as far as its keys have a counterpart."""

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from .dialects import TRL, Dialect, Draft, Handler, evaluates, losing

FLASH = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "sdpa": "sdpa", "disabled": "eager"}


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
    note = "was `dataset`" + ("; the slice was `max_samples`: remove it where a set has fewer rows" if most else "")
    draft.put("datasets", [{"path": name, "split": split} for name in _names(value)], note)
    draft.lose("dataset", "its names are of dataset_info.json; write the file, folder or Hub id of each as `path`")
    draft.lose("dataset", "rows must be messages, or prompt and completion, not instruction and output")
    if not draft.old.get("train_on_prompt"):
        draft.lose("train_on_prompt", "LLaMA-Factory trains on answers alone; for messages write `assistant_only_loss: true`")


def _train_on_prompt(draft: Draft, value: Any) -> None:
    if value:
        draft.put("completion_only_loss", False, "was `train_on_prompt: true`")


def _quantization(draft: Draft, value: Any) -> None:
    draft.put(f"load_in_{value}bit", True, "was `quantization_bit`")


def _flash_attn(draft: Draft, value: Any) -> None:
    if value in FLASH:
        draft.put("attn_implementation", FLASH[value], f"was `flash_attn: {value}`")
    else:
        draft.drop("flash_attn", "auto is the default")


def _packing(draft: Draft, value: Any) -> None:
    draft.put("packing", bool(value or draft.old.get("neat_packing")))  # which packs by itself
    if value and not draft.old.get("neat_packing"):
        draft.lose("packing", "rows packed together attended to each other; here each attends to itself alone")


def _neat_packing(draft: Draft, value: Any) -> None:
    draft.put("packing", bool(value or draft.old.get("packing")), "was `neat_packing`")


def _precision(dtype: str) -> Handler:
    """Return what takes mixed precision, with the type in which LLaMA-Factory loads the base of an adapter."""

    def handle(draft: Draft, value: Any) -> None:
        draft.put("bf16" if dtype == "bfloat16" else "fp16", value)
        if value and draft.old.get("finetuning_type", "lora") == "lora":
            draft.put("dtype", dtype, "LLaMA-Factory loads the base of an adapter in it")

    return handle


def _pure_bf16(draft: Draft, value: Any) -> None:
    if value:
        draft.put("bf16", True, "was `pure_bf16`")
        draft.put("dtype", "bfloat16", "was `pure_bf16`")
    else:
        draft.drop("pure_bf16", "it is false")


def _double_quantization(draft: Draft, value: Any) -> None:
    if draft.old.get("quantization_bit") == 4:
        draft.put("use_bnb_nested_quant", value, "was `double_quantization`")
    else:
        draft.drop("double_quantization", "nothing is quantised in 4 bits")


def _llama_factory_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"finetuning_type": "lora", "learning_rate": 5e-5, "cutoff_len": 2048}
    if given.get("finetuning_type", "lora") == "lora":
        found |= {"lora_rank": 8, "lora_dropout": 0.0, "lora_target": "all"}
    found |= {"double_quantization": True} if given.get("quantization_bit") == 4 else {}
    found |= {} if given.keys() & {"bf16", "fp16", "pure_bf16"} else {"bf16": False}
    return {key: value for key, value in found.items() if key not in given}


def _nothing(draft: Draft, value: Any) -> None:
    """The key is read with another."""


LLAMA_FACTORY = Dialect(
    "LLaMA-Factory",
    renamed={
        **TRL.renamed, "lora_rank": "lora_r", "cutoff_len": "max_length", "quantization_type": "bnb_4bit_quant_type",
    },
    values=TRL.values,
    flags={
        **TRL.flags, "enable_liger_kernel": ("use_liger_kernel", True), "use_dft_loss": ("objective", "dft"),
        "use_eaft_loss": ("objective", "eaft"),
    },
    idle={
        **TRL.idle,
        **dict.fromkeys(("overwrite_cache", "plot_loss", "dataloader_num_workers_eval"), "it is LLaMA-Factory's own"),
        "predict_with_generate": "it is LLaMA-Factory's own",
    },
    handlers={
        **TRL.handlers,
        "stage": _stage, "finetuning_type": _finetuning_type, "lora_target": _lora_target, "dataset": _dataset,
        "max_samples": _nothing, "train_on_prompt": _train_on_prompt,
        "val_size": lambda draft, value: evaluates(draft, value, "val_size"),
        "quantization_bit": _quantization, "flash_attn": _flash_attn,
        "template": losing("template", "the model's own template is used; write `chat_template_path` for another"),
        "eval_dataset": losing("eval_dataset", "write `test_split_size`, or a test split"),
        "dataset_dir": losing("dataset_dir", "write paths in `datasets`"),
        "neat_packing": _neat_packing, "packing": _packing,
        "bf16": _precision("bfloat16"), "fp16": _precision("float16"), "pure_bf16": _pure_bf16,
        "double_quantization": _double_quantization,
        "additional_target": lambda draft, value: draft.put("lora_modules_to_save", _names(value), "was `additional_target`"),
        "mask_history": losing("mask_history", "the answers of all turns are trained on, not the last one's alone"),
    },
    defaults=_llama_factory_defaults,
)  # fmt: skip
