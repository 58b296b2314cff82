"""QLoRA: gradients after an evaluation, and what uses the run afterwards."""

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bl_trainer.cli import main
from bl_trainer.diagnosis.options import DiagnoseArguments
from bl_trainer.diagnosis.pair import warn_of_quantization
from bl_trainer.diagnosis.run import Diagnosis
from bl_trainer.errors import RecipeError
from bl_trainer.evaluation.harness import load_model
from bl_trainer.evaluation.options import EvaluateArguments
from bl_trainer.evaluation.results import Results
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.sweep.arm import base_evaluation
from bl_trainer.sweep.plan import Plan
from bl_trainer.training.checkpoints import RECORD_FILE, quantization_of
from bl_trainer.training.merge import MergeArguments, merge
from conftest import make_llama, write_recipe
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


QLORA = {"use_peft": True, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "dtype": "float32"}


def planned(tmp_path, data_folder, sweep, **changes):
    """Return the plan of a sweep of QLoRA runs over the base of `run`."""
    recipe = write_recipe(tmp_path, tmp_path / "base", data_folder, **{**QLORA, **changes})
    (tmp_path / "sweep.yaml").write_text(json.dumps({"learning_rate": [1e-3], "seed": [0], **sweep}))
    return Plan.read(Recipe.read(["--config", str(recipe)]), str(tmp_path / "sweep.yaml"), tmp_path / "s")


def test_a_sweep_evaluates_its_base_as_its_runs_have_it(run, data_folder, tmp_path):
    sweep = {"arms": [{"objective": "nll"}, {"objective": "neg_p"}], "evaluate": {"tasks": ["completion"], "batch_size": "1"}}
    command = base_evaluation(planned(tmp_path, data_folder, sweep), tmp_path / "tasks")
    options = EvaluateArguments.read(command[4:])
    options.check()
    (checkpoint,) = options.checkpoints()
    found = logits(load_model(checkpoint, options).model)
    with run[1].disable_adapter():
        wanted = logits(run[1])
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert (found - wanted).abs().max() < 1e-4 < (plain - wanted).abs().max()
    assert Results(options, [checkpoint]).notes() == [f"{tmp_path / 'base'} is evaluated in 4 bits, as `--quantization` asks."]


def test_a_sweep_over_ways_to_quantise_has_no_one_base(run, data_folder, tmp_path):
    types = [{"bnb_4bit_quant_type": kind} for kind in ("nf4", "fp4")]
    assert len(planned(tmp_path, data_folder, {"arms": types}).bases()) == 2
    plan = planned(tmp_path, data_folder, {"arms": [{"objective": "nll", **QLORA}, {"objective": "neg_p", "lora_r": 4}]})
    assert len(plan.bases()) == 1
    plain = planned(tmp_path, data_folder, {"arms": [{"objective": "nll"}]}, use_peft=False, load_in_4bit=False)
    assert "--quantization" not in base_evaluation(plain, tmp_path / "tasks")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "`load_in_4bit` and `load_in_8bit` are both true. Write one of them."),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "`bnb_4bit_quant_type` is 'nf5'. Write one of nf4, fp4."),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf16"}, "`bnb_4bit_compute_dtype` is no type of torch's"),
        ({"load_in_4bit": True, "load_in_8bit": 0}, "`load_in_8bit` is 0. Write one of true, false."),
        ({"load_in_8bit": True, "llm_int8_threshold": "6"}, "`llm_int8_threshold` is not a number"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"}, "`llm_int8_skip_modules` is not a list of names"),
    ],
    ids=str,
)
def test_settings_that_bitsandbytes_can_not_do(given, message, checkpoint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(
            ["evaluate", "--model", str(checkpoint), "--tasks", "gsm8k", "--output", "out", "--quantization", json.dumps(given)]
        )
    assert caught.value.code == 2
    assert f"Cannot quantise as `--quantization {json.dumps(given)}`: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["4", '{"bits": 4}', '{"bnb_4bit_quant_type": "nf4"}', '{"load_in_4bit": true'])
def test_settings_that_bitsandbytes_has_not(given, run, tmp_path):
    options = evaluating(tmp_path / "base", tmp_path, quantization=given)
    with pytest.raises(RecipeError, match=r"`(--)?quantization"):
        options.checkpoints()


def test_settings_that_quantise_nothing_are_refused(run, tmp_path):
    four = '{"load_in_4bit": true}'
    with pytest.raises(RecipeError, match="`--quantization` does nothing"):
        evaluating(run[0], tmp_path, quantization=four).checkpoints()
    with pytest.raises(RecipeError, match="`--quantization` is not supported with vLLM"):
        evaluating(tmp_path / "base", tmp_path, quantization=four, backend="vllm").checkpoints()


def test_a_merged_model_is_compared_as_it_was_saved(run, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("bl_trainer.training.merge.write_card", lambda *args: None)  # this run has recorded too little
    options = MergeArguments(output=str(tmp_path / "merged"))
    options.run = str(run[0])
    merge(options)
    recipe = write_recipe(tmp_path, tmp_path / "base", data_folder, **QLORA)
    found = []
    for tuned in (run[0], tmp_path / "merged"):
        argv = ["--config", str(recipe), "--report", str(tmp_path / "report"), "--compare", str(tuned)]
        found.append(Diagnosis(Recipe.read(argv, "diagnose", DiagnoseArguments)).run().to_json()["compare"]["train"])
    for name in ("base_nll", "nll", "kl", "prob"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4), name


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
