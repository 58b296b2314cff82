"""Diagnosis of a model and a JSONL, without a recipe."""

import json
from pathlib import Path

import pytest

import bl_trainer
from bl_trainer.cli import main
from bl_trainer.diagnosis.options import read_diagnosis
from bl_trainer.errors import RecipeError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


def test_the_verb_measures_what_a_recipe_would(checkpoint, pair_data, tmp_path, monkeypatch, capsys, no_accelerator):
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "train.jsonl", pair_data)
    main(["diagnose", "--model", str(checkpoint), f"--data={data}", "--report", "report", "--percentiles", "2.5"])
    assert "Report: report/report.html" in capsys.readouterr().out
    written = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))
    keys = {"model_name_or_path": checkpoint, "dataset_name": str(data), "use_cpu": True, "bf16": False}
    wanted = bl_trainer.diagnose({**keys, "output_dir": "out", "report_to": "none"}, percentiles=[2.5]).to_json()
    assert (written["total"], written["percentiles"]) == (wanted["total"], wanted["percentiles"])
    assert (written["model"], written["data"]) == (str(checkpoint), str(data))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["report"]


def test_the_function_takes_them_too(checkpoint, tmp_path, no_accelerator):
    turn = {"conversations": [{"from": "human", "value": "one and two"}, {"from": "gpt", "value": "is three"}]}
    data = write(tmp_path / "chats.jsonl", [turn, {"conversations": [*turn["conversations"], *turn["conversations"]]}])
    found = bl_trainer.diagnose(model=checkpoint, data=data, max_length=128, compare=None, percentiles=[])
    assert (sum(found.examples.histogram), found.total.tokens) == (2, 64)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "m", "--data", "d.jsonl", "--config", "r.yaml"], "Cannot use `--config` with `--model` and `--data`"),
        (["--model", "m", "--data", "d.jsonl", "--dataset_name", "d"], "Cannot use `--dataset_name` with"),
        (["--model", "m", "--data", "d.jsonl", "--dataset-name", "d"], "Cannot use `--dataset_name` with"),
        (["--model", "m", "--report", "r"], "`--data` is missing: a data file"),
        (["--data=d.jsonl", "--report", "r"], "`--model` is missing: the folder or Hub name"),
        (["--model", "m", "--data", "d.jsonl"], "`--report` is missing"),
        (["--model", "m", "--data", "d.jsonl", "--report", "r", "--max_tokens", "-1"], "must not be negative"),
        (["--report", "r"], "No recipe is given. Write `diagnose --config recipe.yaml`, or `--model M --data D.jsonl`."),
        (["m", "d.jsonl"], "or `--model M --data D.jsonl`."),
        (["r.yaml"], "given: `r.yaml` needs `--config` before it. Write `diagnose --config r.yaml`, or `--model"),
        (["--model", "./m", "--data", "d.jsonl", "--report", "r"], "^`--model ./m` is not a folder.$"),
        (["--model", "m", "--data", "d.jsonl", "--repotr", "r"], "Did you mean `--report`\\? See `bl-trainer diagnose --help`"),
    ],
)
def test_refusals(argv, message, tmp_path, monkeypatch, no_accelerator):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").touch()
    with pytest.raises(RecipeError, match=message):
        read_diagnosis(argv)


def test_what_is_no_data_is_told(checkpoint, tmp_path, monkeypatch, capsys, no_accelerator):
    monkeypatch.chdir(tmp_path)
    for data, message in (
        ("gone.jsonl", "`--data gone.jsonl`: there is no such file"),
        ("nodata", "Cannot load `--data nodata`: "),
        (write(tmp_path / "odd.jsonl", [{"x": 1}]), "of its columns x"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["diagnose", "--model", str(checkpoint), "--data", str(data), "--report", "report"])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_model_that_is_nowhere_is_named_as_it_was_given(tmp_path, monkeypatch, capsys, no_accelerator):
    monkeypatch.chdir(tmp_path)
    data = str(write(tmp_path / "data.jsonl", [{"prompt": "one", "completion": "two"}]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: nomodel\ndataset_name: {data}\noutput_dir: out\nuse_cpu: true\nbf16: false\n")
    for given, named in (
        (["--model", "nomodel", "--data", data], "--model nomodel"),
        (["--config", str(recipe)], "model_name_or_path: nomodel"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["diagnose", *given, "--report", "report"])
        assert stopped.value.code == 2
        assert f"error: `{named}` is not a folder here, and has no configuration that" in capsys.readouterr().err


def test_precision_is_the_users_where_given(no_accelerator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text('{"text": "a"}\n')
    given = ["--model", "m", "--data", "d.jsonl", "--report", "r"]
    assert read_diagnosis(given).training.bf16 is False
    for name in ("use_cpu", "use-cpu"):
        assert read_diagnosis([*given, f"--{name}", "true", "--bf16", "true"]).training.bf16 is True
