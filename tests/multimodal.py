"""Tiny vision-language models by their class's name, and processors made here that show them images."""

import copy
import sys
from unittest import mock

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling

from conftest import sizes

VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
# Patches of 1 x 1, which Gemma 4 pools by 2 x 2
GEMMA4_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 8, "patch_size": 1, "pooling_kernel_size": 2, "position_embedding_size": 16,
}  # fmt: skip
LLAMA4_VISION = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "pixel_shuffle_ratio": 0.5,
}  # fmt: skip
LAYERS = {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
LINEAR_ATTENTION = {
    **LAYERS,
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
BALANCE = {"router_aux_loss_coef": 0.0}  # else of micro-batches, as TRL has it
PER_LAYER = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}


def rotary(*sections, share=1.0):
    """Rotary positions of time, height and width, as of vision-language models."""
    return {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [*sections], "partial_rotary_factor": share
        }
    }  # fmt: skip


# What the text models of these classes need
TEXT = {
    "Qwen2_5_VL": rotary(2, 1, 1),
    "Qwen3VL": {"head_dim": 8, **rotary(2, 1, 1)},
    "Qwen3_5": {**LINEAR_ATTENTION, **rotary(1, 0, 0, share=0.25)},
    "Qwen3_5Moe": {**LINEAR_ATTENTION, **rotary(1, 0, 0, share=0.25), **EXPERTS, **BALANCE},
    "Glm4v": rotary(2, 1, 1),
    "Gemma3n": {**PER_LAYER, **SLIDING},
    "Gemma4": {**PER_LAYER, **SLIDING, "global_head_dim": 8},
    "Llama4": {
        "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0], "attention_chunk_size": 64, "layer_types": ["chunked_attention", "full_attention"],
    },
}  # fmt: skip
SHOWN = ("Qwen3VL", "Qwen3_5", "Gemma3n", "Gemma4", "Llama4")  # which the tests show images
# All but Llama 4's say that their own loss takes no count of target tokens
UNCOUNTED = tuple(name for name in TEXT if name != "Llama4")
# Of which examples in one row see each other, or whose kernels for such rows are not installed
MIXING = ("Qwen2_5_VL", "Qwen3_5", "Qwen3_5Moe", "Glm4v")
KINDS = ("image", "video", "vision_start", "vision_end", "image_start", "image_end", "video_start", "video_end")


class Convolution(torch.nn.Module):
    """In place of Gemma 3n's towers, of which the one for images needs timm."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 16, 8, 8)

    def forward(self, pixel_values, **kwargs):
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))


def make_multimodal(name, processor):
    """Make a model of a class's name. `processor`: a tokenizer, for text alone, or what `processor_of` returns."""
    torch.manual_seed(0)
    config_class, model_class = (getattr(transformers, name + end) for end in ("Config", "ForConditionalGeneration"))
    tokenizer = getattr(processor, "tokenizer", processor)
    image = getattr(processor, "image_token_id", tokenizer.unk_token_id)
    ids = {**dict.fromkeys((f"{kind}_token_id" for kind in KINDS), tokenizer.unk_token_id), "image_token_id": image}
    parts = {"vision_config": {"Gemma4": GEMMA4_VISION, "Llama4": LLAMA4_VISION}.get(name, VISION), "audio_config": None}
    if name == "Gemma3n":
        beyond = {"vocab_size": 8, "vocab_offset": len(tokenizer), "hidden_size": 16}
        parts = {"vision_config": beyond, "audio_config": beyond, "vision_soft_tokens_per_image": 4}
    if name == "Llama4":
        parts, ids = {"vision_config": LLAMA4_VISION}, {"image_token_index": image}
    config = config_class(text_config=sizes(tokenizer, **TEXT[name]), **parts, **ids)
    if name != "Gemma3n":
        return model_class._from_config(config, experts_implementation="eager")
    auto = sys.modules[model_class.__module__].AutoModel
    own = auto.from_config

    def from_config(config, **kwargs):
        return own(config, **kwargs) if config.model_type == "gemma3n_text" else Convolution()

    with mock.patch.object(auto, "from_config", from_config):
        return model_class._from_config(config)


IMAGE_TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<end>{% endfor %}"
)


def _with_tokens(tokenizer, *names):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", *names]})
    return tokenizer


def _unchecked(kind):
    """Return a processor class that does without its processors of video and sound, which need torchvision."""
    return type(
        kind.__name__,
        (kind,),
        {
            "check_argument_for_proper_class": lambda self, name, argument: None,
            "save_pretrained": lambda self, folder, **kwargs: self.tokenizer.save_pretrained(folder),
        },
    )


def _qwen_processor(tokenizer):
    size = {"shortest_edge": 64, "longest_edge": 1024}
    images = transformers.Qwen2VLImageProcessorPil(size=size, patch_size=4, temporal_patch_size=1, merge_size=1)
    tokenizer = _with_tokens(tokenizer, "<|image_pad|>", "<|video_pad|>")
    template = IMAGE_TEMPLATE.replace("<image>", "<|image_pad|>")
    return _unchecked(transformers.Qwen3VLProcessor)(images, tokenizer, None, template)


def _gemma4_processor(tokenizer):
    tokenizer = _with_tokens(tokenizer, "<image>", "<begin>", "<finish>")
    tokenizer.image_token, tokenizer.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
    for kind in "ia":
        setattr(tokenizer, f"bo{kind}_token", "<begin>")
        setattr(tokenizer, f"eo{kind}_token", "<finish>")
    tokenizer.audio_token, tokenizer.audio_token_id = "<unk>", tokenizer.unk_token_id
    images = transformers.Gemma4ImageProcessorPil(patch_size=1, pooling_kernel_size=2, max_soft_tokens=70)
    return _unchecked(transformers.Gemma4Processor)(None, images, tokenizer, None, IMAGE_TEMPLATE)


def make_processor(tokenizer):
    """Make LLaVA's processor, which gives an image of 16 x 16 four tokens."""
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessorPil(size=size, crop_size=size)  # not in the oldest transformers
    tokenizer = _with_tokens(tokenizer, "<image>")
    return transformers.LlavaProcessor(images, tokenizer, 8, "default", IMAGE_TEMPLATE, num_additional_image_tokens=1)


def _wide_processor(tokenizer):
    """Make the same with pixels in float64, which some models don't cast."""
    made = make_processor(tokenizer)

    def call(self, *args, **kwargs):
        found = transformers.LlavaProcessor.__call__(self, *args, **kwargs)
        if "pixel_values" in found:
            found["pixel_values"] = found["pixel_values"].double()
        return found

    made.__class__ = type("LlavaProcessor", (transformers.LlavaProcessor,), {"__call__": call})
    return made


def processor_of(name, tokenizer):
    """Make a processor that shows images to a model of a class's name, in float64."""
    makers = {"Qwen3VL": _qwen_processor, "Qwen3_5": _qwen_processor, "Gemma4": _gemma4_processor}
    return makers.get(name, _wide_processor)(tokenizer)
