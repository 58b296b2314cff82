"""docs/guide/python.md is true, and what its functions refuse."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from trl import SFTConfig

import bl_trainer
from bl_trainer import BLTrainer, RecipeError
from conftest import make_llama
from ways import LORA, build, train, weights

PAGE = (Path(__file__).parents[1] / "docs/guide/python.md").read_text(encoding="utf-8")
OPTIONS = {"max_tokens": 0}


def test_snippets_of_the_page(checkpoint, tokenizer, text_data, tmp_path, monkeypatch, capsys):
    """One after the other, with the names that the page takes for given."""
    pytest.importorskip("lm_eval")
    module, *snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_losses.py").write_text(module)
    (tmp_path / "base").symlink_to(checkpoint)
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    short = "BLConfig(" + "use_cpu=True, bf16=False, report_to='none', output_dir="
    names = {"model": make_llama(tokenizer), "tokenizer": tokenizer, "dataset": text_data}
    for snippet in snippets:
        exec(snippet.replace("BLConfig(", short, 1) if "BLConfig(" in snippet else snippet, names)
    assert names["args"].objective == {"name": "my_losses:gated", "gamma": 2.0}
    p = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(names["pull"], p * (1 - p))
    assert names["before"].total.nll != names["after"].total.nll
    assert (tmp_path / "out/diagnosis/report.html").is_file()
    assert json.loads((tmp_path / "out/diagnosis/report.json").read_text()) == names["after"].to_json()
    assert "exact_match" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/bl_trainer.json").read_text())
    assert record["objective"] == {"name": "my_losses:gated", "gamma": 2.0}


def test_diagnose_measures_a_trainer_as_it_is(checkpoint, tokenizer, text_data, tmp_path):
    """The same figures as of its recipe, and of the trained model others; the trainer trains as if it had not been asked."""
    expected = weights(train(BLTrainer, tokenizer, text_data, tmp_path, objective="neg_p", max_steps=2))
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path, objective="neg_p", max_steps=2)
    forward = trainer.model.forward
    before = bl_trainer.diagnose(trainer, **OPTIONS)
    assert trainer.model.forward == forward
    assert trainer.model.training
    trainer.train()
    for name, parameter in weights(trainer).items():
        assert torch.equal(parameter, expected[name]), name
    after = bl_trainer.diagnose(trainer, tmp_path / "report", **OPTIONS)
    assert after.total.prob > before.total.prob
    assert (tmp_path / "report/report.html").is_file()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_data))
    keys = {"model_name_or_path": str(checkpoint), "dataset_name": str(tmp_path / "rows.jsonl"), "use_cpu": True, "bf16": False}
    of_recipe = bl_trainer.diagnose({**keys, "output_dir": "out", "report_to": "none", "objective": "neg_p"}, **OPTIONS)
    assert before.total.nll == pytest.approx(of_recipe.total.nll, rel=1e-5)
    assert before.total.tokens == of_recipe.total.tokens
    assert before.recipe.objective == "neg_p"


def test_diagnose_measures_adapters_and_packed_rows(tokenizer, text_data, tmp_path):
    plain = bl_trainer.diagnose(build(BLTrainer, tokenizer, text_data, tmp_path), **OPTIONS)
    options = {"peft_config": LORA, "packing": True, "max_length": 64, "stop_on_nan": True}
    packed = bl_trainer.diagnose(build(BLTrainer, tokenizer, text_data, tmp_path, **options), **OPTIONS)
    assert packed.total.tokens == plain.total.tokens
    assert packed.total.nll == pytest.approx(plain.total.nll, rel=1e-4), "an adapter begins as its base"


def test_what_diagnose_refuses_of_a_trainer(tokenizer, text_data, tmp_path):
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path)
    for options, message in (
        ({"compare": str(tmp_path)}, "Cannot use `compare` with a trainer: it needs a recipe."),
        ({"by": "source"}, "Cannot use `by` with a trainer"),
        ({"max_token": 3}, "Unknown option 'max_token'. Did you mean 'max_tokens'?"),
        ({"max_tokens": -1}, "`--max_tokens -1` must not be negative"),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            bl_trainer.diagnose(trainer, **options)
    streamed = build(BLTrainer, tokenizer, text_data.to_iterable_dataset(), tmp_path)
    with pytest.raises(RecipeError, match="its training set is a stream or has images"):
        bl_trainer.diagnose(streamed)
    trainer.data_collator = lambda rows: rows
    with pytest.raises(RecipeError, match="with a `data_collator` of your own"):
        bl_trainer.diagnose(trainer)
    trainer.is_fsdp_enabled = True
    with pytest.raises(RecipeError, match="under FSDP or DeepSpeed"):
        bl_trainer.diagnose(trainer)
    trainer.args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(RecipeError, match="with a plain `SFTConfig`"):
        bl_trainer.diagnose(trainer)


def test_evaluate_returns_results(checkpoint, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    rows = [{"prompt": [{"role": "user", "content": "hello"}], "completion": [{"role": "assistant", "content": "abc"}]}] * 2
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data": {"completion": tmp_path / "test.jsonl"}, "max_new_tokens": 2}
    found = bl_trainer.evaluate(checkpoint, "completion", **options)
    assert found.score(checkpoint, "exact_match") == 0
    assert str(found).startswith("task ")
    assert "task " not in capsys.readouterr().out, "it prints no table"
    kept = bl_trainer.evaluate([str(checkpoint)], ["completion"], tmp_path / "results", **options)
    assert json.loads((tmp_path / "results/results.json").read_text())["evaluations"] == kept.evaluations
    for arguments, message in (
        (("nobody", "exact_match"), "Cannot return the score 'exact_match' of nobody: 0 found. There are: none."),
        ((checkpoint, "acc"), "0 found. There are: completion exact_match, completion normalised_match."),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            found.score(*arguments)
    with pytest.raises(RecipeError, match=r"Unknown option 'limits'. Did you mean 'limit'\?"):
        bl_trainer.evaluate(checkpoint, "completion", limits=3)
