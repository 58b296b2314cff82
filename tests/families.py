"""A tiny model of every causal family of the installed transformers."""

from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

WIDTH = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size", "word_embed_proj_dim")
INNER = (
    "intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner", "d_inner", "ffn_hidden_size", "encoder_ffn_dim",
    "decoder_ffn_dim", "ffn_intermediate_size", "d_ff",
)  # fmt: skip
EXPERT = (
    "moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size",
    "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size",
)  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
    "num_key_value_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_heads", "linear_num_key_heads",
    "linear_num_value_heads",
)  # fmt: skip
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
LENGTH = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
SIZES: dict[str, Any] = {
    **dict.fromkeys(WIDTH, 32), **dict.fromkeys(INNER, 48), **dict.fromkeys(EXPERT, 16), **dict.fromkeys(LAYERS, 2),
    **dict.fromkeys(HEADS, 4), **dict.fromkeys(EXPERTS, 4), **dict.fromkeys(LENGTH, 64),
    "vocab_size": 64, "head_dim": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "rotary_dim": 4,
    "kv_channels": 8, "linear_head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "mamba_d_head": 16,
    "mamba_head_dim": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8,
    "initializer_range": 0.3, "image_size": 16, "patch_size": 8,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What a family needs besides to be consistent
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "nemotron_h": {"n_groups": 1},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False, "pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# Families of which no tiny text model can be made by sizes alone, and why
UNBUILT = {
    "blt": "its patcher is a second model",
    "cohere_compass_text": "its default configuration has no rotary embeddings",
    "dbrx": "its default configuration has no rotary embeddings",
    "dots1": "its default configuration has no experts",
    "gemma3n": "needs timm; gemma3n_text is scanned",
    "gemma4": "embeddings for each layer are large; gemma4_text is scanned",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified_assistant": "drafts for another model",
    "mimo_v2_flash": "its rotary dimensions follow from its default sizes",
    "musicgen": "reads audio codes",
    "musicgen_melody": "reads audio codes",
    "reformer": "hashes at random, and has a gradient in training mode only",
    "zamba2": "its shared layers are listed by number",
}


def families():
    return {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}


def tiny_config(kind, **changes):
    """Return a configuration of `kind` with the `SIZES` that it has, and its parts'."""
    default = kind()
    names, values = getattr(kind, "attribute_map", {}), default.to_dict()
    sizes = {key: value for key, value in SIZES.items() if values.get(names.get(key, key)) is not None}
    tokens = {key: value for key, value in TOKENS.items() if key in values}
    parts = {key: tiny_config(type(getattr(default, key))).to_dict() for key in kind.sub_configs if values.get(key)}
    return kind(**{**sizes, **tokens, **parts, **changes})


def tiny_model(family):
    """Return a tiny model with random weights, biases too."""
    classes = MODEL_FOR_CAUSAL_LM_MAPPING[families()[family]]
    kind = classes[0] if isinstance(classes, tuple) else classes
    config = tiny_config(kind.config_class, **OTHERS.get(family, {}))
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    return model if bias is None else (torch.nn.init.normal_(bias), model)[1]
