"""The ways of training that TRL has, each with a tiny model and data made here; and what trains them."""

import copy
import tempfile
from functools import partial

import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch.utils.data import SequentialSampler
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from bl_trainer import BLConfig, BLTrainer
from conftest import make_gemma2, make_llama, make_mixtral, sizes
from multimodal import make_multimodal, make_processor, processor_of


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimizer step."""

    def __init__(self):
        self.all = []

    @property
    def first(self):
        return self.all[0]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.all.append(gradient_of(model))


class Ordered(BLTrainer):
    """Takes the training set in its order."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def gradient_of(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def relative_difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def build(
    trainer_class, processor, data, tmp_path, model=None, peft_config=None, eval_data=None, callbacks=None,
    compute_metrics=None, made=None, **options,
):  # fmt: skip
    """Return a trainer; `made`: further arguments of its own, `options`: of its configuration."""
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": None,
    }
    config_class = SFTConfig if trainer_class is SFTTrainer else BLConfig
    return trainer_class(
        model=make_llama(processor) if model is None else model,
        args=config_class(**{**defaults, **options}),
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=callbacks,
        compute_metrics=compute_metrics,
        **(made or {}),
    )


def train(*args, **kwargs):
    trainer = build(*args, **kwargs)
    trainer.train()
    return trainer


def make_granite(tokenizer):
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**sizes(tokenizer, logits_scaling=3.0)))


def make_cohere(tokenizer):
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**sizes(tokenizer, logit_scale=0.25)))


def make_phi(tokenizer):
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**sizes(tokenizer)))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def make_recurrent_gemma(tokenizer):
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(**sizes(tokenizer, logits_soft_cap=2.0, num_hidden_layers=3, attention_window_size=32))
    return RecurrentGemmaForCausalLM(config)


# Mixtures of experts with an auxiliary loss, by their class's name: what their models need
MIXTURES = {
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}


def make_mixture(name, tokenizer):
    import transformers  # the oldest has not all of them

    torch.manual_seed(0)
    config_class, model_class = (getattr(transformers, name + end) for end in ("Config", "ForCausalLM"))
    config = config_class(**sizes(tokenizer, **MIXTURES[name], output_router_logits=True, router_aux_loss_coef=0.1))
    return model_class._from_config(config, experts_implementation="eager", attn_implementation="eager")


def make_tied(tokenizer):
    return make_llama(tokenizer, tie_word_embeddings=True)


def make_quantized(tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        make_llama(tokenizer, hidden_size=64, intermediate_size=64).save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )


def make_llava(processor):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(**sizes(processor.tokenizer))
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=processor.image_token_id)
    )


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
TRAINED_HEAD = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])}
WAYS = {
    "full": {},
    "tied_head": {"make": make_tied},
    "head_with_bias": {"make": make_phi},
    "softcap": {"make": make_gemma2},
    "logits_scaling": {"make": make_granite},
    "logit_scale": {"make": make_cohere},
    "mixture_of_experts": {"make": make_mixtral},
    "vision_language": {"make": make_llava, "processor": make_processor, "data": "image_data"},
    "lora": {"peft_config": LORA},
    "lora_trained_head": TRAINED_HEAD,
    "dora": {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)},
    "qlora": {"make": make_quantized, "peft_config": LORA},
    "qlora_trained_head": {"make": make_quantized, "bf16": True, **TRAINED_HEAD},
    "prompt_tuning": {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
    "prefix_tuning": {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
    "p_tuning": {"peft_config": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)},
    "packing_bfd": {"packing": True, "max_length": 64},
    "packing_bfd_split": {"packing": True, "max_length": 24, "packing_strategy": "bfd_split"},
    "packing_wrapped": {"packing": True, "max_length": 64, "packing_strategy": "wrapped"},
    "padding_free": {"padding_free": True},
    "completion_only": {"data": "pair_data"},
    "assistant_only": {"data": "chat_data", "assistant_only_loss": True},
    "streaming": {"data": "streamed_data"},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointing_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "checkpointing_selective": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
    "activation_offloading": {"activation_offloading": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "bf16": {"bf16": True},
    "neftune": {"neftune_noise_alpha": 5.0},
}
# Rows of text, and with images
MULTIMODAL = {"qwen3_vl": "Qwen3VL", "qwen3_5": "Qwen3_5", "gemma3n": "Gemma3n", "gemma4": "Gemma4", "llama4": "Llama4"}
# Where TRL's head leaves something out, or fails, or `SFTTrainer` divides by micro-batch
BEYOND_TRL = {
    **{row: {"make": partial(make_multimodal, name)} for row, name in MULTIMODAL.items()},
    **{
        f"{row}_images": {
            "make": partial(make_multimodal, name), "processor": partial(processor_of, name), "data": "image_data"
        }
        for row, name in MULTIMODAL.items()
    },
    "qwen3_moe": {"make": partial(make_mixture, "Qwen3Moe")},
    "gpt_oss": {"make": partial(make_mixture, "GptOss")},
    "softcap_recurrent_gemma": {"make": make_recurrent_gemma},
    "trainable_tokens": {
        "make": make_tied, "peft_config": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7, 8])
    },
}  # fmt: skip


def resolve(way, tokenizer, request):
    """Return what `build` takes to train in this way: (processor, data, options with a function that makes the model)."""
    options = {
        "make": make_llama,
        "data": "text_data",
        "processor": lambda tokenizer: tokenizer,
        **copy.deepcopy({**WAYS, **BEYOND_TRL}[way]),
    }
    if way == "activation_offloading":
        request.getfixturevalue("offloads_from_cpu")
    return options.pop("processor")(tokenizer), request.getfixturevalue(options.pop("data")), options
