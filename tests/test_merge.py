"""The merge verb: equal logits for each kind of adapter, what it leaves out, and every mistake."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from bl_trainer.cli import main
from bl_trainer.errors import RecipeError
from bl_trainer.training.checkpoints import RECORD_FILE
from bl_trainer.training.merge import MergeArguments, merge
from conftest import make_llama

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
IDS = torch.arange(4, 40)[None]


def options(run, output, **others):
    made = MergeArguments(output=str(output), **others)
    made.run = str(run)
    return made


def adapter(checkpoint, folder, tokenizer, model=None, **config):
    """Save an adapter that changes the model at `checkpoint`, with the tokenizer; returns its folder."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint) if model is None else model
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(**{**LORA, **config}))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and "lora" not in name:  # whole modules and tokens, which begin as they are
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2, 5]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_has_the_adapters_logits(kind, checkpoint, tokenizer, tmp_path):
    run = adapter(checkpoint, tmp_path / "run", tokenizer, **KINDS[kind])
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(run))
    base = logits(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert (expected - base).abs().max() > 0.1, "the adapter does nothing"
    out = merge(options(run, tmp_path / "out"))
    assert not (out / "adapter_config.json").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"], "something is left over"


@pytest.mark.parametrize("modules", [["embed_tokens", "q_proj"], ["lm_head"]], ids=str)
def test_lora_on_one_of_two_tied_layers_changes_that_one_alone(modules, tokenizer, tmp_path):
    make_llama(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    run = adapter(tmp_path / "base", tmp_path / "run", tokenizer, target_modules=modules)
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(run))
    merged = AutoModelForCausalLM.from_pretrained(merge(options(run, tmp_path / "out")))
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["modules_to_save", "trainable_token_indices"])
def test_grown_vocabulary_and_its_end_token(how, checkpoint, tokenizer, tmp_path):
    grown = AutoTokenizer.from_pretrained(checkpoint)
    grown.add_special_tokens({"eos_token": "<turn>"})
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(len(grown))
    own = {"modules_to_save": ["embed_tokens", "lm_head"], "trainable_token_indices": [len(grown) - 1]}
    run = adapter(checkpoint, tmp_path / "run", grown, model, **{how: own[how]})
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(run))
    merged = AutoModelForCausalLM.from_pretrained(merge(options(run, tmp_path / "out")))
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert merged.generation_config.eos_token_id == [grown.eos_token_id, tokenizer.eos_token_id]


@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}], ids=str)
def test_quantised_base_is_dequantised(bits, tokenizer, tmp_path):
    """The adapter was trained over the quantised weights; over the original ones it gives other logits."""
    pytest.importorskip("bitsandbytes")
    config, checkpoint = BitsAndBytesConfig(**bits), tmp_path / "base"
    make_llama(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(checkpoint)  # of whole quantised blocks
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    run = adapter(checkpoint, tmp_path / "run", tokenizer, model)
    record = {"quantization": config.to_dict(), "objective": {"name": "nll"}, "threshold": {}, "versions": {}}
    (run / RECORD_FILE).write_text(json.dumps(record))
    merged = AutoModelForCausalLM.from_pretrained(merge(options(run, tmp_path / "out")))
    assert not hasattr(merged.config, "quantization_config")
    assert json.loads((tmp_path / "out" / RECORD_FILE).read_text())["quantization"] is None
    quantised = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    if config.load_in_4bit:  # in 8 bits the activations are quantised too
        error = (logits(merged) - logits(PeftModel.from_pretrained(quantised, run))).abs().mean()
        other = (logits(merged) - logits(AutoPeftModelForCausalLM.from_pretrained(run))).abs().mean()
        assert error < other / 5
        quantised = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    expected = logits(PeftModel.from_pretrained(quantised.dequantize(), run))
    torch.testing.assert_close(logits(merged).to(expected), expected, atol=1e-3, rtol=1e-3)


def test_record_and_dtype(checkpoint, tokenizer, tmp_path):
    run = adapter(checkpoint, tmp_path / "run", tokenizer)
    out = merge(options(run, tmp_path / "plain", dtype="bfloat16"))
    assert not (out / RECORD_FILE).exists(), "another trainer's run has no record"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    base = shutil.copytree(checkpoint, tmp_path / "base")
    gone = adapter(base, tmp_path / "gone", tokenizer)
    base.rename(tmp_path / "moved")
    with pytest.raises(RecipeError, match=r"Cannot load .*base, the base model of .*gone: .* Add `--base MODEL`"):
        merge(options(gone, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert merge(options(gone, tmp_path / "out", base=str(tmp_path / "moved"))).is_dir()


def test_what_is_refused(checkpoint, tokenizer, tmp_path, capsys):
    run = adapter(checkpoint, tmp_path / "run", tokenizer)
    out, other = tmp_path / "out", tmp_path / "other"
    nan = adapter(checkpoint, tmp_path / "nan", tokenizer)
    weights = load_file(nan / "adapter_model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, nan / "adapter_model.safetensors")
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{")
    nameless = shutil.copytree(run, tmp_path / "nameless")
    config = json.loads((run / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    other.mkdir()
    for argv, message in (
        ([], "No run is named. Write `bl-trainer merge RUN --output DIR`."),
        ([run], f"`--output` is missing: the folder for the merged model. Write e.g. `--output {run}-merged`."),
        ([tmp_path / "none", "--output", out], "it is not a folder. Give a run's `output_dir`, or one of its checkpoints."),
        ([checkpoint, "--output", out], f"there is nothing to merge, it holds a whole model. Use {checkpoint} as it is."),
        ([other, "--output", out], "it holds no adapter_config.json."),
        ([run, "--output", other], "exists already. Write another folder."),
        ([run, "--output", out, "--dtype", "int8"], "`--dtype int8` is unknown."),
        ([run, "--output", out, "--dtpe", "int8"], "Unknown option 'dtpe'. Did you mean `--dtype`?"),
        ([run, "--output", out, "--base", tmp_path / "none"], "Add `--base MODEL` if it is elsewhere."),
        ([nan, "--output", out], "Check that this is the base that the adapter was trained on."),
        ([broken, "--output", out], "Cannot read"),
        ([nameless, "--output", out], "names no base model. Add `--base MODEL`."),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["merge", *map(str, argv)])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert message in said, said
        assert not out.exists()
