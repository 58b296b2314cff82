"""The scripts in examples/ run as their docstrings say, on tiny models."""

import json
import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from test_merge import adapter

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"text": f"one two {word} four five"} for word in ("three", "six", "seven")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_own_objective_trains(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.syspath_prepend(EXAMPLES)
    import own_objective

    own_objective.main(str(checkpoint), data, str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "bl_trainer.json").read_text())
    assert record["objective"] == {"name": "own_objective:gated", "gamma": 2.0}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_pytorch_loop_is_what_the_trainer_does(checkpoint, data, capsys):
    found = example("pytorch_loop")["main"](str(checkpoint), data, 2)
    assert found["nll"] > 0
    assert 0 < found["target_prob"] < 1
    assert capsys.readouterr().out.startswith("step 1: ")


def test_merge_and_generate(checkpoint, tokenizer, tmp_path):
    run = adapter(checkpoint, tmp_path / "run", tokenizer)
    answer = example("merge_and_generate")["main"](str(run), str(tmp_path / "merged"), "one two")
    assert isinstance(answer, str)
