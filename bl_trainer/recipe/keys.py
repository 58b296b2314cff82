"""Recipe keys as data."""

import math
from dataclasses import fields
from typing import Any

from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
)

from ..training.config import BLConfig

# Keys of older recipes and what to write instead: the fields of TRL 0.8 to 1.15's and transformers 4.30 to 5.3's
# dataclasses that are gone, and those of the alignment handbook. Read only for keys that the installed versions lack.
REPLACED = {
    "max_seq_length": "max_length: {value}",
    "torch_dtype": "dtype: {value}",
    "use_liger": "use_liger_kernel: {value}",
    "dataset_batch_size": None,
    "num_of_sequences": None,
    "chars_per_token": None,
    "gradient_checkpointing_use_reentrant": "gradient_checkpointing_kwargs: {{use_reentrant: {value}}}",
    "response_template": "assistant_only_loss: true, or prompt-completion data with completion_only_loss: true",
    "instruction_template": "assistant_only_loss: true, or prompt-completion data with completion_only_loss: true",
    "dataset_mixer": "datasets: [{{path: ..., split: train, fraction: ...}}]",
    "dataset_mixture": "datasets: [{{path: ..., split: train, fraction: ...}}], and test_split_size",
    "dataset_splits": "dataset_train_split and dataset_test_split",
    "dataset_configs": "dataset_config: ...",
    "text_column": "dataset_text_field: {value}",
    "preprocessing_num_workers": "dataset_num_proc: {value}",
    "chat_template": "chat_template_path: template.jinja",
    "tokenizer_name_or_path": "chat_template_path: {value}, if it was for the chat template",
    "use_flash_attention_2": "attn_implementation: flash_attention_2",
    "evaluation_strategy": "eval_strategy: {value}",
    "warmup_ratio": "warmup_steps: {value}  (a value below 1 is a share of all steps)",
    "overwrite_output_dir": None,
    "group_by_length": "train_sampling_strategy: group_by_length",
    "adafactor": "optim: adafactor",
    "no_cuda": "use_cpu: {value}",
    "use_mps_device": None,
    "use_ipex": None,
    "jit_mode_eval": None,
    "past_index": None,
    "mp_parameters": None,
    "tpu_num_cores": None,
    "tpu_metrics_debug": None,
    "ray_scope": None,
    "save_safetensors": None,
    "use_legacy_prediction_loop": None,
    "logging_dir": "report_to: tensorboard, with the folder in the environment variable TENSORBOARD_LOGGING_DIR",
    "include_inputs_for_metrics": "include_for_metrics: [inputs]",
    "include_tokens_per_second": "include_num_input_tokens_seen: true",
    "per_gpu_train_batch_size": "per_device_train_batch_size: {value}",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size: {value}",
    "push_to_hub_model_id": "hub_model_id: {value}",
    "push_to_hub_organization": "hub_model_id: {value}/MODEL",
    "push_to_hub_token": "hub_token: ...",
    "fp16_backend": None,
    "half_precision_backend": None,
    "fp16_opt_level": None,
    "sharded_ddp": "fsdp: full_shard",
    "fsdp_min_num_params": "fsdp_config: {{min_num_params: {value}}}",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_config: {{transformer_layer_cls_to_wrap: [{value}]}}",
    "dispatch_batches": "accelerator_config: {{dispatch_batches: {value}}}",
    "split_batches": "accelerator_config: {{split_batches: {value}}}",
    "torchdynamo": "torch_compile_backend: {value}",
    "xpu_backend": "ddp_backend: {value}",
}

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "a mapping"}

# Keys that do nothing unless another is set: key -> (the other key, what to write). Naming the other key, even to switch
# it off, is taken for a decision.
NEEDS = {
    **dict.fromkeys(
        (f.name for f in fields(ModelConfig) if f.name.startswith("lora_") or f.name in ("use_rslora", "use_dora")),
        ("use_peft", "use_peft: true"),
    ),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
        ("load_in_4bit", "load_in_4bit: true"),
    ),
    **dict.fromkeys(("streaming", "test_split_size"), ("datasets", "datasets: [{path: ...}]")),
    **dict.fromkeys(
        ("dataset_config", "dataset_streaming"),
        ("dataset_name", "dataset_name: ..., or name and streaming of a `datasets` mixture"),
    ),
    "packing_strategy": ("packing", "packing: true"),
    **dict.fromkeys(("eval_steps", "dataset_test_split", "eval_packing"), ("eval_strategy", "eval_strategy: steps")),
    "liger_kernel_config": ("use_liger_kernel", "use_liger_kernel: true"),
}

# Keys whose values the libraries refuse late, or take without a word: the least and the greatest
RANGES = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "lora_r",
            "save_total_limit",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "neftune_noise_alpha", "warmup_steps"), (0, math.inf)),
    **dict.fromkeys(("dataloader_num_workers", "seed", "data_seed", "adam_epsilon"), (0, math.inf)),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2"), (0, 1)),
    "max_length": (2, math.inf),
    "max_steps": (-1, math.inf),
}

# What a run writes to `output_dir`, so that none of it may be there already
WRITTEN = ("checkpoint-*", "*.safetensors", "*.bin", "*.json", "*.jinja", "README.md")

ROWS_RENDERED = 32  # that are rendered before the model loads

DATACLASSES: Any = (ScriptArguments, BLConfig, ModelConfig, DatasetMixtureConfig)
