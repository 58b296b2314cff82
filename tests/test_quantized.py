"""QLoRA: gradients after an evaluation, and what uses the run afterwards."""

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bl_trainer.diagnosis.pair import warn_of_quantization
from bl_trainer.errors import RecipeError
from bl_trainer.evaluation.harness import load_model
from bl_trainer.evaluation.options import EvaluateArguments
from bl_trainer.evaluation.results import Results
from bl_trainer.training.checkpoints import RECORD_FILE, quantization_of
from conftest import make_llama
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


# The run afterwards


@pytest.fixture
def run(tokenizer, tmp_path):
    """A QLoRA run's folder, and the adapter over its base as it was trained."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    base, folder = tmp_path / "base", tmp_path / "run"
    make_llama(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / RECORD_FILE).write_text(json.dumps({"quantization": config.to_dict()}))
    return folder, tuned


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(5, 40)[None]).logits


def evaluating(folder, tmp_path, **options):
    return EvaluateArguments(model=[str(folder)], tasks=["completion"], output=str(tmp_path / "out"), **options)


def test_evaluates_over_the_base_as_it_was_trained(run, tmp_path):
    folder, tuned = run
    options = evaluating(folder, tmp_path, batch_size="1")
    (checkpoint,) = options.checkpoints()
    found = logits(load_model(checkpoint, options).model)
    plain = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder))
    assert (found - logits(tuned)).abs().max() < 1e-4 < (plain - logits(tuned)).abs().max()
    assert Results(options, [checkpoint]).notes() == [f"{folder} is evaluated over its base in 4 bits, as it was trained."]


def test_results_over_another_base_are_not_taken_for_these(run, tmp_path):
    options = evaluating(run[0], tmp_path)
    before = options.checkpoints()[0].fingerprint()
    (run[0] / RECORD_FILE).unlink()
    assert options.checkpoints()[0].fingerprint() != before


def test_vllm_takes_no_quantised_base(run, tmp_path):
    with pytest.raises(RecipeError, match=r"its base was quantised for training\. Run `bl-trainer merge "):
        evaluating(run[0], tmp_path, backend="vllm").checkpoints()


@pytest.mark.parametrize(
    ("record", "here", "said"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, None, "in 4 bits (nf4), and is compared over one in full"),
        ({"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "in 8 bits, and is compared"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {"load_in_4bit": True}, "in 4 bits (fp4, twice quantised)"),
        (None, {"load_in_8bit": True}, "in full precision, and is compared over one in 8 bits"),
        ({"load_in_8bit": True}, {"load_in_8bit": True}, None),
        (None, None, None),
    ],
)
def test_an_adapter_compared_over_another_base_is_told_of(record, here, said, tmp_path, caplog):
    (tmp_path / RECORD_FILE).write_text(json.dumps({"quantization": record, "objective": {}}))
    with caplog.at_level(logging.WARNING):
        warn_of_quantization(str(tmp_path), SimpleNamespace(quantization_config=here))
    assert (said in caplog.text) if said else not caplog.text


def test_modules_that_are_not_quantised_are_recorded():
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["q_proj"], llm_int8_threshold=0.0)
    read = BitsAndBytesConfig(**quantization_of({"quantization": config.to_dict()}))
    assert read.to_dict() == config.to_dict()
