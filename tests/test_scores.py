"""`diagnose --scores`: a score for every row, against an independent loop in float64; resuming, processes, refusals."""

import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import bl_trainer
import verbs
from bl_trainer.cli import main
from bl_trainer.diagnosis import score_files
from bl_trainer.diagnosis.options import DiagnoseArguments
from bl_trainer.diagnosis.run import Diagnosis
from bl_trainer.errors import MeasurementError, RecipeError
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.tokens.row_hash import hashed_columns, row_hash, sample_of
from conftest import make_double, write_recipe
from forking import ranks
from test_diagnosis import by_hand, rows_of, save
from ways import train

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(score_files, "FEWEST", 16)


def scorer(folder, checkpoint, data, *flags, **changes):
    """Return the diagnosis of a recipe with `--scores folder/scores`."""
    unlimited = changes.pop("unlimited", False)
    recipe = write_recipe(folder, checkpoint, data, **{"dtype": "auto", **changes})
    if unlimited:
        recipe.write_text(recipe.read_text() + "max_length: null\n")
    read = Recipe.read(["--config", str(recipe), "--scores", str(folder / "scores"), *flags], "diagnose", DiagnoseArguments)
    read.options.check()
    return Diagnosis(read)


def scored(folder, *args, **changes):
    """Score, and return the columns as `datasets` loads them."""
    folder.mkdir(exist_ok=True)
    scorer(folder, *args, **changes).score()
    return loaded(folder)


def loaded(folder):
    """Return the scores in a folder as `datasets` loads them."""
    return load_dataset("parquet", data_dir=str(folder / "scores"), split="train", cache_dir=str(folder / "cache"))


def expected(model, sequences, end):
    """The scores of a row by plain forward passes of a model, a sequence each: (token ids, which of them train)."""
    logps, entropies, tokens = [], [], []
    for ids, trains in sequences:
        if len(ids) < 2:
            continue
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for i in range(1, len(ids)):
            if trains[i]:
                logps.append(rows[i - 1, ids[i]].item())
                entropies.append(-(rows[i - 1].exp() * rows[i - 1]).sum().item())
                tokens.append(ids[i])
    if not logps:
        return {"targets": 0, **dict.fromkeys(score_files.FIGURES), "logp": []}
    logp, entropy = np.array(logps), np.array(entropies)
    p, ends = np.exp(logp), [i for i, token in enumerate(tokens) if token == end]
    return {
        "targets": len(p), "mean_p": p.mean(), "mean_logp": logp.mean(), "improbable_share": (p < 0.1).mean(),
        "conflict_share": ((p <= 0.05) & (entropy <= 0.5)).mean(), "entropy": entropy.mean(), "first_p": p[0],
        "end_p": p[ends[-1]] if ends else None, "logp": logp,
    }  # fmt: skip


def check(found, rows, sequences, model, tokenizer, tolerance=1e-12):
    assert found["row"] == list(range(len(rows)))
    assert found["row_hash"] == [row_hash({k: v for k, v in row.items() if k != "source"}) for row in rows]
    for i, each in enumerate(sequences):
        for name, value in expected(model, each, tokenizer.eos_token_id).items():
            if name != "logp":
                assert found[name][i] == (None if value is None else pytest.approx(value, abs=tolerance)), (i, name)
            elif name in found.column_names:
                np.testing.assert_allclose(found["logp"][i], value, atol=1e-6 + 1e-7 * np.abs(value).max(initial=0))


WAYS = {
    "chat": ("chat", {}),
    "answers": ("chat", {"assistant_only_loss": True}),
    "completion": ("pairs", {"per_device_train_batch_size": 3}),
    "packed": ("pairs", {"packing": True, "max_length": 20}),
    "keep_end": ("pairs", {"max_length": 20, "truncation_mode": "keep_end"}),
    "keep_start": ("pairs", {"max_length": 20, "shuffle_dataset": True}),
    "split": ("text", {"packing": True, "max_length": 16, "packing_strategy": "wrapped"}),
    "padding_free": ("pairs", {"padding_free": True, "unlimited": True}),
    "lora": ("pairs", {"use_peft": True, "lora_r": 4}),
    "worker": ("text", {"dataloader_num_workers": 1}),
}


def cut(sequence, options):
    """The parts of a row that train, and whether it is cut."""
    length, size = options.get("max_length", 1024), len(sequence[0])
    starts = [0]
    if options.get("packing_strategy"):
        starts = range(0, size, length)
    elif options.get("truncation_mode") == "keep_end":
        starts = [max(0, size - length)]
    parts = [tuple(each[start : start + length] for each in sequence) for start in starts]
    return parts, size > sum(len(ids) for ids, _ in parts)


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_an_independent_loop(way, tokenizer, double_checkpoint, tmp_path):
    kind, options = WAYS[way]
    rows = rows_of(kind)
    found = scored(tmp_path, double_checkpoint, save(rows, tmp_path / "data"), "--tokens", **options)
    made = [cut(by_hand(row, tokenizer, options.get("assistant_only_loss")), options) for row in rows]
    check(found, rows, [parts for parts, _ in made], make_double(tokenizer), tokenizer)
    assert found["truncated"] == [is_cut for _, is_cut in made]
    assert any(found["truncated"]) == (way in ("packed", "keep_end", "keep_start"))
    assert found["input_ids"] == [[token for ids, _ in parts for token in ids] for parts, _ in made]
    for labels, targets in zip(found["labels"], found["targets"], strict=True):
        assert sum(label != -100 for label in labels) == targets


def test_scores_in_float32(tokenizer, checkpoint, tmp_path):
    rows = rows_of("pairs")
    found = scored(tmp_path, checkpoint, save(rows, tmp_path / "data"), "--tokens", "--tokens_dtype", "float16")
    sequences = [[by_hand(row, tokenizer, False)] for row in rows]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    logps = [found[i]["logp"] for i in range(len(rows))]
    check(found.remove_columns("logp"), rows, sequences, model, tokenizer, tolerance=1e-6)
    for i, each in enumerate(sequences):
        np.testing.assert_allclose(logps[i], expected(model, each, 1)["logp"], rtol=1e-3, atol=1e-6)


def test_an_adapter_is_part_of_the_model(tokenizer, double_checkpoint, tmp_path):
    model = get_peft_model(make_double(tokenizer), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    rows = rows_of("pairs")
    scoring = scorer(tmp_path, double_checkpoint, save(rows, tmp_path / "data"))
    scoring.trainer.model = PeftModel.from_pretrained(scoring.trainer.model, tmp_path / "adapter")
    scoring.score()
    check(loaded(tmp_path), rows, [[by_hand(row, tokenizer, False)] for row in rows], model.eval(), tokenizer)


def test_batches_and_order_change_nothing(double_checkpoint, tmp_path):
    rows = rows_of("pairs")
    first = scored(tmp_path / "a", double_checkpoint, save(rows, tmp_path / "data"), per_device_train_batch_size=1)
    weighted = [{**row, "objective_weight": 0.5} for row in rows[::-1]]  # which is no text
    other = scored(tmp_path / "b", double_checkpoint, save(weighted, tmp_path / "other"), per_device_train_batch_size=7)
    assert other["row_hash"] == first["row_hash"][::-1]
    for name in score_files.FIGURES:
        assert other[name][::-1] == pytest.approx(first[name], abs=1e-12), name


def test_rows_without_targets_have_no_figures(double_checkpoint, tmp_path):
    """Cut down to their prompt, which training drops; a file that holds nothing else is written, and scored by no batch."""
    long = {"prompt": "abcdefghijklmnopqrst", "completion": "uv"}
    rows = [long] * 20 + [{"prompt": "ab", "completion": "cd"}, long]
    found = scored(tmp_path, double_checkpoint, save(rows, tmp_path / "data"), max_length=10)
    assert found["targets"] == [0] * 20 + [3, 0]
    assert [value is None for value in found["mean_p"]] == [True] * 20 + [False, True]
    assert found["truncated"] == [True] * 20 + [False, True]
    recipe = scorer(tmp_path, double_checkpoint, tmp_path / "data", max_length=10)
    (tmp_path / "scores" / "scores-000000000-000000016.parquet").unlink()
    recipe.score()
    assert len(list((tmp_path / "scores").iterdir())) == 2


def test_not_a_number_is_told_with_its_row(tokenizer, tmp_path, double_checkpoint):
    model = make_double(tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("?")] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "ab", "completion": "cd"}] * 20 + [{"prompt": "a?b", "completion": "cd"}]
    found = scorer(tmp_path, tmp_path / "model", save(rows, tmp_path / "data"))
    with pytest.raises(MeasurementError, match="NaN in row 20 of the data set"):
        found.score()
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["scores-000000000-000000016.parquet"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_resumes_on_another_number_of_processes(double_checkpoint, tmp_path):
    """To the same files, byte by byte; a process for which there is no file waits for the other."""
    argvs = []
    for name, count in (("many", 90), ("few", 10)):
        recipe = write_recipe(tmp_path, double_checkpoint, save(rows_of("pairs", count), tmp_path / name), dtype="auto")
        recipe = recipe.rename(tmp_path / f"{name}.yaml")
        argvs.append(["diagnose", "--config", str(recipe), "--tokens", "--scores"])
        main([*argvs[-1], str(tmp_path / f"{name}-whole")])
    whole = [contents(tmp_path / f"{name}-whole") for name in ("many", "few")]
    assert [len(files) for files in whole] == [6, 1]
    argvs = [[*argv, str(tmp_path / f"{name}-parts")] for argv, name in zip(argvs, ("many", "few"), strict=True)]
    codes, _ = ranks(tmp_path, verbs.score, argvs, 16, 3, processes=None)
    assert codes == [-signal.SIGKILL]
    left = contents(tmp_path / "many-parts")
    assert sorted(re.sub(r"\.\w{8}\.", ".*.", name) for name in left) == [
        "scores-000000000-000000016.parquet",
        "scores-000000016-000000032.parquet",
        "scores-000000032-000000048.parquet.*.part",
    ]
    written = (tmp_path / "many-parts" / "scores-000000000-000000016.parquet").stat().st_mtime_ns
    codes, said = ranks(tmp_path, verbs.score, argvs, 16, 0)
    assert codes == [0, 0], said[0][-4000:]
    assert [contents(tmp_path / f"{name}-parts") for name in ("many", "few")] == whole
    assert (tmp_path / "many-parts" / "scores-000000000-000000016.parquet").stat().st_mtime_ns == written
    assert "Scores: " in said[0]
    assert "(90 rows in 6 files)" in said[0]


OPTIONS = {
    "tokens": (["--report", "r", "--tokens"], "`--tokens` does nothing without `--scores`. Name the folder for the scores."),
    "dtype": (["--scores", "s", "--tokens_dtype", "float16"], "`--tokens_dtype` does nothing without `--tokens`."),
    "alone": (["--report", "r", "--tokens_dtype", "float16"], "`--tokens_dtype` does nothing without `--scores`."),
    "half": (["--scores", "s", "--tokens", "--tokens_dtype", "half"], "`--tokens_dtype half` must be float32 or float16."),
    "compare": (["--scores", "s", "--compare", "."], "those of the recipe's own model. Run it without `--compare`."),
    "same": (["--scores", "s", "--report", "./s"], "`--scores` and `--report` name the same folder."),
    "within": (["--scores", "s", "--report", "./s/a/r"], "`--report ./s/a/r` is within `--scores s`, whose files load"),
    "other": (["--scores", "."], "`--scores .` holds notes.txt, which is no file of scores. Write another folder."),
    "file": (["--scores", "notes.txt"], "Can't write to `--scores notes.txt`: it is a file, not a folder."),
    "stream": (["--scores", "s", "--dataset_streaming", "true"], "a stream has no end. Write `dataset_streaming: false`."),
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(double_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    return write_recipe(folder, double_checkpoint, save(rows_of("pairs", 20), folder / "data"), dtype="auto", max_steps=1)


def refused(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        main(["diagnose", *argv])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(rf"^error: .*{re.escape(message)}", said, re.MULTILINE), said


@pytest.fixture
def loads_no_model(monkeypatch):
    monkeypatch.setattr(Diagnosis, "_make_trainer", lambda *args: pytest.fail("a model loads"))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_say_nothing_are_refused(name, recipe, tmp_path, monkeypatch, capsys, loads_no_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    options, message = OPTIONS[name]
    refused(capsys, ["--config", str(recipe), *options], message)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_scores_of_something_else_are_refused(recipe, double_checkpoint, tmp_path, capsys, monkeypatch):
    home, argv = tmp_path / "scores", ["--config", str(recipe), "--scores", str(tmp_path / "scores")]
    main(["diagnose", *argv])
    first = home / "scores-000000000-000000016.parquet"
    before, cannot = contents(home), f"Cannot resume `--scores {home}`: {first.name}"
    rows = rows_of("pairs", 20)
    rows[3] = {**rows[3], "completion": "another"}
    other, longer = save(rows, tmp_path / "other"), save(rows_of("pairs", 21), tmp_path / "longer")
    with monkeypatch.context() as patch:
        patch.setattr(Diagnosis, "_make_trainer", lambda *args: pytest.fail("a model loads"))
        mismatch = (
            f"Cannot resume `--scores {home}`: row 3 is another one in {first.name}. Write another folder, or remove this"
        )
        refused(capsys, [*argv, "--dataset_name", str(other)], mismatch)
        refused(
            capsys,
            [*argv, "--dataset_name", str(longer)],
            "scores-000000016-000000020.parquet was written with another `rows` (20, now 21).",
        )
        refused(capsys, [*argv, "--max_length", "30"], f"{cannot} was written with another `max_length` (1024, now 30).")
        refused(capsys, [*argv, "--tokens"], f"{cannot} was written with another `tokens` (None, now float32).")
        patch.setattr(score_files, "SCHEMA", 2)
        refused(capsys, argv, f"{cannot} was written with another `schema` (1, now 2).")
    with monkeypatch.context() as patch:
        patch.setattr(score_files, "FEWEST", 8)
        refused(capsys, argv, f"{cannot} is no file of this data set.")
    assert contents(home) == before
    pq.write_table(pa.table({"row_hash": ["x"]}), first)
    refused(capsys, argv, f"{cannot} does not say what it is of.")
    first.write_bytes(before[first.name])
    table, again = pq.read_table(first), "Remove this file; the same command writes it again."
    pq.write_table(table.slice(0, 10), first)
    refused(capsys, argv, f"{cannot} holds 10 of 16 rows. {again}")
    pq.write_table(table.drop_columns(["row_hash"]), first)
    refused(capsys, argv, f"{cannot} has no column `row_hash`. {again}")
    first.write_bytes(before[first.name][:300])
    refused(capsys, argv, f"Cannot read {first}: ")
    first.unlink()
    main(["diagnose", *argv])
    assert contents(home) == before


def test_other_weights_under_the_same_name_are_refused(recipe, double_checkpoint, tokenizer, tmp_path, capsys):
    shutil.copytree(double_checkpoint, tmp_path / "model")
    argv = ["--config", str(recipe), "--scores", str(tmp_path / "scores"), "--model_name_or_path", str(tmp_path / "model")]
    main(["diagnose", *argv])
    model = make_double(tokenizer)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-9
    model.save_pretrained(tmp_path / "model")
    refused(capsys, argv, "was written with another `weights`. Write another folder, or remove this one.")


def test_a_report_and_scores_from_python(recipe, tmp_path):
    report = bl_trainer.diagnose(recipe, scores=str(tmp_path / "scores"), tokens=True)
    scores = loaded(tmp_path)
    assert sum(scores["targets"]) == report.total.tokens
    p = np.exp(np.concatenate(scores["logp"]))
    assert p.mean() == pytest.approx(report.total.prob, abs=1e-6)


def test_a_hash_is_of_the_text_alone():
    turn = {"role": "user", "content": "ü"}
    assert row_hash({"messages": [turn]}) == row_hash({"messages": [{"content": "ü", "name": None, "role": "user"}]})
    assert row_hash({"messages": [turn]}) == "1b6ab078c8077785"


def test_what_chooses_the_targets_is_hashed():
    row = {"input_ids": [5, 6, 7]}
    choices = {
        "labels": [-100, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [0, 1, 1], "token_weight": [0, 1, 1],
        "seq_lengths": [1, 2],
    }  # fmt: skip
    for column, value in choices.items():
        data = Dataset.from_list([{**row, column: value, "objective_weight": 0.5, "source": "a"}])
        assert hashed_columns(data, "text") == ["input_ids", column]
        plain = sample_of(data.remove_columns(column))
        assert sample_of(data) == {**plain, "targets": sample_of(data)["targets"]} != plain
    weighted = [sample_of(Dataset.from_list([{**row, "objective_weight": weight}])) for weight in (0.5, 1.0)]
    assert weighted[0]["hash"] == weighted[1]["hash"]
    assert weighted[0]["targets"] != weighted[1]["targets"]


def test_a_trainer_has_no_rows_to_score(tokenizer, pair_data, tmp_path):
    args = bl_trainer.BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trainer = bl_trainer.BLTrainer(model=make_double(tokenizer), args=args, train_dataset=pair_data, processing_class=tokenizer)
    with pytest.raises(RecipeError, match="Cannot use `scores` with a trainer: it needs a recipe"):
        bl_trainer.diagnose(trainer, scores=str(tmp_path / "scores"))


def test_the_reference_lists_the_columns(recipe, tmp_path):
    page = (DOCS / "reference" / "scores.md").read_text()
    assert f"schema {score_files.SCHEMA}." in page
    listed = re.findall(r"^\| `(\w+)` \| ([a-z0-9 ]+) \|", page.partition("metadata")[0], re.MULTILINE)
    for logp, name in ((pa.float32(), "float"), (pa.float16(), "halffloat")):
        kinds = {"list of float or halffloat": f"list<element: {name}>", "list of int32": "list<element: int32>"}
        fields = [(field.name, str(field.type).replace("item:", "element:")) for field in score_files.fields(logp, True)]
        assert [(column, kinds.get(kind, kind)) for column, kind in listed] == fields
    assert score_files.fields(None) == score_files.fields(pa.float32())[:-3]
    assert score_files.fields(None, True) == score_files.fields(pa.float32(), True)[:-4]


def test_the_guides_lines_filter_weigh_and_refer(recipe, double_checkpoint, tokenizer, tmp_path, monkeypatch):
    main(["diagnose", "--config", str(recipe), "--scores", str(tmp_path / "out" / "scores"), "--tokens"])
    shutil.copytree(recipe.parent / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    means = sorted(loaded(tmp_path / "out")["mean_p"])
    names, some = {}, (means[9] + means[10]) / 2
    for snippet in re.findall(r"```python\n(.*?)```", (DOCS / "guide" / "scores.md").read_text(), re.DOTALL):
        exec(snippet.replace(">= 0.1]", f">= {some}]"), names)
    scores, weighted = names["scores"], names["weighted"]
    assert (len(weighted), weighted["objective_weight"][:]) == (20, scores["mean_p"][:])
    assert len(names["likely"]) == 10
    assert all(row in list(names["data"]) for row in names["likely"])
    model = AutoModelForCausalLM.from_pretrained(double_checkpoint)
    arguments = {"objective": "psft", "per_device_train_batch_size": 1}
    trainer = train(bl_trainer.BLTrainer, tokenizer, names["with_reference"], tmp_path, model=model, **arguments)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(-1, abs=1e-6)  # the ratio to the model itself
