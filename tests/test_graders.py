"""What answers are worth: gold answers are right, tricky pairs are told apart, letters are read and not guessed."""

import itertools
import math
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from datasets import Dataset

pytest.importorskip("math_verify")
from bl_trainer.evaluation.grading import (
    final_answer,
    grade_letter,
    grade_math,
    grade_word,
    is_same_math,
    letter,
    letter_docs,
    math_docs,
    values,
    word_docs,
)

GOLD = [
    *("204", "025", "27.0", "-3", "1,234", "4.5e33", "6.02e-23", "\\$18", "50\\%", "90^\\circ", "p - q", "x=3", "6 - 5i"),
    *("\\frac{14}{3}", "\\frac43", "2\\sqrt{3}", "\\left( 3, \\frac{\\pi}{2} \\right)", "\\{1,2,3\\}", "[0,1)", "\\ln(10)"),
    *("(-\\infty,2]\\cup(3,\\infty)", "$69$,$84$", "$(1,8,19), (2,7,13), (4,5,7)$", "$f(x)=-1$,$f(x)=x+1$", "2220_5"),
    *("$\\binom{2n}{n}$", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "10\\text{ cm}", "x^3+3x-6", "\\text{(C)}", "\\text{Evelyn}"),
    *("5.4 \\mathrm{~cm}", "11,\\! 111,\\! 111", "y = 2x + 3"),
]


@pytest.mark.parametrize("gold", GOLD)
def test_gold_answers_are_right(gold):
    (doc,) = math_docs(Dataset.from_list([{"problem": "?", "answer": gold}]))
    assert doc["gold"] == gold
    bare = gold if "\\$" in gold else gold.replace("$", "")
    for said in (f"\\boxed{{{bare}}}", f"Perhaps \\boxed{{99}}? No: $\\boxed{{{bare}}}$, so we are done.", f"#### {gold}"):
        assert grade_math(doc, [said]) == {"accuracy": 1.0}
    assert grade_math(doc, [f"\\boxed{{{bare}}}, or rather \\boxed{{98765}}"]) == {"accuracy": 0.0}
    assert grade_math(doc, [""]) == grade_math(doc, ["\\boxed{}"]) == {"accuracy": 0.0}


def test_gold_answers_differ():
    for gold, other in itertools.combinations(GOLD, 2):
        assert not is_same_math(gold, other), (gold, other)


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("1/2", "\\frac{1}{2}", True),
        ("\\frac12", "0.5", True),
        ("\\frac{3}{56}", "\\dfrac{3}{56}", True),
        ("12", "1/2", False),
        ("0.33", "1/3", False),
        ("3.14", "3.1416", False),
        ("025", "25", True),
        ("27.0", "27", True),
        ("1,234", "1234", True),
        ("-1", "1", False),
        ("50\\%", "50", True),
        ("50", "50%", True),
        ("50\\%", "0.5", True),
        ("18", "\\$18.00", True),
        ("10", "10\\text{ cm}", True),
        ("10 cm", "10", True),
        ("90^\\circ", "90", True),
        ("4.5e33", "4.5 \\times 10^{33}", True),
        ("4.5e-3", "0.0045", True),
        ("4.5e33", "4.5e32", False),
        ("1.325e-27", "2.88e-19", False),
        ("1.325e-27", "0", False),
        ("1.325e-27", "1.325 \\times 10^{-27}", True),
        ("2.88 \\times 10^{-19}", "0.000000000000000000288", True),
        ("x=3", "3", True),
        ("3", "x = 3", True),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("p-q", "q-p", False),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("1,2", "2,1", True),
        ("1,2", "1,2,3", False),
        ("6 \\text{ or } 8", "6, 8", True),
        ("(1,2)", "(2,1)", False),
        ("(1,2),(3,4)", "(3,4), (1,2)", True),
        ("[0,1)", "\\left[0, 1\\right)", True),
        ("(0,1]", "[0,1)", False),
        ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty, 2) \\cup (3, \\infty)", True),
        ("\\text{Evelyn}", "Evelyn", True),
        ("\\text{Evelyn}", "Angela", False),
        ("\\text{(B)}", "B", True),
        ("5", "", False),
        ("2516_8", "2516", False),
        ("2516_8", "2516_{8}", True),
        ("2516_8", "(2516)_8", True),
        ("22", "10110_2", False),
        ("10110_2", "10110_3", False),
        ("073", "\\textbf{(073)}", True),
        ("(1,2)", "\\textbf{(1,2)}", True),
    ],
)
def test_tricky_pairs(gold, answer, same):
    assert is_same_math(gold, answer) == same
    assert grade_math({"gold": gold}, [f"so it is \\boxed{{{answer}}}."])["accuracy"] == same


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}}, as $\\{1\\}$", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{1} or \\boxed {2}.", "2"),
        ("\\boxed{1} and then \\boxed{2 + ", "1"),  # cut off by the limit of new tokens
        ("\\fbox{7}", "7"),
        ("16 - 3 = <<16-3=13>>13\n#### 1,300\n", "1,300"),
        ("#### 5 but \\boxed{6}", "6"),
        ("the answer is 5", None),
        ("#### Step 1: Compute\n9*2=18", None),
        ("#### 1. First, 9*2\nThe answer is 18", None),
        ("#### 18 dollars", "18 dollars"),
        ("", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("So the answer is 18 dollars.", 1),
        ("The answer is $18$.", 1),
        ("16 plus 2 makes 18", 1),
        ("The answer is 1.8", 0),
        ("#### Step 1: 9*2\nThe answer is 18.", 1),
    ],
)
def test_answers_without_a_box(said, right):
    assert grade_math({"gold": "18"}, [said]) == {"accuracy": right}


CHOICES = ["aspirin", "beta blocker", "vitamin C", "hepatitis B vaccine"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is not B but C.", "C"),
        ("The answer is C, not B", "C"),
        ("Rather than B, the answer must be A.", "A"),
        ("Neither A nor B. The answer is D", "D"),
        ("It cannot be A, since aspirin harms. The answer, I think, is D.", "D"),
        ("The answer is A. Wait, the answer is B.", "B"),
        ("The answer isn't C.", None),
        ("The answer cannot be A.", None),
        ("The answer is C. The answer is not A.", "C"),
        ("The correct option is C. Option A is incorrect because it harms.", "C"),
        ("**C. vitamin C**\n\nOption A is wrong because aspirin harms; option B does nothing.", "C"),
        ("The best choice is B.\nChoice A is wrong.", "B"),
        ("The answer is: vitamin C. Answer A is wrong.", "C"),
        ("Answer: A patient with scurvy is pale", None),
        ("The answer is either A or C", None),
        ("The answer is D.\nUser: next question. Answer: A", "D"),
        ("The answer is definitely C.", "C"),
        ("Therefore, C is correct.", "C"),
        ("Therefore, (C) is correct, and (A) is wrong.", "C"),
        ("<answer>C</answer>", "C"),
        ("So the answer is \\textbf{C}", "C"),
        ("\\boxed{Option C}", "C"),
        ("\\boxed{\\textbf{C}}", "C"),
        ("\\boxed{\\text{vitamin C}}", "C"),
        ("\\boxed{C vitamin C}", "C"),
        ("\\boxed{C aspirin}", None),
        ("Answer: B or C", None),
        ("The answer is E.", None),
        ("the answer is c.", "C"),
        ("Answer: (d)", "D"),
        ("**Answer: B**", "B"),
        ("The correct answer is **C**.", "C"),
        ("The answer is:\n\n**B) beta blocker**", "B"),
        ("The answer is A because of the pain", "A"),
        ("The answer is a beta blocker", "B"),
        ("answer is vitamin C", "C"),
        ("the best choice is option (B)", "B"),
        ("Option A is wrong because of x. Option C is right.", "C"),
        ("I choose B", "B"),
        ("So \\boxed{D}", "D"),
        ("\\boxed{\\text{(b)}}", "B"),
        ("\\boxed{B. beta blocker}", "B"),
        ("\\boxed{aspirin}", "A"),
        ("\\boxed{A, B}", None),
        ("\\boxed{A or C}", None),
        ("\\boxed{A drug}", None),
        ("The answer is A, B.", None),
        ("First \\boxed{A}, but no: \\boxed{C}", "C"),
        ("Final answer: $\\boxed{C}$ (not B)", "C"),
        ("The answer is A, so \\boxed{none of these}", None),
        ("C", "C"),
        ("c", "C"),
        ("(C)", "C"),
        ("**C**", "C"),
        ("C. vitamin C", "C"),
        ("Let's see.\n\nD", "D"),
        ("A patient with hepatitis B needs vitamin C.", "C"),
        ("A patient with pain I saw.", None),
        ("A. aspirin\nB. beta blocker\nC. vitamin C\nD. hepatitis B vaccine", None),
        ("", None),
    ],
)
def test_letters(text, expected):
    assert letter(text, CHOICES) == expected
    assert grade_letter({"choices": CHOICES, "gold": "C"}, [text]) == {"accuracy": float(expected == "C")}


def test_letters_of_ten():
    choices = [f"option {i}" for i in range(10)]
    for text, expected in (("The answer is A, I think", "A"), ("Answer: I", "I"), ("I think so.", None), ("\\boxed{J}", "J")):
        assert letter(text, choices) == expected


LETTERS_OF_C: list[dict] = [{"answer_idx": "C"}, {"answer_letter": "c"}, {"answer": "\\boxed{C}"}]
AMONG_OPTIONS: list[dict] = [{"answer_idx": 2}, {"answer": "vitamin C"}]


@pytest.mark.parametrize(
    ("options", "gold"),
    [
        *(
            (options, gold)
            for options in (dict(zip("ABCD", CHOICES, strict=True)), CHOICES)
            for gold in LETTERS_OF_C + AMONG_OPTIONS
        ),
        *((None, gold) for gold in LETTERS_OF_C),
    ],
)
def test_medical_rows(options, gold):
    other = {"question": "Else?", "options": dict(zip("ABCDE", "vwxyz", strict=True)), "answer": "z", "answer_idx": "E"}
    rows = [{"question": "Which?", "options": options, **gold}]
    if isinstance(options, dict) and isinstance(gold.get("answer_idx"), str):
        rows.append(other)  # a row with another letter
    doc = letter_docs(Dataset.from_list(rows))[0]
    assert doc["gold"] == "C"
    assert doc["question"] == "Which?" + (
        "\nA. aspirin\nB. beta blocker\nC. vitamin C\nD. hepatitis B vaccine" if options else ""
    )
    assert doc["choices"] == (CHOICES if options else [])


@pytest.mark.parametrize(("answer", "gold"), [({"answer": "2"}, "B"), ({"answer": "0"}, "A"), ({"answer_idx": 2}, "C")])
def test_options_that_are_numbers(answer, gold):
    (doc,) = letter_docs(Dataset.from_list([{"question": "1+1?", "options": ["1", "2", "3", "4"], **answer}]))
    assert doc["gold"] == gold


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"answer_idx": 4}], "row 1: the gold answer '4' is none of the options A to D."),
        ([{"answer_idx": "A"}, {"answer_idx": "E"}], "row 2: the gold answer 'E' is none of the options A to D."),
        ([{"answer_idx": 4, "options": None}], "'4' is none of the options A to J, and there is no column `options` that"),
        ([{"answer_idx": "A"}, {"answer_idx": "A", "question": None}], "row 2 has no question."),
        ([{"answer_idx": "A", "question": " "}], "row 1 has no question."),
    ],
)
def test_rows_that_cannot_be_asked(rows, message):
    rows = [{"question": "Which?", "options": CHOICES, **row} for row in rows]
    with pytest.raises(ValueError, match=message):
        letter_docs(Dataset.from_list(rows))


def jaro_winkler(one, other):
    """The textbook's: matches in a window, transpositions, and a prefix of up to four above 0.7."""
    if one == other:
        return float(bool(one))
    reach, used = max(len(one), len(other), 2) // 2 - 1, set()
    pairs = []
    for i, sign in enumerate(one):
        j = next(
            (j for j in range(max(0, i - reach), min(len(other), i + reach + 1)) if j not in used and other[j] == sign), None
        )
        if j is not None:
            used.add(j)
            pairs.append(sign)
    if not pairs:
        return 0.0
    turned = sum(a != b for a, b in zip(pairs, (other[j] for j in sorted(used)), strict=True)) // 2
    jaro = (len(pairs) / len(one) + len(pairs) / len(other) + (len(pairs) - turned) / len(pairs)) / 3
    prefix = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return jaro + (0.1 * min(4, prefix) * (1 - jaro) if jaro > 0.7 else 0)


def test_words():
    rng = random.Random(3)
    for _ in range(300):
        right, said = ("".join(rng.choice("ABC") for _ in range(rng.randint(low, 6))) for low in (1, 0))
        found = grade_word({"gold": right}, [said])
        assert found == {
            "exact_match": said == right,
            "normalised_match": said == right,
            "jaro_winkler": pytest.approx(jaro_winkler(said.lower(), right.lower())),
        }
    assert grade_word({"gold": "MARTHA"}, ["marhta"])["jaro_winkler"] == pytest.approx(0.9611, abs=1e-4)  # Winkler's own
    assert grade_word({"gold": "WORD"}, [" word\n"]) == {"exact_match": 0, "normalised_match": 1, "jaro_winkler": 1}
    assert grade_word({"gold": "WORD"}, ["WORD"]) == {"exact_match": 1, "normalised_match": 1, "jaro_winkler": 1}
    assert math.fsum(grade_word({"gold": "WORD"}, [""]).values()) == 0


def test_gold_answers_of_each_data_set():
    def gold(make, **row):
        return make(Dataset.from_list([row]))["gold"]

    assert gold(math_docs, question="?", answer="2 + 3 = <<2+3=5>>5\n#### 5") == ["5"]
    assert gold(math_docs, question="?", answer=27.0) == ["27"]
    assert gold(math_docs, question="?", final_answer=["$69$,$84$"], answer=None) == ["$69$,$84$"]
    assert gold(math_docs, problem="?", solution="so \\boxed{1.6} \\mathrm{~cm}") == ["1.6"]
    assert gold(math_docs, Problem="?", Answer=204) == ["204"]
    message = {"role": "assistant", "content": "Thus \\boxed{\\frac{1}{2}}."}
    assert gold(math_docs, prompt=[{"role": "user", "content": "?"}], completion=[message]) == ["\\frac{1}{2}"]
    assert gold(word_docs, question="art", answer="WORD") == ["WORD"]
    assert gold(word_docs, prompt="art", completion="WORD") == ["WORD"]


MATRIX = "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"
MENDED = [
    # sums to a name are compared at integers, and those to anything else are not computed
    ("2^n", "\\sum_{k=0}^{n} \\binom{n}{k}", 1),
    ("2^n-1", "\\sum_{k=0}^{n} \\binom{n}{k}", 0),
    ("H_n", "\\sum_{k=1}^{n}\\frac{1}{k}", 0),
    ("\\ln n", "\\sum_{k=1}^{n}\\frac{1}{k}", 0),
    ("n!", "\\prod_{k=1}^{n} k", 1),
    ("\\frac{n(n+1)(n+2)}{6}", "\\sum_{i=1}^{n}\\sum_{j=1}^{i} j", 1),
    ("\\frac{\\pi^2}{6}", "\\sum_{k=1}^{\\infty}\\frac{1}{k^2}", 1),
    ("3", "\\sum_{k=1}^{\\frac{n}{2}}\\frac{1}{k}", 0),
    # what has no value
    ("1", "\\sum_{k=1}^{\\infty}\\frac{1}{k}", 0),
    ("2", "\\cot 0", 0),
    ("x", "\\csc 0", 0),
    ("2", "(-3)!", 0),
    # very different sizes, and what a large number would hide
    ("0.5", "10^{400}", 0),
    ("7^{500}", "2.5", 0),
    ("e^{100}", "e^{100}+1", 0),
    ("\\pi^{200}", "\\pi^{200}+1", 0),
    ("1", "1+e^{-100}", 0),
    ("e^{200}-e^{100}", "e^{100}(e^{100}-1)", 1),
    # matrices are computed
    ("5", f"2{MATRIX}", 0),
    (f"2{MATRIX}", f"3{MATRIX}", 0),
    ("\\begin{pmatrix}2&4\\\\6&8\\end{pmatrix}", f"2{MATRIX}", 1),
    ("\\begin{pmatrix}x&2x\\\\3x&4x\\end{pmatrix}", f"x{MATRIX}", 1),
    ("\\begin{pmatrix}7&10\\\\15&22\\end{pmatrix}", f"{MATRIX}^2", 1),
    (MATRIX, f"{MATRIX}^{{10000000}}", 0),
    # bounds: "or" is a union, "and" what they have in common, and so is a comma unless that is nothing
    ("(-\\infty,3)\\cup(1,\\infty)", "x>1 \\text{ and } x<3", 0),
    ("x>1 \\text{ and } x<3", "x>1 \\text{ or } x<3", 0),
    ("(2,5)", "x>2 \\text{ and } x<5", 1),
    ("(2,5)", "x>2 \\land x<5", 1),
    ("(2,5)", "x>2, x<5", 1),
    ("[2,5)", "x>2, x<5", 0),
    ("2<x<5", "x>2 \\text{ and } x<5", 1),
    ("(a,b)", "x>a \\text{ and } x<b", 1),
    ("(3,5)", "x>1\\text{ and }x>3\\text{ and }x<5", 1),
    ("(-\\infty,1)\\cup(3,\\infty)", "x<1, x>3", 1),
    ("x<1 \\text{ or } x>3", "x>3, x<1", 1),
    ("(-\\infty,0)\\cup(1,2)", "x<0 \\text{ or } x>1 \\text{ and } x<2", 1),
    ("x>3", "y>3", 0),
    # currencies are units
    ("\\$5", "5\\text{ cents}", 0),
    ("5\\text{ cents}", "\\$5", 0),
    ("\\$5", "€5", 0),
    ("5\\text{ euros}", "\\$5", 0),
    ("\\$5", "5\\%", 0),
    ("5\\%", "\\$5", 0),
    ("\\$5", "5", 1),
    ("5", "\\$5", 1),
    ("5\\text{ dollars}", "\\$5", 1),
    ("\\$5", "\\$5\\text{ per hour}", 1),
    ("\\$5\\text{ per hour}", "\\$5\\text{ per day}", 0),
    ("\\$2.50", "\\$2\\frac12", 1),
    ("-\\$5", "-5", 1),
    ("5\\text{ pounds}", "£5", 1),
    ("18\\text{ cents}", "18 €", 0),
    # units in other scripts
    *(("18", f"18{unit}", 1) for unit in ("元", "个", "\\text{元}", " €", " 人", "\\text{ чел.}")),
    ("18元", "18个", 0),
    ("18", "18万", 0),
    ("180000", "18万元", 1),
    ("18", "18个半", 0),
    # a set as an element
    ("\\{1,\\{2\\}\\}", "\\{1,2\\}", 0),
    ("\\{\\{1\\},2\\}", "\\{1,\\{2\\}\\}", 0),
    ("\\{1,\\{2\\}\\}", "\\{\\{2\\},1\\}", 1),
    # what is only seen, and words for signs
    *(("18", said, 1) for said in ("18\\checkmark", "\\color{red}{18}", "\\textcolor{red}{18}", "\\Large 18", "18 ✓")),
    ("0.5", "\\large .5", 1),
    ("-\\infty", "\\text{negative infinity}", 1),
    ("-3", "\\text{negative }3", 1),
    ("3", "\\text{negative }3", 0),
    ("\\emptyset", "\\text{empty set}", 1),
]


@pytest.mark.parametrize(("gold", "answer", "right"), MENDED)
def test_values_bounds_currencies_and_scripts(gold, answer, right):
    begin = time.monotonic()
    assert grade_math({"gold": gold}, [f"\\boxed{{{answer}}}"]) == {"accuracy": right}
    assert time.monotonic() - begin < 4 * values.SECONDS


def test_values_are_compared_off_the_main_thread():
    pairs = [("2^n", "\\sum_{k=0}^{n} \\binom{n}{k}"), ("H_n", "\\sum_{k=1}^{n}\\frac{1}{k}"), ("x^2-1", "(x-1)(x+1)")]
    values._parsed.cache_clear()
    with ThreadPoolExecutor(1) as pool:
        assert [*pool.map(lambda pair: is_same_math(*pair), pairs)] == [True, False, True]


@pytest.mark.parametrize("error", [RecursionError, OverflowError, ZeroDivisionError, NotImplementedError, AttributeError])
def test_what_sympy_raises_is_no_equality(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(values, "_compare", fail)
    assert grade_math({"gold": "\\sqrt{12}"}, ["\\boxed{2\\sqrt{3}}"]) == {"accuracy": 0}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the time limit needs setitimer, which Windows lacks")
def test_a_comparison_ends(monkeypatch):
    monkeypatch.setattr(values, "SECONDS", 1)
    monkeypatch.setattr(values, "_compare", lambda *_: all(iter(lambda: True, False)))  # has no end
    assert grade_math({"gold": "\\sqrt{12}"}, ["\\boxed{2\\sqrt{3}}"]) == {"accuracy": 0}
