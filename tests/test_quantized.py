"""QLoRA: gradients after an evaluation, and what uses the run afterwards."""

import copy

import pytest
import torch
from peft import LoraConfig

from bl_trainer.errors import RecipeError
from ways import LORA, Gradients, Ordered, build, make_quantized, relative_difference

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def packs(monkeypatch):
    """Let bitsandbytes lay out weights for inference, on any processor."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True, raising=False)


def gradient(tokenizer, data, folder, evaluates, **options):
    seen, config = Gradients(), copy.deepcopy(LORA)
    config.lora_dropout, config.init_lora_weights = 0.0, False
    trainer = build(
        Ordered, tokenizer, data, folder, model=make_quantized(tokenizer), peft_config=config, callbacks=[seen], **options
    )
    torch.manual_seed(1)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    if evaluates:
        trainer.evaluate(data)
    trainer.train()
    return seen.first


@pytest.mark.parametrize("options", [{}, {"threshold": {"above_percentile": 0.001}}], ids=str)
def test_an_evaluation_leaves_the_gradient_as_it_is(options, tokenizer, text_data, tmp_path):
    """A percentile is measured by an evaluation, too; this one keeps all tokens."""
    whole = gradient(tokenizer, text_data, tmp_path, False)
    found = gradient(tokenizer, text_data, tmp_path, not options, **options)
    assert relative_difference(found, whole) < 1e-6


def test_weights_laid_out_for_inference_are_refused(tokenizer, text_data, tmp_path):
    model = make_quantized(tokenizer)
    model.model.layers[0].self_attn.q_proj.weight.quant_state.packing_format_for_cpu = True  # as after model.generate()
    with pytest.raises(RecipeError, match="has laid out its 4-bit weights for inference"):
        build(Ordered, tokenizer, text_data, tmp_path, model=model, peft_config=LoraConfig(target_modules=["q_proj"]))
