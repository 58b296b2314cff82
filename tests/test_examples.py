"""The scripts and the notebook in examples/ run as they say, on tiny models."""

import json
import re
import runpy
from pathlib import Path

import matplotlib.pyplot as pyplot
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


def test_pytorch_loop_names_a_row_without_text(checkpoint, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"prompt": "a"}\n')
    with pytest.raises(SystemExit, match=r"d.jsonl: line 2 has no `text`"):
        example("pytorch_loop")["main"](str(checkpoint), tmp_path / "d.jsonl", 2)


def test_merge_and_generate(checkpoint, tokenizer, tmp_path):
    run = adapter(checkpoint, tmp_path / "run", tokenizer)
    answer = example("merge_and_generate")["main"](str(run), str(tmp_path / "merged"), "one two")
    assert isinstance(answer, str)


NOTEBOOK = json.loads((EXAMPLES / "choose_an_objective.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_notebook_runs(checkpoint, tmp_path, monkeypatch, capsys):
    """Its cells, one after the other, with a tiny model and fewer rows and steps."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    pyplot.switch_backend("agg")
    records = runpy.run_path(str(EXAMPLES.parent / "scripts" / "quickstart.py"))["make_records"]
    (tmp_path / "quickstart" / "data").mkdir(parents=True)
    (tmp_path / "quickstart" / "SmolLM2-135M-Instruct").symlink_to(checkpoint)
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in records(1, 4, wrong=0.3))
        (tmp_path / "quickstart" / "data" / f"{split}.jsonl").write_text(lines)
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    source = "\n".join(CODE)
    for real, tiny in (("STEPS = 24", "STEPS = 1"), ("max_new_tokens=48", "max_new_tokens=2")):
        assert real in source
        source = source.replace(real, tiny)
    names = {}
    exec(source, names)
    assert set(names["metrics"]) == {"nll", "neg_p"}
    assert (tmp_path / "out/choose/diagnosis/report.html").is_file()
    assert [line.get_label() for line in names["axes"].lines] == ["nll", "power 0.5", "neg_p"]
    assert re.search(r"^neg_p +\d+\.\d{3} +\d\.\d{3} +0\.000$", capsys.readouterr().out, re.MULTILINE)
    pyplot.close("all")


def test_notebook_keeps_its_outputs():
    outputs = [output for cell in NOTEBOOK["cells"] for output in cell.get("outputs", [])]
    assert all(cell["outputs"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"), "run `make notebook`"
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    texts = [{key: value for key, value in output.get("data", output).items() if key != "image/png"} for output in outputs]
    assert not re.search(r"/(work|home|root|tmp|usr)/|site-packages|stderr", json.dumps(texts)), (
        "an output names a machine's path"
    )


def test_what_a_notebook_keeps():
    said = [
        ("stderr", "10%"),
        ("stdout", "[2026-01-01] [WARNING] [a.py:1:f] No GPU.\none\n"),
        ("stderr", "20%"),
        ("stdout", "two\n"),
    ]
    outputs = [{"output_type": "stream", "name": name, "text": [text]} for name, text in said]
    plot = {"output_type": "display_data", "data": {"image/png": "", "text/plain": "<Figure>"}}
    cells = [{"cell_type": "markdown", "source": ["a"]}, {"cell_type": "code", "source": [], "outputs": [*outputs, plot]}]
    notebook = {"cells": cells, "metadata": {"kernelspec": {"name": "python3"}, "widgets": {}}}
    runpy.run_path(str(EXAMPLES.parent / "tools" / "notebook.py"))["tidy"](notebook)
    assert notebook["cells"][1]["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "one\ntwo\n"}, plot]
    assert notebook["metadata"] == {"kernelspec": {"name": "python3"}, "language_info": {"name": "python"}}
