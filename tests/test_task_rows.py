"""Rows of `--data`: every row, every column and every character of the file reaches the task."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from bl_trainer.errors import RecipeError

pytest.importorskip("lm_eval")
from bl_trainer.evaluation.data import task_splits
from bl_trainer.evaluation.grading import letter_docs

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
