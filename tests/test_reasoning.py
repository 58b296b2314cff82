"""Reasoning is taken off every answer, by one function, before any task grades it; the report counts what is unfinished."""

import json

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("math_verify")
from transformers import AutoTokenizer

from bl_trainer.evaluation import EvaluateArguments, evaluate
from bl_trainer.evaluation.completion import score
from bl_trainer.evaluation.grading import grade_letter, grade_math, grade_word, letter, split_reasoning
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


# What stands around an answer: turns that run on, steps and options that are cut short, lists, and other announcements

DRUGS = ["Aspirin", "Insulin therapy", "Metformin", "Warfarin"]
ENDS = ["</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|im_start|>user\n"]
TURNS = ["\nUser: ", "\n\nHuman: ", "\n\nQuestion: ", "\n### Instruction:\n", "\n**Human:** "]


@pytest.mark.parametrize("turn", [*ENDS, *TURNS])
def test_next_turns_are_no_part_of_an_answer(turn):
    assert letter(f"The answer is C{turn}And now? The answer is B.", DRUGS) == "C"
    assert grade_math({"gold": "18"}, [f"The answer is 18{turn}And now? The answer is 5."])["accuracy"] == 1
    assert grade_math({"gold": "18"}, [f"So she has 18{turn}And now? So he has 5."])["accuracy"] == 1
    assert grade_math({"gold": "18"}, [f"So \\boxed{{18}}{turn}And now? \\boxed{{5}}"])["accuracy"] == 1


@pytest.mark.parametrize("turn", ["\nQ: ", "\n\nProblem: ", "\nProblem 3: ", "\n## Problem 2\n", "\nQuestion: ", "\n\nuser\n"])
def test_next_problems_end_an_answer_that_is_final(turn):
    assert letter(f"The answer is C.{turn}And now?\nA: The answer is B.", DRUGS) == "C"
    for said, other in (("The answer is 18.", "The answer is 6."), ("#### 18", "#### 5"), ("\\boxed{18}", "\\boxed{7}")):
        assert grade_math({"gold": "18"}, [f"{said}{turn}And now?\nassistant\n{other}"])["accuracy"] == 1
    assert grade_math({"gold": "18"}, [f"Let me begin.{turn}And now?\n\\boxed{{18}}"])["accuracy"] == 1


@pytest.mark.parametrize("turn", ENDS)
def test_special_tokens_end_answers_of_every_kind(turn):
    assert grade_math({"gold": "18"}, [f"\\boxed{{18}}{turn}\\boxed{{5}}"])["accuracy"] == 1
    assert grade_word({"gold": "WORD"}, [f"WORD{turn}"])["exact_match"] == 1


@pytest.mark.parametrize(
    "said",
    [
        "Question: which?\nThe answer is C",
        "User: which?\nThe answer is C",
        "\n\nHuman: which?\nThe answer is C",
        "Let me restate it.\n\nQuestion: which?\n\nAnswer: C",
        "The user: a patient.\nThe answer is C",
    ],
)
def test_answers_may_begin_with_the_question(said):
    assert letter(said, DRUGS) == "C"


@pytest.mark.parametrize(
    ("gold", "said", "right"),
    [
        ("2", "1. 3+4=7\n2.", 0),
        ("3", "1. a\n2. b\n\n**3.**", 0),
        ("2", "2.", 1),
        ("2", "The result:\n2.", 1),
        ("18", "1. 16-7=9\n18.", 1),
        ("3", "Step 1: 2+2=4\nStep 2: 4+4=8\n\nStep 3", 0),
        ("3", "Step 1: 2+2=4\n\n**Step 3:**", 0),
        ("3", "### Step 3: Compute the total", 0),
        ("8", "Step 3: 4+4=8", 1),
        ("2", "We have Case 2:", 0),
        ("5", "In Case 2 we have 5.", 1),
        ("5", "In this case 5 apples are left.", 1),
        ("3", "The answer to Part 2 is 3.", 1),
        ("16", "She starts with 16 eggs and", 0),
        ("7", "The distance is 7 times the", 0),
        ("7", "So we have 7 +", 0),
        ("8", "2*4=8*", 0),
        ("8", "*8*", 1),
        ("8", "So **x = 8**", 1),
        ("20", "The total cost is $20/-", 1),
    ],
)
def test_steps_that_are_cut_short_state_no_value(gold, said, right):
    assert grade_math({"gold": gold}, [said])["accuracy"] == right


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Let's analyze each option.\n\nA. Aspirin", None),
        ("Let's analyze each option.\n\n**A. Aspirin**\n- used for pain\n- cheap", None),
        ("Let me consider each:\nA) Aspirin - used for pain.\nB) Insulin", None),
        ("Let's analyze each option to find the correct answer:\n\n**A. Aspirin**: an NSAID\n\n**B. Insulin", None),
        ("**Option A:** Aspirin is used", None),
        ("**Option A:** Aspirin is used for pain.\n**Option B:** Insulin therapy is", None),
        ("First, option A.", None),
        ("A. Aspirin", "A"),
        ("A: Aspirin is the drug of choice.", "A"),
        ("**Option A:** Aspirin", "A"),
        ("Option A: Aspirin is the best choice.", "A"),
        ("Option C: Metformin is the first-line therapy.", "C"),
        ("After considering each option:\nA. Aspirin", "A"),
        ("Let me give the answer:\nA. Aspirin", "A"),
        ("Let me check the answer: C", "C"),
        ("Let's think step by step. It is diabetes.\n\nC. Metformin", "C"),
        ("Let's evaluate the options. It is diabetes, so metformin.\n\nC. Metformin", "C"),
        *(
            (f"Let's analyze each option.\n\nA. Aspirin: pain.\nB. Insulin therapy: type 1.\nC. Metformin: {last}", "C")
            for last in ("type 2.\nD. Warfarin: clots.\n\nC", "type 2.\nD. Warfarin: clots.\n\n**C**", "correct.")
        ),
        ("**Option A:** Aspirin is used for pain.\n**Option B:** Insulin therapy is not.\n\nThe answer is C.", "C"),
    ],
)
def test_an_analysis_that_is_cut_short_settles_on_no_option(said, right):
    assert letter(said, DRUGS) == right


@pytest.mark.parametrize(
    ("gold", "said", "right"),
    [
        ("3", "The roots are 2 and 3.", 0),
        ("2,3", "The roots are 2 and 3.", 1),
        ("-5", "The solutions are x = 5 and x = -5.", 0),
        ("5,-5", "The solutions are x = 5 and x = -5.", 1),
        ("5,-5", "So x = 5 or x = -5.", 1),
        ("5,-5", "So x = 5 or -5.", 1),
        ("0.5", "So x = 1/2 or 0.5", 1),
        ("3", "So x = 5 and y = 3.", 1),
        ("3", "the numbers are 1, 2, 3.", 0),
        *(("1,2,3", f"the numbers are {listed}.", 1) for listed in ("1, 2, 3", "1,2,3", "1, 2 and 3", "1, 2, and 3")),
        ("1234", "The apples are 1,234.", 1),
        ("3,4", "The lengths are 3 cm and 4 cm.", 1),
        ("3", "There are 5 red and 3 blue.", 1),
        ("3", "The ratio is 2 to 3.", 0),
        *(("2:3", f"The ratio is {ratio}.", 1) for ratio in ("2 to 3", "$2$ to $3$", "2:3")),
        ("3", "from 2 to 3", 0),
        ("3", "It rises from $2$ to $3$.", 0),
        ("5", "We round 4.7 to 5.", 1),
    ],
)
def test_lists_and_ranges_in_prose_are_no_single_value(gold, said, right):
    assert grade_math({"gold": gold}, [said])["accuracy"] == right


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("D is more appropriate than A, but less than C.", None),
        ("D is better than A, but not as good as C.", None),
        ("D is better than A but worse than C.", None),
        ("D is more appropriate than A.", "D"),
        ("C is more appropriate than A, but it is also less expensive.", "C"),
        ("C is better than A, but B is less effective.", "C"),
        ("A is the best for pain, but this is diabetes: C.", "C"),
        ("A would be correct if pain; here C is correct.", "C"),
        ("However, looking at the options: A. Aspirin is weak", None),
    ],
)
def test_options_that_are_compared(said, right):
    assert letter(said, DRUGS) == right


@pytest.mark.parametrize(
    "said",
    [
        *(
            "\u7b54\u6848\uff1aC",
            "\u7b54\u6848\u662fC\u3002",
            "\uc815\ub2f5\uc740 C\uc785\ub2c8\ub2e4.",
            "\u041e\u0442\u0432\u0435\u0442: C",
        ),
        *("La respuesta correcta es C.", "Die richtige Antwort ist C.", "La r\u00e9ponse est C."),
        *("=> C", "It is diabetes.\n=> C", "Answer \u2192 C", "Answer => C", "Ans. C", "Ans C"),
        *("Probably C.", "Most likely C.", "I think C.", "I believe C because it is diabetes."),
        "I would pick A or C; leaning towards C.",
    ],
)
def test_announcements_of_letters(said):
    assert letter(said, DRUGS) == "C"


@pytest.mark.parametrize(
    "said",
    [
        *("La respuesta no es C.", "Die Antwort ist nicht C.", "Probably not C.", "I don't think C."),
        *("I think A, B and C are wrong.", "I think A patient", "Most likely A patient"),
    ],
)
def test_announcements_of_no_letter(said):
    assert letter(said, DRUGS) is None


def test_options_in_scripts_without_spaces():
    assert letter("\u7b54\u6848\u662f\u7ef4\u751f\u7d20C\u3002", ["\u7ef4\u751f\u7d20A", "\u7ef4\u751f\u7d20C"]) == "B"


@pytest.mark.parametrize(
    "said",
    [
        *(
            "\u7b54\u6848\u662f18\u3002",
            "\u7b54\u6848\uff1a18",
            "\u7b54\u6848\u662f$18$\u3002",
            "\uc815\ub2f5\uc740 18\uc785\ub2c8\ub2e4.",
        ),
        *("\u041e\u0442\u0432\u0435\u0442: 18", "La respuesta es 18.", "Die Antwort ist 18 Euro.", "=> 18"),
        *("```\n18\n```", "The answer is:\n```\n18\n```", "<answer>The total is 18</answer>", "<answer>\n18\n</answer>"),
        *('{"answer": 18}', '{"answer": "18"}', '{"why": "x is 5", "final_answer": "18 dollars"}', '{"answer": 18, "unit": 5}'),
    ],
)
def test_announcements_of_values(said):
    assert grade_math({"gold": "18"}, [said])["accuracy"] == 1


@pytest.mark.parametrize(
    "said",
    [
        *(
            "\u7b54\u6848\u662f18\u4e07\u3002",
            "\u7b54\u6848\u4e0d\u662f18\u3002",
            "Die Antwort ist nicht 18.",
            "La respuesta no es 18.",
        ),
        '{"answer": 5, "unit": 18}',
    ],
)
def test_announcements_of_other_values(said):
    assert grade_math({"gold": "18"}, [said])["accuracy"] == 0


def test_fields_of_json_keep_lists_and_commands():
    assert grade_math({"gold": "2,3"}, ['{"answer": [2, 3]}'])["accuracy"] == 1
    assert grade_math({"gold": "\\frac{1}{2}"}, ['{"answer": "\\\\frac{1}{2}"}'])["accuracy"] == 1
