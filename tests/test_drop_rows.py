"""`drop_rows`: the rows that train are those that an independent selection leaves; what is recorded and what is refused."""

import json
import re
import shutil

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from bl_trainer import BLConfig, BLTrainer
from bl_trainer.cli import main
from bl_trainer.diagnosis.run import Diagnosis
from bl_trainer.errors import CheckpointError, RecipeError
from bl_trainer.tokens.row_cut import RowCut
from bl_trainer.tokens.row_hash import row_hash
from bl_trainer.training.kept_rows import KeptRows
from bl_trainer.training.scoring import ScoringTrainer
from conftest import write_recipe
from test_diagnosis import rows_of, save

STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def home(double_checkpoint, tmp_path_factory):
    """A folder with data sets `data` and `chats`, and scores of the first."""
    folder = tmp_path_factory.mktemp("scored")
    save(rows_of("pairs", 20), folder / "data")
    save(rows_of("pairs", 9, seed=4), folder / "more")
    recipe = write_recipe(folder, double_checkpoint, folder / "data", dtype="auto")
    main(["diagnose", "--config", str(recipe), "--scores", str(folder / "scores")])
    return folder


def cut_of(scores, column, share):
    """A number between two scores of a column, with about this share of the rows below."""
    values = sorted(pandas.read_parquet(scores)[column].dropna())
    place = max(1, int(share * len(values)))
    return (values[place - 1] + values[place]) / 2


def trained(folder, checkpoint, data, **changes):
    """Train, and return the weights."""
    folder.mkdir()
    recipe = write_recipe(folder, checkpoint, data, **{"dtype": "auto", **STEPS, **changes})
    main(["train", "--config", str(recipe)])
    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize(
    "changes", [{}, {"packing": True, "max_length": 40}, {"loss_head": "trl"}, {"stop_on_nan": True}], ids=str
)
def test_what_trains_is_what_an_independent_selection_leaves(changes, home, double_checkpoint, tmp_path, capsys):
    number = cut_of(home / "scores", "mean_p", 0.4)
    found = pandas.read_parquet(home / "scores")
    kept = [row for row, p in zip(rows_of("pairs", 20), found["mean_p"], strict=True) if p <= number]
    wanted = trained(tmp_path / "by_hand", double_checkpoint, save(kept, tmp_path / "kept"), **changes)
    rule = f"{home / 'scores'} mean_p > {number!r}"
    weights = trained(tmp_path / "dropped", double_checkpoint, home / "data", drop_rows=rule, **changes)
    assert all(torch.equal(weights[name], value) for name, value in wanted.items())
    said = f"{20 - len(kept)} of 20"
    assert f"Rows: {said} dropped by {home / 'scores'} mean_p > " in capsys.readouterr().out
    record = json.loads((tmp_path / "dropped" / "out" / "bl_trainer.json").read_text())
    assert (record["drop_rows"]["rows"], record["drop_rows"]["dropped"]) == (20, 20 - len(kept))
    assert record["recipe"]["drop_rows"] == rule
    assert re.search(rf"drop_rows: .*  # {said} rows", (tmp_path / "dropped" / "out" / "README.md").read_text())


def test_rows_of_a_mixture(home, double_checkpoint, tmp_path):
    """They are numbered through, and a file of anybody's with row, hash and a number will do."""
    mixture = {"dataset_name": None, "datasets": [{"path": str(home / name)} for name in ("data", "more")]}
    recipe = write_recipe(tmp_path, double_checkpoint, None, dtype="auto", **mixture)
    main(["diagnose", "--config", str(recipe), "--scores", str(tmp_path / "scores")])
    scores = pandas.read_parquet(tmp_path / "scores")
    scores["mine"] = [row % 3 for row in scores["row"]]
    scores[["mine", "row_hash", "row"]][::-1].to_parquet(tmp_path / "my own.parquet")
    rule = f"{tmp_path / 'my own.parquet'} mine<2"
    weights = trained(tmp_path / "dropped", double_checkpoint, None, drop_rows=rule, **mixture)
    rows = [*rows_of("pairs", 20), *rows_of("pairs", 9, seed=4)]
    wanted = trained(tmp_path / "by_hand", double_checkpoint, save(rows[2::3], tmp_path / "kept"))
    assert all(torch.equal(weights[name], value) for name, value in wanted.items())


def test_a_preview_and_a_diagnosis_read_the_kept_rows(home, double_checkpoint, tmp_path, capsys):
    found = pandas.read_parquet(home / "scores")
    number = cut_of(home / "scores", "targets", 0.5)
    kept = [row for row, targets in zip(found["row"], found["targets"], strict=True) if targets >= number]
    rule = f"{home / 'scores'} targets < {number}"
    recipe = str(write_recipe(tmp_path, double_checkpoint, home / "data", dtype="auto", drop_rows=rule, **STEPS))
    main(["train", "--config", recipe, "--show", "3"])
    assert [int(row) for row in re.findall(r"^Row (\d+): ", capsys.readouterr().out, re.MULTILINE)] == kept[:3]
    main(["diagnose", "--config", recipe, "--report", str(tmp_path / "report"), "--scores", str(tmp_path / "scores")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["total"]["examples"] == len(kept)
    assert report["total"]["tokens"] == found["targets"][kept].sum()
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "scores"), found)  # of all rows


def test_resuming_takes_the_same_rows(home, double_checkpoint, tmp_path, capsys):
    shutil.copytree(home / "scores", tmp_path / "scores")
    number = cut_of(home / "scores", "mean_p", 0.4)
    rule = f"{tmp_path / 'scores'} mean_p > {number!r}"
    keys = {**STEPS, "save_strategy": "steps", "save_steps": 1, "drop_rows": rule}
    trained(tmp_path / "run", double_checkpoint, home / "data", **keys)
    argv = ["train", "--config", str(tmp_path / "run" / "recipe.yaml"), "--max_steps", "3", "--resume_from_checkpoint", "true"]
    refused(capsys, [*argv, "--drop_rows", f"{rule}1"], "the recipe changes `drop_rows` from")
    (file,) = (tmp_path / "scores").iterdir()
    table = pq.read_table(file)
    other = table.set_column(
        table.schema.get_field_index("mean_p"), "mean_p", pa.array(table["mean_p"].to_numpy()[::-1].copy())
    )
    pq.write_table(other, file)
    refused(capsys, argv, "`drop_rows` dropped other rows (")
    pq.write_table(table, file)
    main(argv)
    assert "Resuming from" in capsys.readouterr().out


def test_a_trainer_of_python_drops_them_too(home, double_checkpoint, tmp_path):
    rows = Dataset.from_list(rows_of("pairs", 20))
    number = cut_of(home / "scores", "mean_p", 0.4)
    keys = {**STEPS, "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    options = BLConfig(drop_rows=f"{home / 'scores'} mean_p > {number!r}", **keys)
    trainer = BLTrainer(str(double_checkpoint), options, train_dataset=rows)
    kept = [row for row, p in enumerate(pandas.read_parquet(home / "scores")["mean_p"]) if p <= number]
    assert trainer.kept_rows.numbers == kept
    assert len(trainer.train_dataset) == len(kept)
    plain = BLTrainer(str(double_checkpoint), BLConfig(**keys), train_dataset=rows.select(kept))
    assert plain.train_dataset["input_ids"] == trainer.train_dataset["input_ids"]
    plain.train()
    plain._save_checkpoint(plain.model, None)
    with pytest.raises(CheckpointError, match=r"dropped other rows \(none, now "):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def refused(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said, said
    assert len(said.split("error: ")[1].strip().splitlines()) == 1


REFUSED = {
    "grammar": ("scores mean_p 0.5", "`drop_rows: scores mean_p 0.5`: it is not SCORES COLUMN SIGN NUMBER."),
    "nan": ("scores mean_p > nan", "it is not SCORES COLUMN SIGN NUMBER."),
    "equal": ("scores mean_p == 1", "it is not SCORES COLUMN SIGN NUMBER."),
    "nowhere": ("nowhere mean_p > 1", "nowhere does not exist. Run `diagnose --scores` first, and name its folder."),
    "empty": ("empty mean_p > 1", "there are no scores. Run `diagnose --scores` first, and name its folder."),
    "broken": ("broken.parquet mean_p > 1", "broken.parquet can't be read ("),
    "column": ("scores meanp > 1", "has no column 'meanp'. Did you mean 'mean_p'? Name a column of numbers."),
    "text": ("scores row_hash > 1", "the column 'row_hash' holds string. Name a column of numbers."),
    "truth": ("scores truncated > 0", "the column 'truncated' holds bool. Name a column of numbers."),
    "all": ("scores targets > -1", "it drops all 20 rows. Move the number."),
    "null": ("gaps.parquet end_p > 0.5", "end_p of row 2 is missing or NaN. Choose another column."),
    "number": ("gaps.parquet mean_p > 0.5", "mean_p of row 5 is missing or NaN. Choose another column."),
    "missing": ("part.parquet mean_p > 0.5", "row 7 of the training set has no score. Run `diagnose --scores` to its end."),
    "end": ("begin.parquet mean_p > 0.5", "row 12 of the training set has no score."),
    "twice": ("twice.parquet mean_p > 0.5", "row 19 is scored twice. Remove a file."),
    "more": ("longer.parquet mean_p > 0.5", "they score row 20, and the training set has 20 rows. Score this data set."),
    "other": ("other.parquet mean_p > 0.5", "row 3 of the training set is another one in the scores. Score this data set."),
    "targetless": ("blank.parquet mean_p > -1", "none of the rows that it keeps has a target. Move the number."),
    "words": ("words.parquet mean_p > 0.5", "the column 'row' of words.parquet must hold integers without nulls. Number every"),
    "hole": ("hole.parquet mean_p > 0.5", "the column 'row' of hole.parquet must hold integers without nulls."),
    "csv": ("scores.csv mean_p > 0.5", "scores.csv is no Parquet file. Name one, or a folder of scores."),
    "no number": ("plain.parquet mean_p > 0.5", "has no column 'row'."),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(home, tmp_path_factory):
    """A folder with scores that are wrong, each in its way."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(home / "scores", folder / "scores")
    (folder / "empty").mkdir()
    (folder / "broken.parquet").write_bytes(b"PAR1")
    table = pq.read_table(home / "scores").to_pandas()
    gaps = table.astype({"end_p": float}).copy()
    gaps.loc[2, "end_p"] = None
    gaps.loc[5, "mean_p"] = float("nan")
    blank = table.copy()
    blank.loc[4, ["targets", "mean_p"]] = [0, None]
    hole = table.assign(row=table["row"].astype("Int64").where(table["row"] != 5))
    table.to_csv(folder / "scores.csv")
    other = table.copy()
    other.loc[3, "row_hash"] = "0" * 16
    longer = pandas.concat([table, table[-1:].assign(row=20)])
    made = {
        "gaps": gaps, "part": table.drop(7), "begin": table[:12], "twice": pandas.concat([table, table[-1:]]), "longer": longer,
        "blank": blank, "hole": hole, "words": table.assign(row=table["row"].astype(str)),
        "other": other, "plain": table.drop(columns="row"),
    }  # fmt: skip
    for name, each in made.items():
        each.to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_scores_that_do_not_fit_are_refused(name, home, files, double_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(ScoringTrainer, "add_heads", lambda *args: pytest.fail("a model loads"))
    monkeypatch.setattr(Diagnosis, "_make_trainer", lambda *args: pytest.fail("a model loads"))
    rule, message = REFUSED[name]
    recipe = str(write_recipe(tmp_path, double_checkpoint, home / "data", dtype="auto", drop_rows=rule, **STEPS))
    refused(capsys, ["train", "--config", recipe], message)
    refused(capsys, ["diagnose", "--config", recipe, "--report", "report"], message)
    assert not (tmp_path / "out").exists()


def test_a_stream_has_no_row_numbers(home, double_checkpoint, tmp_path, capsys):
    rule = f"{home / 'scores'} mean_p > 0.5"
    recipe = write_recipe(tmp_path, double_checkpoint, home / "data", drop_rows=rule, dataset_streaming=True, **STEPS)
    refused(capsys, ["train", "--config", str(recipe)], "a stream's rows have no numbers. Write `dataset_streaming: false`.")


@pytest.mark.parametrize("sign", ["<", "<=", ">", ">="])
def test_a_row_without_a_target_is_kept(sign, tmp_path):
    rows = Dataset.from_list([{"text": text} for text in "abcde"])
    hashes = [row_hash(row) for row in rows]
    table = {"row": [*range(5)], "row_hash": hashes, "targets": [1, 0, 1, 1, 1], "x": [1.0, None, 1.0, 0.0, 2.0]}
    pq.write_table(pa.table(table), tmp_path / "scores.parquet")
    wanted = {"<": [0, 1, 2, 4], "<=": [1, 4], ">": [0, 1, 2, 3], ">=": [1, 3]}[sign]
    assert KeptRows.of(f"{tmp_path / 'scores.parquet'} x {sign} 1", rows, "text").numbers == wanted


def test_a_rule_is_read_strictly():
    cut = RowCut.parse("  a folder/x.parquet  noise_score>= -1e-3 ")
    assert (str(cut.path), cut.column, cut.sign, cut.number) == ("a folder/x.parquet", "noise_score", ">=", -1e-3)
    for wrong in (3, "", "> 3", "x > 3", "scores x > 3 4", "scores x >> 3", "scores x > inf"):
        with pytest.raises(RecipeError, match="it is not SCORES COLUMN SIGN NUMBER"):
            RowCut.parse(wrong)
