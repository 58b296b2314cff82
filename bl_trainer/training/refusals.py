"""What would train something else than the recipe says: each is refused by name, before the model loads where that can be."""

import os
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from accelerate.utils import is_peft_model
from peft import PeftConfig, PrefixTuningConfig
from transformers import AutoConfig, TrainingArguments
from transformers.utils import is_liger_kernel_available

from .._util.peft import ModulesToSaveWrapper, check_target_module_exists
from .._util.process import is_parallel
from .._util.text import listed
from .._util.transformers import balancing_loss_of
from ..errors import RecipeError


def refuse_bypass(args: Any) -> None:
    """Raise RecipeError with everything in `args` and the environment that would train something else than the recipe says."""
    if faults := [*_bypasses(args)]:
        raise RecipeError(listed(faults, "the configuration"))
    refuse_launcher(args)


def _bypasses(args: Any) -> Iterator[str]:
    loss_head = getattr(args, "loss_head", "auto")
    if loss_head not in ("auto", "trl"):
        yield f"`loss_head: {loss_head}` is unknown. Write `auto` or `trl`."
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type != "nll":
        same = " (`objective: neg_p` has the gradient of dft)" if loss_type == "dft" else ""
        yield f"`loss_type: {loss_type}` would change the objective. Remove it and choose by `objective`{same}."
    if args.label_smoothing_factor:
        yield (
            f"`label_smoothing_factor: {args.label_smoothing_factor}` would replace the objective by label-smoothed NLL. "
            "Remove it."
        )
    if getattr(args, "eval_packing", None) and not (args.packing or args.packing_strategy == "wrapped"):
        yield (
            "`eval_packing: true` without `packing` would evaluate examples that see those before them in their row. Remove "
            "it, or write `packing: true`."
        )
    yield from _without_effect(args)
    if args.use_liger_kernel and not is_liger_kernel_available():
        yield "Cannot use `use_liger_kernel: true`: Liger is not installed. Run `pip install liger-kernel`."
    liger = args.liger_kernel_config or {}
    for key in ("fused_linear_cross_entropy", "cross_entropy"):
        if liger.get(key):
            yield (
                f"`liger_kernel_config: {{{key}: true}}` is a cross-entropy of its own, which the objective can't use. "
                "Remove it; Liger's other kernels can stay."
            )


def _without_effect(args: Any) -> Iterator[str]:
    """Yield settings that TRL takes and doesn't read."""
    for key in sorted({*(getattr(args, "dataset_kwargs", None) or {})} - {"skip_prepare_dataset"}):
        yield f"`dataset_kwargs: {{{key}: ...}}` has no effect: TRL reads `skip_prepare_dataset` alone. Remove it."
    if "torch_dtype" in (getattr(args, "model_init_kwargs", None) or {}):
        yield "`torch_dtype` in `model_init_kwargs` has no effect beside TRL's own `dtype`. Write `dtype`."
    if getattr(args, "packing", False) and getattr(args, "truncation_mode", "keep_start") == "keep_end":
        yield "`truncation_mode: keep_end` has no effect with `packing`. Remove one of the two."


def refuse_launcher(args: TrainingArguments) -> None:
    """Raise RecipeError if `args`, or the launcher, would share the model or its sequences out as the objective can't be."""
    if _fsdp_version(args) == 1:
        raise RecipeError(
            "FSDP1 is not supported: it flattens weights, the LM head's too. Write `fsdp_version: 2` in the launcher's "
            "configuration, as configs/accelerate/fsdp2.yaml does, or `fsdp_config: {version: 2}` in the recipe."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if precision != "no" and not (args.bf16 or args.fp16):
        raise RecipeError(
            f"The launcher asks for mixed precision in {precision}, and the recipe for none. Launch with `--mixed_precision "
            f"no`, or write `{precision}: true`."
        )
    cp_size, size, backend = _sequence_parallelism(args)
    if size > 1 and backend == "deepspeed":
        raise RecipeError(
            f"DeepSpeed sequence parallelism (sp_size = {size}) trains the model's own negative log-likelihood instead of "
            "the objective. Set `sp_size` to 1; for long sequences use context parallelism (`cp_size`)."
        )
    padding = getattr(args, "pad_to_multiple_of", None) or 1
    if cp_size > 1 and padding % (2 * cp_size):
        raise RecipeError(
            f"Context parallelism (cp_size = {cp_size}) cuts sequences into {2 * cp_size} pieces of one length. Write "
            f"`pad_to_multiple_of: {2 * cp_size}` in the recipe."
        )


def is_context_parallel(args: Any) -> bool:
    """Whether `args`, or the launcher, would cut sequences up over devices."""
    return _sequence_parallelism(args)[0] > 1


def _sequence_parallelism(args: Any) -> tuple[int, int, str]:
    """Return the sizes of context and sequence parallelism, and the latter's backend."""
    parallelism = getattr(args, "parallelism_config", None)
    if parallelism is not None:
        return parallelism.cp_size, parallelism.sp_size, parallelism.sp_backend
    if not is_parallel():
        return 1, 1, "deepspeed"
    cp_size, size = (int(os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")) for kind in ("CP", "SP"))
    return cp_size, size, os.environ.get("PARALLELISM_CONFIG_SP_BACKEND", "deepspeed")


def _fsdp_version(args: TrainingArguments) -> int | None:
    """Return the FSDP version that `args` asks for, or else the launcher; None without FSDP."""
    own = getattr(args, "fsdp_plugin_args", None)
    if own is not None:
        return int(own.get("fsdp_version", 1))
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return int(os.environ.get("FSDP_VERSION", "1")) if launched else None


def refuse_lm_head_adapter(peft_config: PeftConfig | None) -> None:
    """Raise RecipeError if `peft_config` puts an adapter on `lm_head`, which the fused head would pass by."""
    targets = getattr(peft_config, "target_modules", None) or []
    parameters = getattr(peft_config, "target_parameters", None) or []
    spelt = [] if isinstance(targets, str) else [name for name in targets if name.split(".")[-1] == "lm_head"]
    adapted = targets and any(check_target_module_exists(peft_config, key) for key in ("lm_head", *spelt))
    if adapted or any("lm_head" in name for name in parameters):
        raise RecipeError(
            "A PEFT adapter on `lm_head` would not train: the objective is computed from the head's weight directly. Remove "
            "'lm_head' from `lora_target_modules`; to train the whole head write `lora_modules_to_save: [lm_head]`."
        )


def refuse_random_start(peft_config: PeftConfig | None) -> None:
    """Raise RecipeError if `peft_config` takes random directions out of the base model, without which the adapter is lost."""
    start = str(getattr(peft_config, "init_lora_weights", ""))
    if start.startswith("pissa_niter"):
        raise RecipeError(
            f"Cannot train with `init_lora_weights: {start}`: it takes random directions out of the base model, and loading "
            "the adapter takes others. Write `pissa`, which is exact."
        )


def refuse_virtual_tokens(peft_config: PeftConfig | None, args: TrainingArguments | None) -> None:
    """Raise RecipeError if `peft_config` puts virtual tokens where `args` would share them, or lose them."""
    if not getattr(peft_config, "is_prompt_learning", False):
        return
    packs = getattr(args, "packing", False) and getattr(args, "packing_strategy", "bfd") != "wrapped"
    if packs or getattr(args, "padding_free", False):
        raise RecipeError(
            "Prompt-learning PEFT knows one example per row: with `packing` or `padding_free` an example would see those "
            "before it, and the virtual tokens only of the first. Remove both, or take LoRA."
        )
    if isinstance(peft_config, PrefixTuningConfig) and getattr(args, "gradient_checkpointing", True):
        raise RecipeError(
            "Prefix tuning doesn't go with gradient checkpointing, under which transformers drops the prefix. Write "
            "`gradient_checkpointing: false`."
        )


def refuse_no_causal_lm(model: Any, args: TrainingArguments | None) -> Any:
    """Raise RecipeError if `model`, or what its path's configuration says, doesn't predict next tokens.

    Returns the model, of a path one without weights, or None where its class is not one of transformers.
    """
    if isinstance(model, str):
        kwargs = getattr(args, "model_init_kwargs", None) or {}
        trusted = kwargs.get("trust_remote_code", getattr(args, "trust_remote_code", False))
        config = AutoConfig.from_pretrained(model, revision=kwargs.get("revision"), trust_remote_code=trusted)
        name = (config.architectures or [model])[0]
        is_remote = trusted and getattr(config, "auto_map", None)  # code that only the loaded model shows
        base = None if is_remote else _skeleton(getattr(transformers, name, None), config)
    else:
        base = model.get_base_model() if is_peft_model(model) else model
        config, name = base.config, type(base).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise RecipeError(f"Cannot train {name}: it is an encoder-decoder. Choose a causal language model.")
    if base is not None and base.get_output_embeddings() is None:
        raise RecipeError(f"Cannot train {name}: it has no LM head. Choose a causal language model.")
    return base


def _skeleton(kind: Any, config: Any) -> Any:
    """Return a model of a class of transformers without weights; None without a class."""
    with torch.device("meta"):
        return None if kind is None else kind(config)


def refuse_copied_tied_head(base: Any, chat_template_path: str | None) -> None:
    """Raise RecipeError if PEFT trains tokens in a copy of a tied LM head, which it can neither run nor load again."""
    head = base.get_output_embeddings()
    if isinstance(getattr(head, "original_module", None), ModulesToSaveWrapper):
        cause, advice = "`trainable_token_indices` and `modules_to_save` both", "Remove one of them"
        if chat_template_path:
            cause = f"`chat_template_path: {chat_template_path}` adds tokens, for which TRL and PEFT both"
            advice = "Write a template file (.jinja) whose tokens the model has, or train without `use_peft`"
        raise RecipeError(
            f"Cannot train an adapter of {type(base).__name__}: {cause} wrap its tied LM head, which PEFT can't run or load. "
            f"{advice}."
        )


def has_balancing_loss(base: Any, args: Any) -> bool:
    """Return whether a model's own forward has a load-balancing loss. Raises RecipeError if `args` ask for it in vain."""
    config = base.config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    if experts > 1 and balancing_loss_of(base) is not None:
        return True
    if getattr(args, "router_aux_loss_coef", None):
        raise RecipeError(
            f"Cannot add an auxiliary loss: {type(base).__name__} has none of its own. Remove `router_aux_loss_coef: "
            f"{args.router_aux_loss_coef}`."
        )
    return False


def refuse_unweighted(base: Any, args: Any) -> None:
    """Raise RecipeError if a model is to add its load-balancing loss, and nothing that TRL reads has its coefficient."""
    config = base.config.get_text_config()
    is_told = hasattr(config, "router_aux_loss_coef") or getattr(args, "router_aux_loss_coef", None) is not None
    if getattr(config, "output_router_logits", False) and not is_told and has_balancing_loss(base, args):
        raise RecipeError(
            f"Cannot add the auxiliary loss that `output_router_logits: true` asks for: the configuration of "
            f"{type(base).__name__} has no `router_aux_loss_coef`. Write it in the recipe, 0 to train without."
        )


def refuse_lost_adapter(model: Any, has_adapter: bool) -> None:
    """Raise RecipeError if `model_init` returned a model without the adapter that the trainer's first model has."""
    if has_adapter and not is_peft_model(model):
        raise RecipeError(
            "Cannot train the model that `model_init` returns: the trainer's model has an adapter, this one has none. "
            "Return `get_peft_model(model, peft_config)`."
        )


def refuse_searched(args: Any, before: Any) -> None:
    """Raise RecipeError if a hyperparameter search has changed in `args` what the trainer was built for; `before`: a copy."""
    if any(getattr(args, key, None) != getattr(before, key, None) for key in ("objective", "threshold")):
        raise RecipeError(
            "Cannot search over `objective` or `threshold` with `hyperparameter_search`: they are set when the trainer is "
            "built. Remove them from `hp_space`, and compare objectives by `bl-trainer sweep`."
        )
    refuse_bypass(args)
