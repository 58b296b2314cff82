"""Layouts of multiple-choice options: each gives the same prompt and the same gold letter, or is refused in a sentence."""

import json

import pytest
from datasets import Dataset

pytest.importorskip("lm_eval")
from bl_trainer.evaluation.choices import read_choices
from bl_trainer.evaluation.grading import letter_docs

TEXTS = ["rest", "work", "sleep", "2"]
LABELS = {"letters": "ABCD", "small": "abcd", "one": "1234", "zero": "0123", "roman": ["i", "ii", "iii", "iv"]}
LAYOUTS = {
    "mapping": lambda labels: dict(zip(labels, TEXTS, strict=True)),
    "pairs": lambda labels: [{"key": label, "value": text} for label, text in zip(labels, TEXTS, strict=True)],
    "labelled": lambda labels: [{"text": text, "label": label} for label, text in zip(labels, TEXTS, strict=True)],
    "identified": lambda labels: [{"id": label, "text": text} for label, text in zip(labels, TEXTS, strict=True)],
    "columns": lambda labels: {"text": TEXTS, "label": list(labels)},
}


def asked(options, right, column="options"):
    return letter_docs(Dataset.from_list([{"question": "Which?", column: options, "answer": right}]))[0]


@pytest.mark.parametrize("form", [lambda options: options, json.dumps], ids=["as it is", "JSON text"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_the_list_with_the_right_place(layout, labels, form):
    for place, label in enumerate(LABELS[labels]):
        doc = asked(form(LAYOUTS[layout](LABELS[labels])), label)
        assert doc["question"] == "Which?\nA. rest\nB. work\nC. sleep\nD. 2"
        assert (doc["choices"], doc["gold"]) == (TEXTS, "ABCD"[place])


def test_a_number_is_a_label_where_labels_are_numbers_and_a_place_elsewhere():
    assert asked(LAYOUTS["mapping"]("1234"), 2)["gold"] == "B"
    assert asked(LAYOUTS["mapping"]("0123"), 2)["gold"] == "C"
    assert asked(LAYOUTS["mapping"]("ABCD"), 2)["gold"] == "C"
    assert asked(TEXTS, 2)["gold"] == "C"
    assert asked(TEXTS, "2")["gold"] == "D"  # the option's text


def test_labels_are_in_the_order_of_numbers():
    texts, labels = read_choices({str(i): f"text {i}" for i in (10, 2, 1)})
    assert (texts, labels) == (["text 1", "text 2", "text 10"], ["1", "2", "10"])


def test_the_other_column_of_options_is_read():
    assert asked({"text": TEXTS, "label": list("ABCD")}, "C", column="choices")["gold"] == "C"


def test_a_row_with_fewer_labels_has_no_options_of_other_rows():
    rows = [{"question": "a", "options": dict(zip(labels, TEXTS, strict=False)), "answer": "B"} for labels in ("ABCD", "AB")]
    assert letter_docs(Dataset.from_list(rows))[1]["question"] == "a\nA. rest\nB. work"


@pytest.mark.parametrize(
    ("options", "right", "message"),
    [
        (LAYOUTS["mapping"]("1234"), "0", "row 1: the gold answer '0' is none of the options 1, 2, 3, 4."),
        (LAYOUTS["mapping"]("1234"), "A", "the gold answer 'A' is none of the options 1, 2, 3, 4."),
        (LAYOUTS["pairs"]("ABDE"), "C", "the gold answer 'C' is none of the options A, B, D, E."),
        (LAYOUTS["mapping"](["i", "ii", "iii", "iv"]), "(B)", "none of the options i, ii, iii, iv."),
        (
            [{"letter": "A", "content": "rest"}],
            "A",
            "one of its options is {'.*'}. Write texts, or mappings with key and value",
        ),
        ([["rest"], ["work"]], "A", r"one of its options is \['rest'\], not a text."),
        ({"A": ["rest"], "B": ["work"]}, "A", r"one of its options is \['rest'\], not a text."),
        (["rest", None], "A", "one of its options is None, not a text."),
        ("rest, work", "A", "its options are a text that is not JSON"),
        ("5", "A", "its options are 5. Write a list of texts"),
        (["a"] * 27, "A", "it has 27 options. At most 26 have a letter."),
        ([{"key": "A", "value": "rest"}, {"key": "a", "value": "work"}], "A", "two options have the same label: A, a."),
        ({"label": ["A"], "text": ["rest", "work"]}, "A", r"its options have 2 texts, and other labels: \['A'\]."),
    ],
)
def test_what_is_no_layout_is_refused(options, right, message):
    with pytest.raises(ValueError, match=message):
        asked(options, right)
