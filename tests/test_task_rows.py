"""Rows of `--data`: every row, every column and every character of the file reaches the task."""

import json
import math
import re
from decimal import Decimal
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from bl_trainer.errors import RecipeError

pytest.importorskip("lm_eval")
from bl_trainer.evaluation.data import task_splits, with_data
from bl_trainer.evaluation.generation import Generation
from bl_trainer.evaluation.grading import letter_docs
from bl_trainer.evaluation.grading.docs import gold_text
from bl_trainer.evaluation.grading.words import word_docs

BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # at all of which `str.splitlines` splits


def read(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return task_splits(path)["test"]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["bare", "with a byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_lines_end_at_line_ends_alone(end, mark, tmp_path):
    rows = [{"question": f"a{each}b", "answer": "A"} for each in BREAKS if each >= " "] + [{"question": "c", "answer": "B"}]
    assert read(tmp_path / "rows.jsonl", mark + lines(rows).replace("\n", end)).to_list() == rows
    assert read(tmp_path / "rows.json", mark + json.dumps(rows, ensure_ascii=False)).to_list() == rows


def test_columns_that_the_first_row_lacks_are_kept(tmp_path):
    rows = [
        {"question": "a", "answer_idx": "A"},
        {"question": "b", "answer_idx": "B", "options": {"A": "x", "B": "y"}, "source": "s"},
        {"question": "c", "answer_idx": "B", "options": {"A": "x", "B": "y", "C": "z"}},
    ]
    for name, content in (("rows.jsonl", lines(rows)), ("rows.json", json.dumps(rows))):
        made = read(tmp_path / name, content)
        assert made["source"] == [None, "s", None]
        assert [doc["question"] for doc in letter_docs(made)] == ["a", "b\nA. x\nB. y", "c\nA. x\nB. y\nC. z"]


def test_rows_of_sources_keep_their_columns(tmp_path):
    made = read(tmp_path / "rows.json", json.dumps({"one": [{"question": "a"}], "two": [{"question": "b", "options": ["x"]}]}))
    assert made.to_list() == [
        {"question": "a", "source": "one", "options": None},
        {"question": "b", "source": "two", "options": ["x"]},
    ]


def test_a_file_of_one_row_is_that_row(tmp_path):
    row = {"prompt": [{"role": "user", "content": "a"}], "answer": ["b"]}
    assert read(tmp_path / "rows.jsonl", lines([row])).to_list() == [row]
    assert read(tmp_path / "rows.json", json.dumps(row)).to_list() == [row]
    assert read(tmp_path / "lists.jsonl", lines([{"options": [], "answer": ["A"]}])).column_names == ["options", "answer"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", "[]", "it is empty."),
        ("rows.json", "{}", "it is empty."),
        ("rows.json", '{"a": []}', "it is empty."),
        ("rows.jsonl", "\n", "it is empty."),
        ("rows.json", "[1, 2]", "it holds '1' where a row should be."),
        ("rows.json", '{"question": ["a"], "answer": ["b"]}', "it holds 'a' where a row should be."),
        ("rows.jsonl", lines([{"answer": 5}, {"answer": "b"}]), "its column 'answer' mixes types"),
        ("rows.jsonl", lines([{"question": "a"}, {"question": ["b"]}]), "its column 'question' mixes types"),
    ],
)
def test_what_is_no_rows_is_refused(name, content, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        read(tmp_path / name, content)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_without_rows_are_refused(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    path.write_text("question,answer\n")
    if kind == "parquet":
        pa.parquet.write_table(pa.table({"question": pa.array([], pa.string())}), path)
    with pytest.raises(RecipeError, match="it is empty"):
        task_splits(path)


# --- Right options, keys and gold answers that can be read in two ways, or in none ---

TYPES = ["O", "A", "B", "AB"]
NUMBERS = ["3", "0", "1"]


def lettered(**row):
    return letter_docs(Dataset.from_list([{"question": "Which?", **row}]))[0]["gold"]


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"options": TYPES, "answer_idx": "A", "answer": "O"}, "A"),
        ({"options": TYPES, "answer_letter": "b", "answer": "A"}, "B"),
        ({"options": TYPES, "answer_idx": "(B)", "answer": "It is A, since B is wrong."}, "B"),
        ({"options": TYPES, "answer_idx": 3, "answer": "AB"}, "D"),
        ({"options": dict(zip("ABCD", TYPES, strict=True)), "answer_idx": "B"}, "B"),
        ({"options": TYPES, "answer": "AB"}, "D"),
        ({"options": TYPES, "answer": "D"}, "D"),
        ({"options": ["A", "B"], "answer": "B"}, "B"),
        ({"options": NUMBERS, "answer_idx": "1"}, "B"),
        ({"options": NUMBERS, "answer_idx": "1", "answer": "0"}, "B"),
        ({"options": {"1": "2", "2": "1"}, "answer_idx": "1", "answer": "2"}, "A"),
        ({"options": ["x", "y"], "answer": "A. x"}, "A"),
        ({"options": ["x", "y"], "answer": "(B) Y."}, "B"),
        ({"options": ["x", "y"], "answer": "B) y, not x"}, "B"),
        ({"options": ["x", "y", "z"], "answer": "A. x is wrong.\nB. y is wrong.\nThe answer is \\boxed{C}."}, "C"),
        ({"options": ["x", "y", "z"], "answer_idx": "C", "answer": "A. x is wrong, and so is y."}, "C"),
        ({"options": [".5", "5"], "answer": "B. 5"}, "B"),
        ({"options": ["B. cereus", "E. coli"], "answer": "B. cereus"}, "A"),
        ({"options": ["A. x", "B. y"], "answer": "B. y"}, "B"),
        ({"answer_idx": "B", "answer": "B"}, "B"),
    ],
)
def test_a_right_option_is_read_by_its_column(row, gold):
    assert lettered(**row) == gold


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"options": TYPES, "answer": "A"}, "row 1: the gold answer 'A' is the letter of 'O', and the text of another option."),
        ({"options": {"A": "B", "B": "A"}, "answer": "A"}, "is the letter of 'B', and the text of another option."),
        ({"options": TYPES, "answer_idx": "AB"}, "`answer_idx` is 'AB', the text of an option. Write its letter"),
        (
            {"options": TYPES, "answer_idx": "B", "answer": "O"},
            "`answer_idx` is 'B', and `answer` is 'O', another option. Corr",
        ),
        ({"options": TYPES, "answer_idx": "B", "answer_letter": "C"}, "`answer_idx` is 'B', and `answer_letter` is 'C', anoth"),
        (
            {"options": ["x", "y"], "answer_idx": 1, "answer": "x"},
            "another option. A number counts from 0. Correct one of them.",
        ),
        ({"options": ["x", "y"], "answer_idx": "A", "answer": "B. y"}, "another option"),
        ({"answer_idx": "A", "answer": "B"}, "another option"),
        ({"options": ["x", "y"], "answer": "A. y"}, "the gold answer 'A. y' has the letter of 'x', and another text."),
        ({"options": ["x", "x y"], "answer": "A. x y"}, "has the letter of 'x', and another text."),
        ({"options": ["x", "y"], "answer": "A. y\nIt is."}, "has the letter of 'x', and another text."),
        ({"options": [".5", "5"], "answer": "A. 5"}, "has the letter of '.5', and another text."),
        ({"options": ["1", "2"], "answer": "A. 1.5"}, "has the letter of '1', and another text."),
        ({"options": ["x", "y"], "answer_idx": "A: y"}, "has the letter of 'x', and another text."),
        ({"options": '{"A": "x", "A": "y"}', "answer": "A"}, "the key 'A' is there more than once, with 'x' and 'y'. Keep one"),
    ],
)
def test_a_right_option_that_may_be_another_one_is_refused(row, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        lettered(**row)


TWICE = [
    ("rows.jsonl", '\n{"question": "q"}\n{"answer": "1", "answer": "2"}\n', "line 3: the key 'answer' is there more than once"),
    ("rows.json", '{"answer": "1"}\n{"answer": "1", "answer": "2"}\n', "line 2: the key 'answer' is there more than once"),
    ("rows.json", '[{"answer": "1", "answer": "2"}]', "the key 'answer' is there more than once, with '1' and '2'. Keep one"),
    ("rows.json", '{"a": [{"question": "q"}], "a": [{"question": "r"}]}', "the key 'a' is there more than once"),
    (
        "rows.jsonl",
        '{"options": {"A": "x", "A": "y", "B": "z"}}',
        "line 1: the key 'A' is there more than once, with 'x' and 'y'",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), TWICE)
def test_keys_that_are_there_twice_are_refused(name, content, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        read(tmp_path / name, content)


@pytest.mark.parametrize(
    "row", ['{"prompt": "p", "prompt": "q", "completion": "c"}', '{"prompt": "p", "completion": "c", "x": {"y": 1, "y": 2}}']
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_keys_that_are_there_twice_are_refused_where_datasets_reads(name, row, tmp_path):
    (tmp_path / name).write_text(f"[{row}]" if name == "rows.json" else row)
    with pytest.raises(RecipeError, match="is there more than once, with"):
        with_data({}, "completion", tmp_path / name)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" 5 ", "5"), (5, "5"), (27.0, "27"), (0.5, "0.5"), (Decimal("1.50"), "1.50"), (["1", "2"], "1, 2"),
        ([1, 2.5], "1, 2.5"), (None, ""), ([], ""), ("NaN", "NaN"), ([{"role": "assistant", "content": "5"}], "5"),
    ],
)  # fmt: skip
def test_gold_answers(value, text):
    assert gold_text(value) == text


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, True, {"v": "1"}, [["1"], ["2"]], ["1", None], [math.nan], [False], [{"role": "a"}], ["1", {"v": 1}],
     [{"content": None}], b"1"],
)  # fmt: skip
def test_what_is_no_gold_answer_is_refused(value):
    with pytest.raises(ValueError, match=r"the gold answer is .*\. Write a text"):
        gold_text(value)


def test_a_gold_answer_of_the_wrong_type_names_its_row(tmp_path):
    made = read(tmp_path / "rows.jsonl", '{"question": "a", "answer": 1}\n{"question": "b", "answer": NaN}\n')
    with pytest.raises(RecipeError, match=r"row 2: the gold answer is or holds nan, of type float. Write a text, a finite"):
        word_docs(made)


def test_a_grader_that_fails_names_the_task_the_row_and_the_answer():
    def fail(doc, results):
        raise ZeroDivisionError("by zero")

    task = object.__new__(Generation)
    task._config = SimpleNamespace(process_results=fail, task="mine", test_split="test")
    task.__dict__["_test_docs"] = [{"question": "a"}, {"question": "b"}]
    message = r"Cannot grade row 2 of 'mine', with the answer 'x{80}\.\.\.': ZeroDivisionError: by zero\."
    with pytest.raises(RecipeError, match=message) as caught:
        task._graded({"question": "b"}, "x" * 100)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
