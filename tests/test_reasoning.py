"""Reasoning is taken off every answer, by one function, before any task grades it; the report counts what is unfinished."""

import json

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("math_verify")
from transformers import AutoTokenizer

from bl_trainer.evaluation import EvaluateArguments, evaluate
from bl_trainer.evaluation.completion import score
from bl_trainer.evaluation.grading import grade_letter, grade_math, grade_word, split_reasoning
from test_evaluation import scripted, write_rows

CHAT = "{% for m in messages %}{{ m.role[0] }}{{ LEAD if m.role == 'assistant' else '' }}{{ m.content }}<turn>{% endfor %}"
ASK = "{% if add_generation_prompt %}a{% endif %}"
LEAD = "<think>- 1</think>="  # more tokens than `figfont` has for an answer


@pytest.mark.parametrize(
    ("answer", "prompt", "said"),
    [
        ("no block  ", "", ("no block  ", True)),
        ("<think>a</think>\n\nb", "", ("b", True)),
        ("<think>\n\n</think>\n\nb", "", ("b", True)),
        ("<think>a</think>", "", ("", True)),
        ("<think>a", "", ("", False)),
        ("first <think>a", "", ("first", False)),
        ("<think>a</think>b<think>c</think>d", "", ("bd", True)),
        ("<think>a</think>b<think>c", "", ("b", False)),
        ("a</think>b", "", ("b", True)),
        ("a</think>b", "question <think>\n", ("b", True)),
        ("a", "question <think>\n", ("", False)),
        ("a", "what does <think> mean?", ("a", True)),
        ("a", "<think>\n\n</think>\n\n", ("a", True)),
        ("[THINK]a[/THINK]b", "", ("b", True)),
        ("<thinking>a</thinking>b", "", ("b", True)),
        ("[think]a[/think]b", "", ("b", True)),
        ("<THINK>a", "", ("", False)),
        ("<THINK>a</THINK>b", "", ("b", True)),
        ("<think >a", "", ("", False)),
        ("<think >a</ think>b", "", ("b", True)),
        ("<longcat_think>a</longcat_think>b", "", ("b", True)),
        ("<longcat_think>a", "", ("", False)),
        ("<seed:think>a</seed:think>b", "", ("b", True)),
        ("<|thinking|>a", "", ("", False)),
        ("<|thinking|>a<|/thinking|>b", "", ("b", True)),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "", ("b", True)),
        ("<|START_THINKING|>a<|END_THINKING|>b", "", ("b", True)),
        ("<|START_THINKING|>a", "", ("", False)),
        ("<analysis>a", "", ("", False)),
        ("<analysis>a</analysis>b", "", ("b", True)),
        ("<scratchpad>a", "", ("", False)),
        ("<scratchpad>a</scratchpad>b", "", ("b", True)),
        ("<think>a<analysis>b</analysis>c", "", ("", False)),
        ("<think>a<analysis>b</analysis>c</think>d", "", ("d", True)),
        ("a</analysis>b", "question <think>\n", ("", False)),
        ("a</think >b", "question <THINK >\n", ("b", True)),
        ("a", "question <|channel|>analysis<|message|>", ("", False)),
        ("<|channel|>analysis<|message|>a", "", ("", False)),
        ("<|channel|>analysis<|message|>a<|end|>", "", ("", False)),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>", "", ("b", True)),
        ("<|channel|>commentary<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "", ("b", True)),
        ("<|channel|>final<|message|>b", "", ("b", True)),
        ("analysisWe see a", "", ("", False)),
        ("analysisWe see a.assistantfinalb", "", ("b", True)),
        ("analysis of a", "", ("analysis of a", True)),
        ("the assistant final a", "", ("the assistant final a", True)),
        ("a <no_think> b", "", ("a <no_think> b", True)),
        ("a < think > 2", "", ("a < think > 2", True)),
        ("x <thinker> y", "", ("x <thinker> y", True)),
    ],
)
def test_reasoning_is_split_off(answer, prompt, said):
    assert split_reasoning(answer, prompt) == said


def test_every_grader_leaves_reasoning_out():
    for block, is_right in (("<think>\\boxed{B} word</think>\n", 1), ("<think>", 0)):
        assert grade_math({"gold": "7"}, [block + "\\boxed{7}"]) == {"accuracy": is_right}
        assert grade_letter({"gold": "A", "choices": ["x", "y"]}, [block + "The answer is A."]) == {"accuracy": is_right}
        assert grade_word({"gold": "WORD"}, [block + "WORD"])["exact_match"] == is_right
        assert score({"prompt": "p", "completion": "WORD"}, [block + "WORD"])["exact_match"] == is_right
    assert score({"prompt": "p", "completion": "<think>a</think>b"}, ["<think>c</think>b"])["exact_match"] == 1


def evaluated(folder, template, said, task, row):
    scripted(folder / "model", said, template, tags=["<think>", "</think>"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.chat_template == template
    data = write_rows(folder / "test.jsonl", [row])
    options = {"model": [str(folder / "model")], "tasks": [task], "data": [f"{task}={data}"], "output": str(folder / "out")}
    (entry,) = evaluate(EvaluateArguments(**options))["evaluations"]
    return entry


MESSAGES = {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "WORD"}]}


@pytest.mark.parametrize(("task", "row"), [("figfont", {"question": "b", "answer": "WORD"}), ("completion", MESSAGES)])
def test_empty_block_of_the_template_leaves_room_for_the_answer(task, row, tmp_path, capsys):
    template = CHAT.replace("LEAD", f"'{LEAD}'") + ASK
    entry = evaluated(tmp_path, template, f"a{LEAD}WORD<turn>", task, row)
    assert {score["value"] for score in entry["scores"]} == {1.0}
    assert {(score["empty"], score["unfinished"]) for score in entry["scores"]} == {(0, 0)}
    assert "unfinished reasoning" not in capsys.readouterr().out


def test_report_counts_unfinished_reasoning(tmp_path, capsys):
    template = CHAT.replace("LEAD", "''") + "{% if add_generation_prompt %}a<think>{% endif %}"
    entry = evaluated(tmp_path, template, "<think>WORD: 1<turn>", "figfont", {"question": "b", "answer": "WORD: 1"})
    (sample,) = (tmp_path / "out" / entry["scores"][0]["samples"]).read_text().splitlines()
    assert json.loads(sample)["answer"] == "WORD: 1"
    assert [(score["value"], score["empty"], score["unfinished"]) for score in entry["scores"]] == [(0, 0, 1)] * 3
    out = capsys.readouterr().out
    assert out.count("1 of 1") == 3
    assert "items  unfinished reasoning" in out
