"""Bad input of every kind, for each verb: one sentence and exit code 2, with nothing written."""

import json
import shutil

import datasets
import pytest
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from bl_trainer.cli import main
from bl_trainer.recipe.datasets import load_dataset, load_mixture
from conftest import write_recipe
from preparing import ROWS

GOOD = json.dumps({"problem": "a", "solution": "b"}) + "\n"
MARK = b"\xef\xbb\xbf"  # a byte order mark


@pytest.fixture
def fails(capsys):
    """Returns a function that runs a verb and returns the one line with which it fails."""

    def fails(*argv):
        with pytest.raises(SystemExit) as caught:
            main([*map(str, argv)])
        assert caught.value.code == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert "BL_TRACEBACK" not in line  # which stands behind what is not foreseen
        return line

    return fails


# Sources of prepare-data: the file's name, what it holds, and what is said

SOURCES = [
    ("bad.jsonl", GOOD.encode() + b'{"problem": "\xff", "solution": "b"}\n', "bad.jsonl, line 2: byte 0xff is not UTF-8 text."),
    ("bad.json", b'[\n{"problem": "\xff", "solution": "b"}]', "bad.json, line 2: byte 0xff is not UTF-8 text."),
    ("bad.csv", b"problem,solution\na,\xffb\n", "bad.csv, line 2: byte 0xff is not UTF-8 text."),
    ("utf16.jsonl", GOOD.encode("utf-16"), "utf16.jsonl, line 1: byte 0xff is not UTF-8 text."),
    ("latin.csv", "problem,solution\né,b\n".encode("latin-1"), "latin.csv, line 2: byte 0xe9 is not UTF-8 text."),
    *((f"empty.{kind}", b"", f"empty.{kind}: it has no rows.") for kind in ("jsonl", "json", "csv")),
    ("empty.parquet", b"", "empty.parquet: it is no complete Parquet file."),
    ("mark.jsonl", MARK, "mark.jsonl: it has no rows."),
    ("blank.jsonl", b"\n \n", "blank.jsonl: it has no rows."),
    ("list.json", b"[]", "list.json: it has no rows."),
    ("header.csv", b"problem,solution\n\n", "header.csv: it has no rows."),
    ("torn.jsonl", GOOD.encode() + b'{"problem": "a", "sol', "torn.jsonl, line 2: Unterminated string starting at column 18."),
    ("zeros.jsonl", b"\0\0\0\n", "zeros.jsonl, line 1: Expecting value at column 1."),
    ("number.jsonl", b"5\n", "number.jsonl, line 1: it holds 5, not an object."),
    ("null.jsonl", b"null\n", "null.jsonl, line 1: it holds null, not an object."),
    ("text.jsonl", b'"x"\n', 'text.jsonl, line 1: it holds "x", not an object.'),
    ("wide.csv", b"problem,solution\na,b,c\n", "wide.csv, line 2: it has 3 values, the header 2. Quote values with commas."),
    ("type.jsonl", b'{"problem": 5, "solution": "b"}\n', "row 1 of train: 5 stands where a text should."),
    ("type.json", b'[{"problem": ["a"], "solution": "b"}]', "row 1 of train: ['a'] stands where a text should."),
    ("sheet.xlsx", b"x", "'.xlsx' is none of .jsonl, .json, .parquet, .csv, .txt"),
    ("words.txt", b"a\n", "has no column 'problem', 'solution'."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), SOURCES, ids=[name for name, *_ in SOURCES])
def test_source_that_cannot_be_read(name, content, message, fails, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert message in fails("prepare-data", "coding", "--output", tmp_path / "out", "--source", tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_source_that_cannot_be_opened(fails, tmp_path):
    (tmp_path / "rows" / "train.jsonl").mkdir(parents=True)
    argv = ("prepare-data", "coding", "--output", tmp_path / "out", "--source", tmp_path / "rows")
    assert "train.jsonl: Is a directory." in fails(*argv)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_byte_order_marks_are_read_over(kind, tmp_path):
    content = {"jsonl": GOOD, "json": f"[{GOOD}]", "csv": "problem,solution\na,b\n"}[kind]
    (tmp_path / f"rows.{kind}").write_bytes(MARK + content.encode())
    main(["prepare-data", "coding", "--output", str(tmp_path / "out"), "--source", str(tmp_path / f"rows.{kind}")])
    (row,) = load_dataset_of(tmp_path / "out")
    assert row["completion"] == [{"role": "assistant", "content": "b"}]


def test_a_name_is_not_taken_for_a_folder_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "elsewhere" / "my-data"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"prompt": "one", "completion": "two"}\n')
    assert load_dataset_of(folder)[0]["prompt"] == "one"
    monkeypatch.chdir(tmp_path)
    assert datasets.load_dataset("my-data")["train"][0]["prompt"] == "one"  # the fault is there
    with pytest.raises(
        FileNotFoundError, match=r"there is no file or folder my-data in .*, and the cache has one from elsewhere"
    ):
        load_dataset_of("my-data")
    with pytest.raises(FileNotFoundError, match="the cache has one from elsewhere"):
        load_mixture(DatasetMixtureConfig(datasets=[DatasetConfig(path="my-data")]), "text")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_dataset_of("my-data")[0]["prompt"] == "one"


def load_dataset_of(path):
    return load_dataset(ScriptArguments(dataset_name=str(path)))["train"]


@pytest.mark.parametrize("rows", ["hi,hello, world\n", "hi,hello, world\nhi,hello\n"], ids=["all", "the first"])
def test_values_without_a_header_are_not_moved_to_other_columns(rows, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + rows)
    with pytest.raises(ValueError, match="line 2: it has 3 values, the header 2"):
        load_dataset_of(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text('prompt,completion\nhi,"hello, world"\n')
    assert load_dataset_of(tmp_path / "rows.csv")[0] == {"prompt": "hi", "completion": "hello, world"}


TEXTS_OF_CSV = [["1+1", "2"], ["1+2", "3"], ["is it", "True"], ["n", "NA"], ["z", "007"], ["1", "null"]]


@pytest.mark.parametrize("where", ["file", "folder", "folder[1]", "streamed", "mixture", "files"])
@pytest.mark.parametrize("rows", [TEXTS_OF_CSV[:2], TEXTS_OF_CSV[2:3], TEXTS_OF_CSV], ids=["numbers", "truth", "all"])
def test_texts_of_csv_stay_texts(rows, where, tmp_path):
    folder = tmp_path / (where if where.startswith("folder") else "data")
    folder.mkdir()
    file = folder / "train.csv"
    file.write_text("prompt,completion,objective_weight\n" + "".join(f"{a},{b},0.5\n" for a, b in rows))
    if where in ("mixture", "files"):
        entry = {"path": str(file)} if where == "mixture" else {"path": "csv", "data_files": str(file)}
        loaded = load_mixture(DatasetMixtureConfig(datasets=[entry]), "text")
    else:
        name = str(folder if where.startswith("folder") else file)
        loaded = load_dataset(ScriptArguments(dataset_name=name, dataset_streaming=where == "streamed"))
    wanted = [{"prompt": a, "completion": b, "objective_weight": 0.5} for a, b in rows]
    assert list(loaded["train"]) == wanted


def test_empty_values_of_csv_are_null(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion,objective_weight\na,,\nb,c,1\n")
    first, second = load_dataset_of(tmp_path / "rows.csv")
    assert first == {"prompt": "a", "completion": None, "objective_weight": None}
    assert second["objective_weight"] == 1


def test_a_folder_of_csv_may_have_columns_in_one_split(tmp_path):
    (tmp_path / "train.csv").write_text("prompt,completion,objective_weight\n1,2,0.5\n")
    (tmp_path / "test.csv").write_text("prompt,completion\n1,2\n")
    loaded = load_dataset(ScriptArguments(dataset_name=str(tmp_path)))
    assert {split: [*rows] for split, rows in loaded.items()} == {
        "train": [{"prompt": "1", "completion": "2", "objective_weight": 0.5}],
        "test": [{"prompt": "1", "completion": "2"}],
    }


def test_csv_of_other_separators(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt;completion\na, b;c\n")
    with pytest.raises(ValueError, match=r"it has 2 values, the header 1\. Separate the header's names by commas"):
        load_dataset_of(tmp_path / "rows.csv")


CARDS = [
    "bl_trainer: 5",
    "bl_trainer: {settings: 5, revisions: {}, files: [], sha256: {}}",
    "bl_trainer: {settings: {}, revisions: {}, files: 5, sha256: {}}",
    "bl_trainer: {settings: {}, revisions: {}, sha256: {}}",
    "bl_trainer: {settings: {}, revisions: {}, files: [], sha256: 5}",
]


@pytest.mark.parametrize("card", CARDS)
def test_card_of_another_shape_is_no_data_set(card, fails, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS["coding"](0)) + "\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text(f"---\n{card}\n---\n")
    argv = ("prepare-data", "coding", "--output", tmp_path / "out", "--source", tmp_path / "rows.jsonl", "--overwrite")
    assert "is no finished data set" in fails(*argv)


# Evaluation

PAIR = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
ROWS_OF_A_TASK = [
    ("bad.jsonl", PAIR.encode() + b'{"prompt": "\xff"}\n', "bad.jsonl, line 2: byte 0xff is not UTF-8 text."),
    ("bad.csv", b"prompt,completion\na,\xff\n", "bad.csv, line 2: byte 0xff is not UTF-8 text."),
    ("empty.csv", b"", "empty.csv` is empty."),
    ("header.csv", b"prompt,completion\n", "header.csv` is empty."),
    ("empty.json", b"{}", "empty.json` is empty."),
    ("mark.jsonl", MARK, "mark.jsonl` is empty."),
    ("broken.parquet", b"PAR1", "broken.parquet: it is no complete Parquet file."),
    ("wide.csv", b"prompt,completion\na,b,c\n", "wide.csv, line 2: it has 3 values, the header 2."),
    ("number.json", b"5", "number.json, line 1: it holds 5, not an object."),
    ("deep.json", b"[" * 5000, "deep.json, line 1: its values are nested too deeply."),
    ("type.jsonl", PAIR.encode() + b'{"prompt": 5, "completion": "b"}\n', "type.jsonl, line 2: 'prompt' is 5, not a text"),
    ("numbers.csv", b"prompt,completion\na,007\n", "its column 'completion' holds numbers, not texts. Use a .jsonl file."),
]
TASK_FILES = [
    ("empty", b"", "Cannot read the task file {tmp}/empty.yaml: "),
    ("list", b"- a\n", "Cannot read the task file {tmp}/list.yaml: "),
    ("torn", b"task: [\n", "Cannot read the task file {tmp}/torn.yaml: "),
    ("bytes", b"task: \xff\n", "Cannot read the task file {tmp}/bytes.yaml: "),
    ("include", b"include: none.yaml\n", "Cannot read the task file {tmp}/include.yaml: "),
    ("code", b"task: x\nprocess_docs: !function none.read\n", "The task '{tmp}/code.yaml' can't be loaded: "),
]
ADAPTERS = [
    ("bytes", b"\xff", "The adapter_config.json of `--model {tmp}/bytes` can't be read: "),
    ("list", b"[]", "The adapter_config.json of `--model {tmp}/list` can't be read: "),
    ("torn", b"{", "The adapter_config.json of `--model {tmp}/torn` can't be read: "),
    ("number", b'{"base_model_name_or_path": 5}', "The adapter `--model {tmp}/number` names no base model."),
]
STORED = [
    b"", b"\xff", b"{", b"5", b"[]", b'{"evaluations": 5}', b'{"evaluations": [5]}', b'{"evaluations": {"a": 1}}',
    b'{"evaluations": [], "differences": 5}', b'{"evaluations": [], "differences": [5]}', b'{"evaluations": [{"task": 5}]}',
]  # fmt: skip
OPTIONS = [
    ("--limit x", "`--limit x` must be a number."),
    ("--seed 4294967296", "`--seed 4294967296` must be below 4294967296."),
    ("--batch_size 1.5", "`--batch_size 1.5` must be a number above 0, or auto."),
    ("--samples 1.5", "`--samples 1.5` must be a whole number."),
    ("--data completion=", "`--data completion=` must be task=path"),
]


@pytest.fixture
def evaluate(checkpoint, fails, tmp_path):
    """Returns a function that evaluates a good model on good rows but for what it is given."""
    pytest.importorskip("lm_eval")

    def evaluate(*argv):
        (tmp_path / "good.jsonl").write_text(PAIR)
        given = dict(zip(argv[::2], argv[1::2], strict=True))
        data = {"--data": f"completion={tmp_path}/good.jsonl"} if given.get("--tasks", "completion") == "completion" else {}
        good = {"--model": checkpoint, "--tasks": "completion", "--output": tmp_path / "out", **data}
        said = fails("evaluate", *(part for option in {**good, **given}.items() for part in option))
        assert not (tmp_path / "out").exists()
        return said

    return evaluate


@pytest.mark.parametrize(("name", "content", "message"), ROWS_OF_A_TASK, ids=[name for name, *_ in ROWS_OF_A_TASK])
def test_rows_that_cannot_be_evaluated(name, content, message, evaluate, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert message in evaluate("--data", f"completion={tmp_path / name}")


@pytest.mark.parametrize(("name", "content", "message"), TASK_FILES, ids=[name for name, *_ in TASK_FILES])
def test_task_files_that_cannot_be_read(name, content, message, evaluate, tmp_path):
    (tmp_path / f"{name}.yaml").write_bytes(content)
    assert message.format(tmp=tmp_path) in evaluate("--tasks", tmp_path / f"{name}.yaml")


@pytest.mark.parametrize(("name", "content", "message"), ADAPTERS, ids=[name for name, *_ in ADAPTERS])
def test_adapters_that_cannot_be_read(name, content, message, evaluate, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "adapter_config.json").write_bytes(content)
    assert message.format(tmp=tmp_path) in evaluate("--model", tmp_path / name)


@pytest.mark.parametrize("content", STORED)
def test_stored_results_that_are_none(content, evaluate, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_bytes(content)
    assert "holds a results.json of something else." in evaluate("--output", tmp_path / "mine")
    assert (tmp_path / "mine" / "results.json").read_bytes() == content


@pytest.mark.parametrize(("given", "message"), OPTIONS)
def test_options_that_evaluation_does_not_take(given, message, evaluate):
    assert message in evaluate(*given.split())


def test_a_chat_template_that_fails(checkpoint, evaluate, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    rows = tmp_path / "chat.jsonl"
    rows.write_text(json.dumps({"prompt": TURN, "completion": [{"role": "assistant", "content": "b"}]}) + "\n")
    said = evaluate("--model", model, "--data", f"completion={rows}")
    assert "The model's chat template doesn't take 'completion': never." in said


TURN = [{"role": "user", "content": "a"}]


# Sweeps

RANGE = "learning_rate: {low: 1.0e-5, high: 1.0e-3}\ntrials: 3\n"
SWEEP_FILES = [
    (b"", "must be a YAML mapping of keys to values, got NoneType."),
    (b"\xff", "Cannot read the sweep file"),
    (b"arms: [\n", "Cannot read the sweep file"),
    (b"arms: [{5: 6}]\n", "`arms: [{5: 6}]` must be a list of mappings of recipe keys."),
    (b"arms: [5]\n", "`arms: [5]` must be a list of mappings of recipe keys."),
    (b"arms:\n", "`arms: None` must be a list of mappings of recipe keys."),
    (b"arms: [{objective: 5}]\n", "`objective` must be a name or a mapping with `name`, got 5."),
    (b"arms: [{foo: 1}]\n", "Unknown recipe key 'foo'."),
    (b"5: [6]\n", "Unknown key 5 in the sweep file."),
    (b"dataset_name: [5]\n", "Cannot load `dataset_name: 5`"),
    (b"learning_rate: [x]\n", "`learning_rate: x` is of the wrong type"),
    (b"learning_rate: [.nan]\n", "`learning_rate: nan` must be a finite number."),
    (b"learning_rate: {low: 1.0, high: 2.0, log: maybe}\ntrials: 3\n", "is no range: `log: maybe` must be true or false"),
    (b"learning_rate: {low: a, high: b}\ntrials: 3\n", "is no range: could not convert string to float: 'a'"),
    (b"seed: {low: 0, high: 5}\ntrials: 3\n", "must be a list of whole numbers. Write e.g. `seed: [0, 1, 2]`."),
    (b"seed: [4294967296]\n", "`seed: [4294967296]` must be a list of different whole numbers, from 0 and below 4294967296."),
    (b"seed: [true, false]\n", "`seed: [True, False]` must be a list of different whole numbers"),
    (b"held_out: ''\n", "`held_out: ` must be a text."),
    (b"evaluate: {5: 6}\n", "`evaluate` has no option 5."),
    (f"sampler: []\n{RANGE}".encode(), "`sampler: []` must be a name, or a mapping"),
]  # fmt: skip
SIGNATURES = [b"\xff", b"{", b"5", b"[]", b'{"schema": 1}', b'{"schema": 1, "parts": []}']
HELD_OUT = [
    (b"", "test.jsonl: it has no rows."),
    (b"\xff\n", "test.jsonl, line 1: byte 0xff is not UTF-8 text."),
    (PAIR.encode() + b"{\n", "test.jsonl, line 2: Expecting property name enclosed in double quotes at column 2."),
]


@pytest.fixture
def sweep(checkpoint, data_folder, fails, tmp_path):
    """Returns a function that sweeps a good recipe by a sweep file and options, and fails."""
    pytest.importorskip("optuna")

    def sweep(content=b"arms: [{objective: nll}]\n", options=(), **changes):
        write_recipe(tmp_path, checkpoint, data_folder, **changes)
        (tmp_path / "sweep.yaml").write_bytes(content)
        said = fails("sweep", "--config", tmp_path / "recipe.yaml", "--sweep", tmp_path / "sweep.yaml", *options)
        assert not (tmp_path / "out-sweep").exists()
        return said

    return sweep


@pytest.mark.parametrize(("content", "message"), SWEEP_FILES, ids=[str(content[:30]) for content, _ in SWEEP_FILES])
def test_sweep_files_that_mean_nothing(content, message, sweep):
    assert message in sweep(content)


@pytest.mark.parametrize("content", SIGNATURES)
def test_a_folder_of_another_sweep(content, sweep, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sweep.json").write_bytes(content)
    assert "Cannot read" in sweep(options=("--sweep_dir", tmp_path / "mine", "--dry_run", "true"))
    assert (tmp_path / "mine" / "sweep.json").read_bytes() == content


@pytest.mark.parametrize(("content", "message"), HELD_OUT)
def test_held_out_data_that_cannot_be_read(content, message, sweep, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text(PAIR * 2)
    (tmp_path / "rows" / "test.jsonl").write_bytes(content)
    assert message in sweep(dataset_name=str(tmp_path / "rows"))


def test_places_where_no_sweep_can_be(sweep, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "deep"):
        assert f"Cannot write to `--sweep_dir {folder}`: it is a file, or in one." in sweep(options=("--sweep_dir", folder))
    assert "Cannot read `--launch '`: No closing quotation." in sweep(options=("--launch", "'"))
