"""Recipe keys as data."""

import math

from .fields import fields_of

# Keys of older recipes: the fields of TRL 0.8 to 1.15's and transformers 4.30 to 5.3's dataclasses that are gone, and those of
# the alignment handbook and open-r1. Read only for keys that the installed versions lack.

# Keys with a new name and the same meaning, which a recipe may still give
RENAMED = {
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "use_liger": "use_liger_kernel",
    "text_column": "dataset_text_field",
    "preprocessing_num_workers": "dataset_num_proc",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "xpu_backend": "ddp_backend",
}

# Keys that are gone, and what to write instead; None where the key no longer has an effect
REPLACED = {
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
    "chat_template": "chat_template_path: template.jinja",
    "tokenizer_name_or_path": "chat_template_path: {value}, if it was for the chat template",
    "use_flash_attention_2": "attn_implementation: flash_attention_2",
    "overwrite_output_dir": None,
    "group_by_length": "train_sampling_strategy: group_by_length",
    "adafactor": "optim: adafactor",
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
    "push_to_hub_organization": "hub_model_id: {value}/MODEL",
    "fp16_backend": None,
    "half_precision_backend": None,
    "fp16_opt_level": None,
    "sharded_ddp": "fsdp: full_shard",
    "fsdp_min_num_params": "fsdp_config: {{min_num_params: {value}}}",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_config: {{transformer_layer_cls_to_wrap: [{value}]}}",
    "dispatch_batches": "accelerator_config: {{dispatch_batches: {value}}}",
    "split_batches": "accelerator_config: {{split_batches: {value}}}",
    "torchdynamo": "torch_compile_backend: {value}",
}

# Keys with two names in some versions of transformers
CHECKPOINTING = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "a mapping"}

# Keys that do nothing unless another is set: key -> (the other key, what to write). Naming the other key, even to switch
# it off, is taken for a decision.
NEEDS = {
    **dict.fromkeys(
        (name for name in fields_of("ModelConfig") if name.startswith("lora_") or name in ("use_rslora", "use_dora")),
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
    "eval_delay": ("eval_strategy", "eval_strategy: steps"),
}

# Keys that do nothing under some values of another, whose own default reads them: key -> (the other key, these values)
IDLE_UNDER = {f"{kind}_steps": (f"{kind}_strategy", ("epoch", "best")) for kind in ("eval", "save", "logging")}

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
    "lora_dropout": (0, 1),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, math.nextafter(1, 0))),
    "max_length": (2, math.inf),
    "max_steps": (-1, math.inf),
}

# What a run writes to `output_dir`, so that none of it may be there already
WRITTEN = ("checkpoint-*", "*.safetensors", "*.bin", "*.json", "*.jinja", "README.md")

ROWS_RENDERED = 32  # that are rendered before the model loads

# Trackers of `report_to` -> their packages: the module, and its name for pip
TRACKERS = {
    "azure_ml": ("azureml", "azureml-sdk"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "kubeflow": ("kubeflow", "kubeflow"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}

# Keys that need a package when they are true: the module, its name for pip, and what the key is for
PACKAGES = {
    "load_in_4bit": ("bitsandbytes", "bitsandbytes"),
    "load_in_8bit": ("bitsandbytes", "bitsandbytes"),
    "use_liger_kernel": ("liger_kernel", "liger-kernel"),
}
