"""Families of answers: spellings of one value are the same, near misses aren't, and no answer takes more than bounded work."""

import re

import pytest
from datasets import Dataset

pytest.importorskip("math_verify")
from bl_trainer.errors import RecipeError
from bl_trainer.evaluation.grading import exam, grade_math, letter, letters, math, math_docs, prose, values

try:
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_parse as parser

PAIRS = [
    ("3^{n}+1", "3^{n+1}", 0),
    ("x^{2}y", "x^{2y}", 0),
    ("\\frac{1}{23}", "\\frac{12}{3}", 0),
    ("123", "12 3", 0),
    ("1, 23", "12, 3", 0),
    ("\\sqrt{2}x", "\\sqrt{2x}", 0),
    ("\\log_{2}8", "\\log_{28}", 0),
    ("e^{x}+1", "e^{x+1}", 0),
    ("x^{10}", "x^{1}0", 0),
    ("\\frac{a}{b+c}", "\\frac{a}{b}+c", 0),
    ("\\sqrt{3}+2", "\\sqrt{3+2}", 0),
    ("\\frac{7}{2}", "3 1/2", 1),
    ("\\frac{7}{2}", "3\\tfrac12", 1),
    ("-\\frac{7}{2}", "-3 1/2", 1),
    ("\\frac{3}{2}", "3\\frac{1}{2}", 0),
    ("3\\frac{1}{2}", "3.5", 1),
    ("2\\frac{2}{3}", "\\frac{8}{3}", 1),
    ("5\\frac{3}{4}\\text{ cups}", "5.75", 1),
    ("\\frac{1}{2}", "\\frac12", 1),
    ("\\frac{1}{2}", "\\tfrac{1}{2}", 1),
    ("\\frac{1}{2}", "\\frac{2}{4}", 1),
    ("\\frac{1}{1+\\frac{1}{2}}", "\\frac{2}{3}", 1),
    ("\\frac{\\pi}{2}", "\\frac\\pi2", 1),
    ("\\frac{\\sqrt{3}}{2}", "\\frac{\\sqrt3}2", 1),
    ("\\frac{\\sqrt{3}}{2}", "√3/2", 1),
    ("-\\frac{1}{2}", "\\frac{-1}{2}", 1),
    ("\\frac{3}{4}", ".75", 1),
    ("\\frac{1}{3}", "0.33", 0),
    ("\\frac{5}{6}", "0.8\\overline{3}", 1),
    ("\\frac{x}{2}", "x/2", 1),
    ("\\frac{1}{100!}", "\\frac{1}{101!}", 0),
    ("10^{-500}", "10^{-501}", 0),
    ("\\left(\\frac{1}{2}\\right)^{3000}", "\\left(\\frac{1}{2}\\right)^{3001}", 0),
    ("\\frac{1}{2004!}", "\\frac{2005}{2005!}", 1),
    ("10^{400}", "10^{401}", 0),
    ("2004!", "2003!\\cdot 2004", 1),
    ("0", "10^{-300}", 0),
    ("(10^{-20},1)", "(10^{-21},1)", 0),
    ("1.5e-10", "1.6e-10", 0),
    ("1.5e-10", "0.00000000015", 1),
    ("100!", "101!", 0),
    ("\\mathrm{e}^{2}", "e^2", 1),
    ("2\\mathrm{e}", "2", 0),
    ("2+3\\mathrm{i}", "2", 0),
    ("i", "\\mathrm{i}", 1),
    ("-i", "i", 0),
    ("5-2i", "5+2i", 0),
    ("\\mathrm{i}^2", "-1", 1),
    ("\\operatorname{e}^3", "e^3", 1),
    ("2\\mathit{i}", "2i", 1),
    ("45", "45°", 1),
    ("45^\\circ", "45 degrees", 1),
    ("45", "45^\\circ", 1),
    ("\\sqrt{5}", "√5", 1),
    ("\\sqrt[3]{7}", "∛7", 1),
    ("\\sqrt{12}", "√12", 1),
    ("\\infty", "∞", 1),
    ("-\\infty", "−∞", 1),
    ("[2,\\infty)", "[2,∞)", 1),
    ("(-\\infty,0)\\cup(0,\\infty)", "(-∞,0)∪(0,∞)", 1),
    ("12345", "12\u2009345", 1),
    ("12345", "12\\;345", 1),
    ("12345", "12\xa0345", 1),
    ("1,000,000", "1000000", 1),
    ("1{,}000", "1000", 1),
    ("000", "1 000", 0),
    ("x^{10}", "x^10", 1),
    ("x^{10}", "x¹⁰", 1),
    ("2^{-3}", "2^-3", 1),
    ("x^{n+1}", "x^(n+1)", 1),
    ("3\\times 10^{8}", "3 × 10^8", 1),
    ("300000000", "3e8", 1),
    ("x^{1/2}", "\\sqrt{x}", 1),
    ("x^{2}", "x**2", 1),
    ("2\\pi", "2π", 1),
    ("-5", "−5", 1),
    ("\\theta", "θ", 1),
    ("5", "5\\text{ cm}", 1),
    ("5\\text{ cm}", "5", 1),
    ("5\\text{ cm}^2", "5", 1),
    ("5 cm", "5 m", 0),
    ("3 hours", "3 minutes", 0),
    ("18", "18 dollars", 1),
    ("18", "$18", 1),
    ("1234.50", "\\$1,234.50", 1),
    ("12", "12 apples", 1),
    ("50", "50\\%", 1),
    ("50\\%", "50", 1),
    ("0.5", "50\\%", 0),
    ("7", "7 hours and 30 minutes", 0),
    ("7 hours 30 minutes", "7\\text{ hours }30\\text{ minutes}", 1),
    ("5", "5\\text{ feet }11\\text{ inches}", 0),
    ("60", "60\\text{ miles per hour}", 1),
    ("9.8", "9.8\\ \\mathrm{m/s^2}", 1),
    ("5", "5x", 0),
    ("5m", "5", 0),
    ("x", "x\\text{ cm}", 1),
    ("3", "3:4", 0),
    ("(1,2)", "(1, 2)", 1),
    ("[1,2)", "[1,2]", 0),
    ("(1,2)", "(2,1)", 0),
    ("\\{1,2,3\\}", "1,2,3", 1),
    ("1,2", "2, 1", 1),
    ("1, 2, 3", "1 and 2 and 3", 1),
    ("2,3", "2\\text{ and }3", 1),
    ("2,3", "x=2 \\text{ or } x=3", 1),
    ("-2,2", "\\pm 2", 1),
    ("1\\pm\\sqrt{2}", "1-\\sqrt2, 1+\\sqrt2", 1),
    ("3", "\\pm3", 0),
    ("\\{5\\}", "5", 1),
    ("[0,1)\\cup(2,3]", "(2,3]\\cup[0,1)", 1),
    ("x>3", "x > 3", 1),
    ("x>3", "3<x", 1),
    ("x\\in(3,\\infty)", "(3,\\infty)", 1),
    ("(1,2),(3,4)", "(3,4),(1,2)", 1),
    ("(1,2),(3,4)", "(2,1),(3,4)", 0),
    ("(1,-2)", "\\left(1,-2\\right)", 1),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}", 0),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}", 0),
    ("\\begin{pmatrix}12\\\\3\\end{pmatrix}", "\\begin{pmatrix}1\\\\23\\end{pmatrix}", 0),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\\\\\end{pmatrix}", 1),
    ("5", "x=5", 1),
    ("x=5", "y=5", 0),
    ("y=2x+3", "2x+3", 1),
    ("y=2x+3", "y=3+2x", 1),
    ("5", "2+3=5", 1),
    ("x^2+y^2=1", "1", 0),
    ("f(x)=x+1", "x+1", 1),
    ("x=1,y=2", "x=2,y=1", 0),
    ("2x+y=3", "y=3-2x", 1),
    ("10", "|AB|=10", 1),
    ("x(x+1)", "x^2+x", 1),
    ("(x+1)(x+2)", "(x+2)(x+1)", 1),
    ("n(n+1)/2", "\\frac{n^2+n}{2}", 1),
    ("2^n", "2^{n}", 1),
    ("\\sin(x)", "\\sin x", 1),
    ("\\ln 2", "\\log 2", 0),
    ("a+b", "b+a", 1),
    ("a-b", "b-a", 0),
    ("x+1", "x-1", 0),
    ("\\text{Monday}", "monday", 1),
    ("A", "(A)", 1),
    ("A", "\\textbf{A}", 1),
    ("\\text{yes}", "No", 0),
]
PROSE = [
    ("7", "The answer is 7.", 1),
    ("7", "The answer is 7 hours and 30 minutes.", 0),
    ("1.25", "The answer is 1 1/4.", 1),
    ("1/2", "The answer is 1 1/4.", 0),
    ("90", "The answer is 90°.", 1),
    ("1+2i", "The answer is $1+2\\mathrm{i}$.", 1),
    ("18", "So she makes $18 every day.", 1),
    ("18", "The final answer is **18**.", 1),
    ("18", "**Answer:** 18", 1),
    ("18", "Answer: $18$", 1),
    ("6,8", "The answers are $6$ and $8$.", 1),
    ("18", "Therefore she has 9*2=18 apples.", 1),
    ("7", "The answer is 3. Wait, no. The answer is 7.", 1),
    ("3", "The answer is 3. Wait, no. The answer is 7.", 0),
    ("5", "The answer is $5$, since $2+3=5$.", 1),
    ("1,234", "The answer is 1,234.", 1),
    ("1234", "The answer is 1,234 dollars.", 1),
    ("\\frac{1}{2}", "The answer is \\frac{1}{2}.", 1),
    ("\\frac{1}{2}", "The answer is \\(\\frac{1}{2}\\).", 1),
    ("\\frac{1}{2}", "Hence the result is \\[\\frac{1}{2}\\]", 1),
    ("Evelyn", "The answer is Evelyn.", 1),
    ("42", "It could be 41 or 42", 0),
    ("18", "The answer is that Janet makes 18 dollars every day.", 1),
    ("2\\sqrt{3}", "Therefore, x = 2\\sqrt{3}.", 1),
    ("(1,2)", "The answer is (1, 2).", 1),
    ("3", "The answer is x = 3.", 1),
    ("6,8", "\\boxed{6} and \\boxed{8}", 1),
    ("6,8", "\\boxed{8}, \\boxed{6}", 1),
    ("8", "\\boxed{6}. Then \\boxed{8}", 1),
    ("6", "\\boxed{6}. Then \\boxed{8}", 0),
    ("5", "\\boxed{\\boxed{5}}", 1),
    ("5", "\\boxed{5", 0),
    ("5", "\\fbox{5}", 1),
    ("5", "$\\boxed{5}$ and then \\boxed{", 1),
    ("5", "\\boxed 5", 1),
]
CHOICES = ["Ibuprofen", "Bed rest", "Cortisone", "Dialysis"]
LETTERS = [
    ("A. Ibuprofen B. Bed rest C. Cortisone D. Dialysis", None),
    ("A) Ibuprofen B) Bed rest C) Cortisone D) Dialysis", None),
    ("(A) Ibuprofen (B) Bed rest (C) Cortisone (D) Dialysis", None),
    ("A: Ibuprofen, B: Bed rest, C: Cortisone, D: Dialysis", None),
    ("A. Ibuprofen, B. Bed rest, C. Cortisone, D. Dialysis. The answer is B.", "B"),
    ("The options are: A. Ibuprofen B. Bed rest C. Cortisone D. Dialysis", None),
    ("The answer choices are: A. Ibuprofen B. Bed rest C. Cortisone D. Dialysis", None),
    ("The answer choices are:\nA. Ibuprofen\nB. Bed rest\nC. Cortisone\nD. Dialysis", None),
    ("Options: A) Ibuprofen B) Bed rest C) Cortisone D) Dialysis\nAnswer: D", "D"),
    ("A. Ibuprofen B. Bed rest C. Cortisone D. Dialysis\n\nI choose C", "C"),
    ("Choices: A, B, C, D", None),
    ("A, B, C or D", None),
    ("The answer could be A, B, C or D.", None),
    ("A/B/C/D", None),
    ("A B C D", None),
    ("Answer choices: A, B, C, D.", None),
    ("**A.** Ibuprofen **B.** Bed rest **C.** Cortisone **D.** Dialysis", None),
    ("A - Ibuprofen; B - Bed rest; C - Cortisone; D - Dialysis", None),
    ("A. Ibuprofen B. Bed rest", None),
    ("A: wrong. B: wrong. C: right.", "C"),
    ("A: incorrect. B: incorrect. C: incorrect. D: correct.", "D"),
    ("A) wrong, B) correct, C) wrong, D) wrong", "B"),
    ("A - false; B - false; C - true; D - false", "C"),
    ("A. Wrong. B. Wrong. C. Correct. D. Wrong.", "C"),
    ("(A) Incorrect. (B) Correct. (C) Incorrect. (D) Incorrect.", "B"),
    ("A is wrong. B is wrong. C is right.", "C"),
    ("A: false\nB: false\nC: true\nD: false", "C"),
    ("A. Ibuprofen: wrong. B. Bed rest: wrong. C. Cortisone: correct. D. Dialysis: wrong.", "C"),
    ("A. Ibuprofen - incorrect\nB. Bed rest - correct\nC. Cortisone - incorrect\nD. Dialysis - incorrect", "B"),
    ("A: wrong. B: wrong.", None),
    # said after the letter, or under a heading of its own
    ("D it is.", "D"),
    ("So B it is, then.", "B"),
    ("Is it D? D it is!", "D"),
    ("D, final answer.", "D"),
    ("A: no. B: no. C it is.", "C"),
    ("Not D. B it is", "B"),
    ("D it is not.", None),
    ("D it is?", None),
    ("If A it is, then", None),
    ("Some say D it is.", None),
    ("I am not sure that D it is.", None),
    ("I'm not 100% certain that D is correct.", None),
    ("Far from clear that option D is right", None),
    ("I doubt that D it is", None),
    ("It is not true that D it is.", None),
    ("Perhaps option D is correct.", None),
    ("I am not sure, but D it is.", "D"),
    ("I was not sure but D it is.", "D"),
    ("There is no doubt that D it is.", "D"),
    ("I am sure that D it is.", "D"),
    ("I am not sure that D it is. B it is.", "B"),
    ("Final: B", "B"),
    ("FINAL: c", "C"),
    ("Final - B", "B"),
    ("Verdict: **B**", "B"),
    ("My vote: C", "C"),
    ("Correct: C", "C"),
    ("Incorrect: C", None),
    ("Final: B or C", None),
    ("Final: B?", None),
    ("Final: A patient dies", None),
    ("Final candidates: B", None),
    ("Solution: B is wrong", None),
    ("Definitely D.", "D"),
    ("Must be D.", "D"),
    ("Definitely not D.", None),
    ("A (wrong), B (wrong), C (right)", "C"),
    ("A: Wrong because it bleeds. B: Right because of rest.", "B"),
    ("The dose is \\boxed{40 ml}.\n\nThe answer is C.", "C"),
    ("The answer is C.\n\nThe dose is \\boxed{40 ml}.", "C"),
    ("The dose is \\boxed{12}. So \\boxed{B}", "B"),
    ("So \\boxed{B}. The dose is \\boxed{12}.", "B"),
    ("\\boxed{75\\%} of patients improve. Answer: D", "D"),
    ("\\boxed{\\frac{1}{2}}\n\nAnswer: (B)", "B"),
    ("\\boxed{none of these}", None),
    ("\\boxed{A or B}", None),
    ("\\boxed{A or B}. The answer is A.", "A"),
    ("\\boxed{Bed rest}", "B"),
    ("\\boxed{bed rest}", "B"),
    ("\\boxed{\\text{Cortisone}}", "C"),
    ("\\boxed{\\textbf{(C)}}", "C"),
    ("\\boxed{C) Cortisone}", "C"),
    ("\\boxed{C}.", "C"),
    ("\\boxed{c}", "C"),
    ("\\boxed{E}", None),
    ("\\boxed{}\nThe answer is A.", "A"),
    ("\\boxed{not A}", None),
    ("\\boxed{\\mathrm{D}}", "D"),
    ("\\boxed{\\text{Option D}}", "D"),
    ("\\boxed{D: Dialysis}", "D"),
    ("\\fbox{D}", "D"),
    ("\\boxed{The answer is D}", "D"),
    ("The answer is B. A is wrong.", "B"),
    ("The answer is B, not A.", "B"),
    ("Not A.", None),
    ("not A", None),
    ("It is not A, B or D.", None),
    ("The answer is not A, B or D but C.", "C"),
    ("The answer isn't A. It's C.", "C"),
    ("A is incorrect, so the answer is D.", "D"),
    ("I would go with B.", "B"),
    ("I'd choose (d).", "D"),
    ("Answer: **B**", "B"),
    ("**Answer:** B", "B"),
    ("Answer - C", "C"),
    ("Answer — C", "C"),
    ("Final Answer: C", "C"),
    ("The final answer is (C).", "C"),
    ("The correct option is C: Cortisone", "C"),
    ("The correct answer is C) Cortisone", "C"),
    ("C is the correct answer.", "C"),
    ("C is my final answer", "C"),
    ("(c)", "C"),
    ("c)", "C"),
    ("C)", "C"),
    ("[C]", "C"),
    ("**C**", "C"),
    ("***C***", "C"),
    ("$C$", "C"),
    ("`C`", "C"),
    ('"C"', None),
    ("C: Cortisone", "C"),
    ("C. Cortisone is the best first-line therapy.", "C"),
    ("Cortisone", "C"),
    ("cortisone.", "C"),
    ("Bed rest is needed.", "B"),
    ("Ibuprofen or Cortisone", None),
    ("Option C", "C"),
    ("option c.", "C"),
    ("choice (B)", "B"),
    ("The answer is A and B.", None),
    ("The answer is A/B.", None),
    ("A. Ibuprofen", "A"),
    ("Therefore (B).", "B"),
    ("So, the answer is: B", "B"),
    ("answer is b", "B"),
    ("answer: b) bed rest", "B"),
    ('The answer is "C".', "C"),
    ("The answer is 'C'.", "C"),
    ("The answer is <C>", None),
    ("", None),
    ("I don't know", None),
    ("A patient needs help.", None),
    ("The answer is a matter of debate.", None),
    ("Vitamin C is useful.", None),
    ("The answer is D.\nUser: and now? The answer is A", "D"),
    ("The best answer is clearly D.", "D"),
    ("The answer is therefore A.", "A"),
    ("A is correct because it thins blood; B is incorrect.", "A"),
    ("We eliminate A and B. The answer is C", "C"),
    ("The answer must be C.", "C"),
    ("Thus, the right choice is D.", "D"),
]


@pytest.mark.parametrize(("gold", "answer", "right"), PAIRS)
def test_values_in_a_box(gold, answer, right):
    assert grade_math({"gold": gold}, [f"So we get $\\boxed{{{answer}}}$."])["accuracy"] == right


@pytest.mark.parametrize(("gold", "said", "right"), PROSE)
def test_values_that_are_stated(gold, said, right):
    assert grade_math({"gold": gold}, [said])["accuracy"] == right


@pytest.mark.parametrize(("said", "right"), LETTERS)
def test_letters_of_every_kind(said, right):
    assert letter(said, CHOICES) == right


@pytest.mark.parametrize(
    ("choices", "said", "right"),
    [
        (["Yes", "No", "Maybe"], "B. No", "B"),
        (["Yes", "No", "Maybe"], "A: Yes", "A"),
        (["Yes", "No", "Maybe"], "A. Yes B. No C. Maybe", None),
        (["Yes", "No", "Maybe"], "\\boxed{no}", "B"),
        (["True", "False"], "B. False", "B"),
        (["True", "False"], "A. True B. False", None),
    ],
)
def test_options_that_read_like_verdicts(choices, said, right):
    assert letter(said, choices) == right


MARKED = [
    ("R-r", "0", 0),
    ("R+r", "2r", 0),
    ("2R", "2r", 0),
    ("N", "n", 0),
    ("n^2", "N^2", 0),
    ("AB", "ab", 0),
    ("R+r", "r+R", 1),
    ("2R_1", "R_1+R_1", 1),
    ("R_1", "r_1", 0),
    ("x_A", "x_a", 0),
    ("I", "i", 0),
    ("E", "e", 0),
    ("\\frac{1}{2}Rh", "\\frac{Rh}{2}", 1),
    ("\\pi R^2", "R^2\\pi", 1),
    ("P(1+r)", "P+Pr", 1),
    ("P(1+R)", "P+Pr", 0),
    ("BAC", "CAB", 0),
    ("ADE", "DEA", 0),
    ("AB", "BA", 0),
    ("BAC", "BAC", 1),
    ("xy", "yx", 1),
    ("Yes", "yes", 1),
    ("NO", "no", 1),
    ("Two", "two", 1),
    ("Monday", "MONDAY", 1),
    ("\\text{BAC}", "CAB", 0),
    ("2AB", "2BA", 1),
    ("A\\cdot B", "B\\cdot A", 1),
    ("6", "\\text{6 hours}", 1),
    ("36", "\\text{36 square units}", 1),
    ("36", "36 \\text{ square units}", 1),
    ("6 hours", "\\text{6 minutes}", 0),
    ("7", "\\text{7 hours and 30 minutes}", 0),
    ("1.5", "\\text{1.5 cm}", 1),
    ("(-\\infty,3]", "x \\le 3", 1),
    ("(-\\infty,3)", "x \\le 3", 0),
    ("(-\\infty,3]", "3 \\ge x", 1),
    ("[2,5)", "2\\le x<5", 1),
    ("[2,5)", "5>x\\ge 2", 1),
    ("[2,5)", "2<x<5", 0),
    ("(-\\infty,1)\\cup(3,\\infty)", "x<1\\text{ or }x>3", 1),
    ("(-\\infty,1)\\cup(3,\\infty)", "x<1 or x>4", 0),
    ("x\\ge 2", "[2,\\infty)", 1),
    ("x>3", "3<x", 1),
    ("\\text{(C)}", "\\textbf{(C)}\\ 5", 1),
    ("5", "\\textbf{(C)}\\ 5", 1),
    ("\\text{(D)}", "\\textbf{(C)}\\ 5", 0),
    ("C", "\\textbf{(C)} 5", 1),
    ("5", "\\textbf{(C)}\\ 6", 0),
    ("\\text{(C)}", "\\textbf{(C) }\\frac{1}{2}", 1),
    ("no solution", "No solutions", 1),
    ("\\text{no solution}", "\\text{No Solutions}", 1),
    ("no solution", "two solutions", 0),
    ("7", "7\\text{ (mod }10)", 1),
    ("7", "7 \\pmod{10}", 1),
    ("7", "x \\equiv 7 \\pmod{10}", 1),
    ("7 \\pmod{10}", "7 \\pmod{11}", 0),
    ("3", "7 \\pmod{10}", 0),
    ("7", "7 (mod 10)", 1),
    ("7", "7 \\text{ mod } 10", 0),
]
SENTENCES = [
    ("12", "So the area is 12 cm^2.", 1),
    ("2", "So the area is 12 cm^2.", 0),
    ("5", "The probability is 1/5.", 0),
    ("16", "It equals 2^4.", 1),
    ("4", "It equals 2^4.", 0),
    ("-3", "The value is −3.", 1),
    ("3", "The value is −3.", 0),
    ("-3", "The value is –3.", 1),
    ("3", "The value is –3.", 0),
    ("0.05", "5 × 10^{-2}", 1),
    ("-2", "5 × 10^{-2}", 0),
    ("2", "The area is x^2.", 0),
    ("x^2", "The area is x^2.", 1),
    ("1000", "1 000", 1),
    ("0", "1 000", 0),
    ("3.5", "3 1/2 hours", 1),
    ("1/2", "3 1/2 hours", 0),
    ("-5", "12-5", 0),
    ("7", "12-5", 1),
    ("1500", "1.5e3", 1),
    ("1.5", "1.5e3", 0),
    ("17", "Total: $12 + $5 = $17", 1),
    ("12", "Total: $12 + $5 = $17", 0),
    ("3", "It is 3x", 0),
    ("3x", "It is 3x.", 1),
    ("30", "It takes 7 hours and 30 minutes.", 0),
    ("7 hours 30 minutes", "It takes 7 hours and 30 minutes.", 0),
    ("2\\sqrt{3}", "The area is 2\\sqrt{3}.", 1),
    ("3", "The area is 2\\sqrt{3}.", 0),
    ("12", "The answer is 12 - 5.", 0),
    ("-4", "So we get − 4.", 1),
    ("4", "x - 4", 0),
    ("18", "- 18", 1),
    ("1200", "She earned $1,200 in May.", 1),
    ("5", "The cost is $5 or $7", 0),
    ("2", "It is 2:3", 0),
    ("2:3", "It is 2:3", 1),
    ("(1,2)", "The point is (1, 2).", 1),
    ("2", "The point is (1, 2).", 0),
    ("3", "The value is 3 percent.", 1),
    ("3/4", "It's 3/4.", 1),
    ("4", "It's 3/4.", 0),
    ("9", "The result is 3².", 1),
    ("2", "√2 is the value", 0),
    ("100000000", "about 10^8", 1),
    ("8", "about 10^8", 0),
    ("10", "about 10^8", 0),
    ("-0.5", "the value is -.5", 1),
    ("5", "the value is -5", 0),
    ("12", "we get 12 apples + 5 pears", 0),
]
CITIES = ["Paris", "London", "Berlin", "Rome"]
DRUGS = ["aspirin", "warfarin", "heparin", "insulin"]
VERDICTS = [
    ("B because Berlin is in Germany.", "B"),
    ("The answer is A. Sorry, I meant C.", "C"),
    ("B is tempting, however C is right.", "C"),
    ("Perhaps Paris.", None),
    ("Everyone would say Paris.", None),
    ("Neither Paris nor London.", None),
    ("I would exclude London.", None),
    ("Paris, London and Berlin are all wrong. So Rome.", "D"),
    ("Paris is incorrect.", None),
    ("The answer isn't Paris.", None),
    ("It can't be Paris", None),
    ("I'd rule out Paris.", None),
    ("It is not Paris.", None),
    ("Not Paris", None),
    ("Some say the answer is A.", None),
    ("If the answer were A, it would be odd.", None),
    ("I don't think it's A.", None),
    ("The answer is unlikely to be B.", None),
    ("Is it A?", None),
    ("So A or B.", None),
    ("One might choose A.", None),
    ("Option A is tempting.", None),
    ("Paris? No.", None),
    ("It's A or B", None),
    ("Let's consider option B.", None),
    ("The answer is C. No wait, that's wrong.", None),
    ("I'm not sure whether it's A.", None),
    ("Paris is wrong, and so is Rome.", None),
    ("B, because Paris is in France", "B"),
    ("B - Paris is in France.", "B"),
    ("It's B. Paris is in France.", "B"),
    ("Thus B, not Paris", "B"),
    ("Option A is tempting, but it's B", "B"),
    ("The right option is D, no wait, B.", "B"),
    ("It's B.", "B"),
    ("I'd say it's B", "B"),
    ("The answer is not A. It is B.", "B"),
    ("A, C and D are wrong. So B.", "B"),
    ("- B", "B"),
    ("Thus B", "B"),
    ("Both A and B look good, but B is better", "B"),
    ("London, because Paris is in France", "B"),
    ("The answer is London, not Paris.", "B"),
    ("So it must be London.", "B"),
    ("B — Rome is in Italy", "B"),
    ("I'd go with London.", "B"),
    ("The answer is A. Actually, it's B.", "B"),
    ("A? No. It's B.", "B"),
    ("The answer is not Paris but London.", "B"),
    ("At first I thought A, but it's B.", "B"),
    ("The answer is London.", "B"),
    ("I would say B.", "B"),
    ("First I chose A; on second thought, B.", "B"),
    ("* B", "B"),
    ("Therefore, B.", "B"),
    ("It has to be B.", "B"),
    ("The answer is Paris. Wait, no: London.", "B"),
    ("...the answer is C; however, on reflection, D.", "D"),
    ("Rule out A. Rule out B. The answer is C.", "C"),
]
DRUG_VERDICTS = [
    ("Not aspirin.", None),
    ("Heparin should be avoided.", None),
    ("Explanation of choice A: weak", None),
    ("Avoid heparin.", None),
    ("Aspirin is contraindicated.", None),
    ("Aspirin can't be given here.", None),
    ("The answer is heparin, not warfarin.", "C"),
    ("heparin", "C"),
    ("The patient needs insulin.", "D"),
]


@pytest.mark.parametrize(("gold", "answer", "right"), MARKED)
def test_case_order_units_options_and_intervals_in_a_box(gold, answer, right):
    assert grade_math({"gold": gold}, [f"So \\boxed{{{answer}}}."])["accuracy"] == right


@pytest.mark.parametrize(("gold", "said", "right"), SENTENCES)
def test_prose_keeps_sign_exponent_and_variable(gold, said, right):
    assert grade_math({"gold": gold}, [said])["accuracy"] == right


@pytest.mark.parametrize(
    ("choices", "said", "right"),
    [(choices, *row) for choices, rows in ((CITIES, VERDICTS), (DRUGS, DRUG_VERDICTS)) for row in rows],
)
def test_denied_and_mentioned_options_are_no_answers(choices, said, right):
    assert letter(said, choices) == right


UNITS = [
    ("7", "7\\text{ million}", 0),
    ("7", "7 million", 0),
    ("7", "7\\text{ hundred}", 0),
    ("7", "7\\text{ dozen eggs}", 0),
    ("7", "7\\text{ squared}", 0),
    ("7", "7\\text{k}", 0),
    ("7", "7\\text{ below zero}", 0),
    ("7", "7\\text{ x}", 0),
    ("7", "7\\text{ N}", 1),
    ("7", "7\\text{ (not possible)}", 0),
    ("7", "7\\text{ at most}", 0),
    ("5", "5\\text{ thousand dollars}", 0),
    ("5", "5\\text{ billion}", 0),
    ("5", "5\\text{ cubed}", 0),
    ("5", "5\\text{ factorial}", 0),
    ("3", "3\\text{ halves}", 0),
    ("3", "3\\text{ quarters}", 0),
    ("3", "3\\text{ tenths}", 0),
    ("7 \\text{ million}", "7", 0),
    ("5 \\text{ million}", "5\\text{ billion}", 0),
    ("7000000", "7\\text{ million}", 1),
    ("7000000", "7million", 1),
    ("700", "7\\text{ hundred}", 1),
    ("84", "7\\text{ dozen}", 1),
    ("5000", "5\\text{ thousand dollars}", 1),
    ("300000", "3\\text{ hundred thousand}", 1),
    ("1100000", "1.1 million", 1),
    ("2500000", "2\\frac12\\text{ million}", 1),
    ("7000", "7\\text{k}", 1),
    ("\\frac{3}{2}", "3\\text{ halves}", 1),
    ("0.3", "3\\text{ tenths}", 1),
    ("49", "7\\text{ squared}", 1),
    ("120", "5\\text{ factorial}", 1),
    ("-7", "7\\text{ degrees below zero}", 1),
    ("7", "7\\text{ apples}", 1),
    ("5", "5\\text{ more apples}", 1),
    ("5\\mathrm{~km/s}", "5\\mathrm{~m/s}", 0),
    ("5\\text{ J}", "5\\text{ kJ}", 0),
    ("5\\text{ mA}", "5\\text{ A}", 0),
    ("5\\text{ kHz}", "5\\text{ Hz}", 0),
    ("5\\text{ MW}", "5\\text{ mW}", 0),
    ("5\\text{ nm}", "5\\text{ m}", 0),
    ("5\\mathrm{~eV}", "5\\mathrm{~MeV}", 0),
    ("5\\mathrm{~Mpc}", "5\\mathrm{~kpc}", 0),
    ("12\\text{ a.m.}", "12\\text{ p.m.}", 0),
    ("5\\text{ AD}", "5\\text{ BC}", 0),
    ("5\\text{ left}", "5\\text{ right}", 0),
    ("5\\text{ north}", "5\\text{ south}", 0),
    ("5\\text{ red}", "5\\text{ blue}", 0),
    ("30^\\circ F", "30^\\circ C", 0),
    ("12\\text{ cm}^2", "12\\text{ cm}^3", 0),
    ("30^\\circ", "30^\\circ C", 1),
    ("30^\\circ C", "30\\text{ degrees Celsius}", 1),
    ("5\\mathrm{~km/s}", "5", 1),
    ("5", "5\\mathrm{~km/s}", 1),
    ("5\\text{ kJ}", "5\\text{ kilojoules}", 1),
    ("25 mph", "25\\text{ miles per hour}", 1),
    ("9.8\\text{ m/s}^2", "9.8\\text{ m s}^{-2}", 1),
    ("9.8\\text{ m/s}^2", "9.8\\text{ meters per second squared}", 1),
    ("12\\text{ cm}^2", "12\\text{ square centimeters}", 1),
    ("7\\text{ boxes}", "7\\text{ box}", 1),
    ("50\\%", "50\\text{ percent of the total}", 1),
]
NAMES = [
    ("y'", "y", 0),
    ("A'", "A", 0),
    ("y''", "y'", 0),
    ("2y'", "2y", 0),
    ("x_1'", "x_1", 0),
    ("x_A'", "x_A", 0),
    ("\\theta'", "\\theta", 0),
    ("i'", "i", 0),
    ("y''=2y'", "y''=2y", 0),
    ("AB'C'", "ABC", 0),
    ("f'(2)", "f(2)", 0),
    ("1'", "1", 0),
    ("5", "5'", 0),
    ("5", "5''", 0),
    ("5'", "5'", 1),
    ("y'", "y^{\\prime}", 1),
    ("y''", "y″", 1),
    ("2y'", "y'+y'", 1),
    ("f'(x)=2x", "2x", 1),
    ("5!!", "15", 1),
    ("8!!", "384", 1),
    ("45", "3\\cdot 5!!", 1),
    ("5!!", "(5!)!", 0),
    ("5!!", "120", 0),
    ("10", "5!!!", 0),
    ("n!!", "(n!)!", 0),
    ("n!!", "n!!", 1),
    ("30\\%", "0.3", 1),
    ("30\\%", "30", 1),
    ("30\\%", "0.03", 0),
    ("30\\%", "3000", 0),
    ("0.3", "30\\%", 0),
    ("\\emptyset", "\\{\\}", 1),
    ("\\{ \\}", "∅", 1),
    ("\\emptyset", "\\{0\\}", 0),
    ("\\emptyset", "0", 0),
    ("\\overline{AB}", "AB", 0),
    ("5", "five", 1),
    ("25", "\\text{Twenty-five}", 1),
    ("2,3", "two, three", 1),
    ("5", "six", 0),
    ("20", "twenty zero", 0),
    ("12", "one two", 0),
]
BOUNDS = [
    ("5", "The answer is at most 5.", 0),
    ("7", "The answer is about 7.", 1),
    ("7", "So the answer is simply 7.", 1),
    ("7", "The final answer is, therefore, exactly 7 metres.", 1),
    ("7", "The answer is not exactly 7.", 0),
    ("7", "The answer is then at most 7.", 0),
    ("5", "The answer is less than 5.", 0),
    ("7", "The answer is at least 7.", 0),
    ("7", "The answer is greater than 7.", 0),
    ("7", "The answer is greater than or equal to 7.", 0),
    ("7", "So it is no more than 7.", 0),
    ("5", "The answer is less than $5$.", 0),
    ("5", "The answer is $5$ or more.", 0),
    ("5", "The answer is 5 or more.", 0),
    ("5", "So it is 5 apples or more.", 0),
    ("7", "The answer is not $7$.", 0),
    ("7", "The answer is not 7 but 8.", 0),
    ("8", "The answer is not 7 but 8.", 1),
    ("8", "The answer is not $7$ but rather $8$.", 1),
    ("7", "Therefore, she has 7 apples left.", 1),
    ("7", "The answer is seven.", 1),
    ("7", "The answer is 7 million.", 0),
    ("7000000", "The answer is 7 million.", 1),
    ("7", "So she sold 7 million books.", 0),
    ("7000000", "So she sold 7 million books.", 1),
    ("300000", "So it costs 3 hundred thousand dollars.", 1),
    ("7", "So the temperature is 7 degrees below zero.", 0),
    ("-7", "So the temperature is 7 degrees below zero.", 1),
]


WRITTEN_OUT = [
    # a name before a tuple, a set or a matrix
    ("(3,4)", "(x,y)=(3,4)", 1),
    ("(4,3)", "(x,y)=(3,4)", 0),
    ("(x,y)=(3,4)", "(3,4)", 1),
    ("(x,y)=(3,4)", "(x,y)=(4,3)", 0),
    ("3", "(x,y)=(3,4)", 0),
    ("\\{1,2\\}", "S=\\{1,2\\}", 1),
    ("1,2", "x=1, x=2", 1),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "A^{-1}=\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", 1),
    # an exact value and a rounded one
    ("\\sqrt{2}", "\\sqrt{2} \\approx 1.414", 1),
    ("\\sqrt{3}", "\\sqrt{2} \\approx 1.414", 0),
    ("1.41", "\\sqrt{2} \\approx 1.41", 1),
    # all real numbers, sets by a condition, and for what an expression holds
    ("\\mathbb{R}", "(-\\infty,\\infty)", 1),
    ("\\mathbb{R}", "(-\\infty,0)", 0),
    ("(-\\infty,\\infty)", "\\text{all real numbers}", 1),
    ("[1,3]", "\\{x \\mid 1 \\leq x \\leq 3\\}", 1),
    ("(2,\\infty)", "\\{x \\in \\mathbb{R} : x \\ge 2\\}", 0),
    ("k\\pi", "x=k\\pi, k\\in\\mathbb{Z}", 1),
    ("k\\pi", "2k\\pi, k\\in\\mathbb{Z}", 0),
    ("f(x)=x", "f(x)=x \\text{ for all } x\\in\\mathbb{R}", 1),
    ("f(x)=x", "f(x)=x \\text{ for } x>0", 0),
    # words before and behind
    ("42", "\\text{The area is } 42", 1),
    ("42", "\\text{The answer is not } 42", 0),
    ("12", "12^{\\text{th}}", 1),
    ("12", "13\\text{th}", 0),
    ("10:15", "\\text{10:15 AM}", 1),
    # degrees in a function are no unit
    ("\\frac{1}{2}", "\\sin 30^\\circ", 1),
    ("\\sin 30", "\\sin 30^\\circ", 0),
    ("2\\sin 40^\\circ", "2\\cos 50^\\circ", 1),
]
SAID = [
    ("5", "Therefore:\n\n\\[\nx = 5\n\\]", 1),
    ("6", "Thus\n$$\nx + 1 = 6\n$$\nso\n$$\nx = 5\n$$", 0),
    ("5", "Thus\n$$\nx + 1 = 6\n$$\nso\n$$\nx = 5\n$$", 1),
    ("-5", "It is minus 5 degrees.", 1),
    ("5", "It is minus 5 degrees.", 0),
    ("5", "The answer is negative $5$.", 0),
    ("-5", "The answer is negative $5$.", 1),
    ("5", "So 12 minus 7 is 5.", 1),
    ("10", "So the probability is 7 out of 10.", 0),
    ("7/10", "So the probability is 7 out of 10.", 1),
    ("3", "So x lies between 2 and 3.", 0),
    ("2", "The answer isn't 2.", 0),
    ("2", "The answer cannot be 2.", 0),
    ("2", "I don't think the answer is 2.", 0),
    ("3", "The answer is 3. The answer can't be 2.", 1),
    ("5", "It's not hard: the answer is 5.", 1),
    ("5", "The answer is 5 (not 6).", 1),
]


@pytest.mark.parametrize(("gold", "answer", "right"), WRITTEN_OUT)
def test_values_with_what_models_write_around_them(gold, answer, right):
    assert grade_math({"gold": gold}, [f"\\boxed{{{answer}}}"])["accuracy"] == right


@pytest.mark.parametrize(("gold", "said", "right"), SAID)
def test_values_that_prose_denies_or_displays(gold, said, right):
    assert grade_math({"gold": gold}, [said])["accuracy"] == right


@pytest.mark.parametrize(("gold", "answer", "right"), UNITS)
def test_units_differ_unless_they_are_the_same_and_words_change_values(gold, answer, right):
    assert grade_math({"gold": gold}, [f"\\boxed{{{answer}}}"])["accuracy"] == right


@pytest.mark.parametrize(("gold", "answer", "right"), NAMES)
def test_primes_double_factorials_percentages_and_words_of_numbers(gold, answer, right):
    assert grade_math({"gold": gold}, [f"\\boxed{{{answer}}}"])["accuracy"] == right


@pytest.mark.parametrize(("gold", "said", "right"), BOUNDS)
def test_a_bound_in_prose_is_no_value(gold, said, right):
    assert grade_math({"gold": gold}, [said])["accuracy"] == right


@pytest.mark.parametrize(
    "shape",
    "A. X|a. x|a) x|(a) x|A.X|[A] X|**A** X|**A.** X|A – X|A - X|A = X|A: X|A X|Option A: X".split("|"),
)
@pytest.mark.parametrize("joint", [" ", ", ", "\n", "; "])
def test_a_list_of_the_options_is_no_answer(shape, joint):
    def listed(names):
        texts = [CHOICES["ABCD".index(name)] for name in names]
        parts = [shape.replace("A", name).replace("a", name.lower()) for name in names]
        return joint.join(part.replace("X", text).replace("x", text.lower()) for part, text in zip(parts, texts, strict=True))

    for names in ("ABCD", "ABC", "BCD", "DCBA", "AB"):
        assert letter(listed(names), CHOICES) is None
        assert letter(f"{listed(names)}\n\nThe answer is B", CHOICES) == "B"


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("A\nB\nC\nD", None),
        ("(A)\n(B)\n(C)\n(D)", None),
        ("a\nb", None),
        ("B\n\nB", "B"),
        ("A. Ibuprofen\nB. Bed rest\nC. Cortisone\nD. Dialysis\n\nC", "C"),
        ("A. Ibuprofen\nB. Bed rest\nC. Cortisone\nD. Dialysis\n\nC. Cortisone", "C"),
        ("The answer is B. Bed rest. B. Bed rest", "B"),
        ("Not A, not B, not C: D", "D"),
        ("Not A, not B: C or D", None),
        ("I would rule out A and B. C.", "C"),
        ("I would rule out A and B. C and D.", None),
        ("I would rule out A and B. C?", None),
        ("Vitamin: C", None),
        ("The best is A", "A"),
        ("The best is A or B", None),
        ("The best is not A", None),
        ("The best is A patient", None),
    ],
)
def test_lists_of_letters_and_what_is_left_over(said, right):
    assert letter(said, CHOICES) == right


NUMBERS = ["12", "15", "18", "21"]
SIGNED = ["-1", "1", "0", "2"]
TERMS = ["x + 1", "x - 1", "x", "1"]
READ_ALIKE = ["3 > 2", "3 < 2", "a-b", "a b"]
EXPLAINED = [
    # an option is its number with sign, decimals and what is around it
    (NUMBERS, "The answer is 15.", "B"),
    (NUMBERS, "\\boxed{15\\text{ cm}}", "B"),
    (NUMBERS, "We get $15$ from 3*5.", "B"),
    *((NUMBERS, f"The answer is {said}.", None) for said in ("15.5", "-15", "15%", "15,000", "15:18", "15^2", "1.15")),
    *((NUMBERS, f"\\boxed{{{said}}}", None) for said in ("-15", "15.5", "12/15", "15\\%")),
    (SIGNED, "The answer is -1.", "A"),
    (SIGNED, "The answer is \u22121.", "A"),
    (SIGNED, "\\boxed{-1}", "A"),
    (SIGNED, "The answer is 1.", "B"),
    (TERMS, "The answer is x + 1.", "A"),
    (TERMS, "\\boxed{x-1}", "B"),
    (TERMS, "\\boxed{x}", "C"),
    (TERMS, "\\boxed{x^3}", None),
    (READ_ALIKE, "The answer is 3 < 2.", "B"),
    (READ_ALIKE, "The answer is a b.", None),
    (["10%", "20%"], "The answer is 20\\%.", "B"),
    # the first option, and why not the others
    (
        CITIES,
        "The answer is **A. Paris**.\n\n- **B. London**: in England.\n- **C. Berlin**: no.\n- **D. Rome**: in Italy.",
        "A",
    ),
    (CITIES, "**Correct answer: A) Paris**\n\nB) London: north.\n\nC) Berlin: east.\n\nD) Rome: south.", "A"),
    (CITIES, "The answer is one of:\nA. Paris\nB. London\nC. Berlin\nD. Rome", None),
    (CITIES, "The answer is A. Paris, B. London or C. Berlin", None),
    (CITIES, "The correct answer is:\nA. Paris\nB. London\nC. Berlin\nD. Rome\n\nB", "B"),
    (CITIES, "The answer is\nA. Paris\nB. London\nC. Berlin\nD. Rome", None),
    (CITIES, "final_answer: C", "C"),
    # what is singled out where nothing announces an answer
    (CITIES, "A. Paris - large.\nB. London - old.\nC. Berlin - cold.\nD. Rome - hot.\n\nThe most likely city is Berlin.", "C"),
    (CITIES, "The most appropriate next step is B.", "B"),
    (CITIES, "Berlin is the most likely city. Rome is less likely.", "C"),
    (CITIES, "Between A and B, B is more likely.", "B"),
    (CITIES, "The answer is B. In the south, the most likely city is Rome.", "B"),
    (CITIES, "The most likely city is not Rome.", None),
    (CITIES, "B is most likely wrong.", None),
    (CITIES, "Rome is less likely.", None),
    (CITIES, "I believe B is the best answer.", "B"),
    (CITIES, "I don't believe B is the best answer.", None),
    (CITIES, "A, C and D can be ruled out, leaving B.", "B"),
    # denied with its letter, supposed, or both
    (CITIES, "The city is London (option B), rather than Paris (option A).", "B"),
    (CITIES, "The answer is not Paris (A) but London (B).", "B"),
    (CITIES, "The answer is A. However, if it were cold, the answer would be D.", "A"),
    (CITIES, "If it had been cold, D would have been right. It is warm: B.", "B"),
    (CITIES, "The correct answer would be B.", "B"),
    (CITIES, "Both A and B are correct.", None),
    (CITIES, "A is wrong and B is correct.", "B"),
    (CITIES, "Correct answer: B\nIncorrect: A, C, D", "B"),
    # marks and signs around a letter
    (CITIES, "- A: \u274c\n- B: \u2705\n- C: \u274c\n- D: \u274c", "B"),
    (CITIES, "A. Paris \u274c\nB. London \u2705\nC. Berlin \u274c\nD. Rome \u274c", "B"),
    (CITIES, "| A | Incorrect |\n| B | Correct |\n| C | Incorrect |", "B"),
    (CITIES, "The answer is \u201cB\u201d.", "B"),
    (CITIES, "The answer is \\(B\\).", "B"),
    (CITIES, "\\boxed{\\text{London (B)}}", "B"),
    (CITIES, "\\boxed{\\text{London (C)}}", None),
]


@pytest.mark.parametrize(("choices", "said", "right"), EXPLAINED)
def test_answers_with_their_reasons(choices, said, right):
    assert letter(said, choices) == right


INTERVALS = r"(2,12) \cup (12,102)"
SPELLINGS = [
    # within brackets a comma sets numbers apart, elsewhere it groups thousands
    (INTERVALS, r"\boxed{(2, 12) \cup (12, 102)}", 1),
    (INTERVALS, r"\boxed{(2,12) \cup (12102)}", 0),
    ("(1,200,300)", r"\boxed{(1, 200, 300)}", 1),
    ("(1,200,300)", r"\boxed{1200300}", 0),
    ("(-1,200)", r"\boxed{-1200}", 0),
    (r"[100,200]\cup[300,400]", r"\boxed{[100, 200] \cup [300, 400]}", 1),
    ("(1,1006),(3,331),(11,31)", r"\boxed{(1, 1006), (3, 331), (11, 31)}", 1),
    ("(312,123,231)", r"\boxed{(312123231)}", 0),
    (r"\frac{448}{15625}", r"\boxed{\frac{448}{15,625}}", 1),
    (r"\frac{448}{15625}", r"\boxed{\frac{448}{15{,}625}}", 1),
    (r"\sqrt{1234}", r"\boxed{\sqrt{1,234}}", 1),
    ("1000", r"\boxed{(1,000)}", 1),
    *((r"90^\circ", rf"\boxed{{{said}}}", 1) for said in (r"90\degree", "90^o", r"90^\text{o}", r"90^{\text{o}}", r"90 \deg")),
    # a decimal begins with its point
    ("0.35", "The answer is .35.", 1),
    ("35", "The answer is .35.", 0),
    ("5", "Answer: .5", 0),
    ("5", r"\boxed{\displaystyle .5}", 0),
    ("0.5", r"\boxed{\left. \frac12 \right.}", 1),
    # units
    *(("60", rf"\boxed{{60{unit}}}", 1) for unit in (" km/h", " m/s", " m/s^2", "/hour", "g", "m", "L")),
    ("60", r"\boxed{60\ \frac{\text{miles}}{\text{hour}}}", 1),
    ("60", "#### $60/day", 1),
    ("60", "So it is 60 m/s^2.", 1),
    ("60", r"\boxed{60x}", 0),
    ("60 km/h", r"\boxed{60 m/s}", 0),
    ("5m", r"\boxed{5}", 0),
    # an equation in one unknown is no name of its right side
    *(("5", rf"\boxed{{{side} = 5}}", 0) for side in ("2x", "x - 2", "x^2", r"\frac{x}{2}", r"\sqrt{x}", r"2\theta")),
    *(("5", rf"\boxed{{{side} = 5}}", 1) for side in ("x", "f(2)", "|AB|", r"P(A \cap B)", r"\angle A", r"\text{Area}")),
    *(("5", rf"\boxed{{{side} = 5}}", 1) for side in ("2+3", "x+y", "x_1+x_2", "f^{-1}(2)", r"\theta")),
    # values of other names are in order
    ("a=1,b=2", r"\boxed{2,1}", 0),
    ("a=1,b=2", r"\boxed{1,2}", 1),
    ("x=1,x=2", r"\boxed{2,1}", 1),
]
TOLD = [
    # an explanation begins behind a value
    ("45", "The total cost for the trip is $45.", 1),
    ("12", "Answer: The total cost for 3 shirts is $12.", 1),
    ("12", "Answer: The total cost for $3$ shirts is $12$.", 1),
    ("12", "After 5 days, he has 12 apples left.", 1),
    ("12", "The amount paid by John is $12.", 1),
    ("12", "The number of students who are not girls is 12.", 1),
    ("260", "Toulouse, Charleston, and Seattle have 260 sheep together.", 1),
    ("5", "He spends $5 because 10 x .5 = 10", 1),
    ("3", "The answer is 3 (2 blue and 1 white).", 1),
    ("18", "The answer is 18 dollars a day (that is, $126 a week).", 1),
    *(
        ("60", f"#### 60{rest}", 1)
        for rest in (" (apples)", " apples (12 per person)", " apples, since 12*5=60", " apples left over")
    ),
    # lines between marks, and lists
    ("12", "Final answer:\n\n$$\n12\n$$", 1),
    ("12", "Final answer:\n\n\\[\n12\n\\]", 1),
    ("12", "The answer is:\n\n- 12 apples", 1),
    # what a value is in, of or to do
    *(("12", said, 1) for said in ("She earned $12 in 4 hours.", "It costs $12 to buy 3 books.", "We add 3 and 9 to get 12.")),
    ("12", "Final Answer: The car travels 12 miles in 3 hours.", 1),
    ("3", "There are 12 apples in 3 baskets.", 0),
    ("240", "So she has $1600 - $1360 = $240 in 20 days", 1),
    ("370", "So they need 300+70 = 370 coffee cups in 1 week", 1),
    # two answers, and one that is withdrawn
    *(("6", said, 0) for said in (r"\boxed{5} or \boxed{6}", "It is either 5 or 6.", "So it is 5 or 6.", "x could be 5 or 6")),
    ("6", r"\boxed{6}. Not \boxed{7}", 1),
    ("0.5", r"\boxed{\frac12} or \boxed{0.5}", 1),
    *(
        ("5", said, 0)
        for said in ("#### 5\nWait, that is wrong. The answer is 7.", "\\boxed{5}. Wait, I made a mistake; it is 7.")
    ),
    ("7", "The answer is 5. Wait, that is wrong: it should be 7.", 1),
    ("5", "The answer is 5. Wait, is that wrong? No, it is right.", 1),
    # announced without a value
    ("12", "To get the answer: first 3+4 = 7.\nThen 7+5 = 12.", 1),
    ("12", "We verify: the answer is an integer.\nThus x = 12.", 1),
    ("5", "Let the answer be x. Then x+2=7. So x=5.", 1),
    # "times" behind a number
    ("40", "So he sneezed 120/3=40 times", 1),
]


@pytest.mark.parametrize(("gold", "answer", "right"), [*SPELLINGS, *TOLD])
def test_values_as_they_are_spelled_and_told(gold, answer, right):
    assert grade_math({"gold": gold}, [answer])["accuracy"] == right


@pytest.mark.parametrize(
    ("question", "gold", "answer", "right"),
    [
        ("How many dozens of eggs?", "7", r"\boxed{7\text{ dozen}}", 1),
        ("How many dozens of eggs?", "7", "So she has 7 dozen eggs.", 1),
        ("How many quarters has he?", "7", r"\boxed{7 quarters}", 1),
        ("How many eggs?", "7", r"\boxed{7\text{ dozen}}", 0),
        ("How many eggs?", "84", r"\boxed{7\text{ dozen}}", 1),
    ],
)
def test_what_a_question_counts_in(question, gold, answer, right):
    assert grade_math({"question": question, "gold": gold}, [answer])["accuracy"] == right


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (r"\boxed{B} or \boxed{C}", None),
        (r"The answer is \boxed{B}. Not \boxed{C}.", "B"),
        (r"\boxed{B}. So \boxed{C}", "C"),
        (r"\boxed{B}, \boxed{B}", "B"),
    ],
)
def test_several_boxes_of_letters(said, right):
    assert letter(said, CHOICES) == right


def test_an_expression_that_took_too_long_is_read_again(monkeypatch):
    def run_out(*args, **kwargs):
        raise values.OutOfTime

    with monkeypatch.context() as patched:
        patched.setattr(values.math_verify(), "parse", run_out)
        assert values.parsed("17.25+x") is None
    assert values.parsed("17.25+x") is not None


def test_gold_of_a_worked_solution():
    def gold(said):
        return math_docs(Dataset.from_list([{"prompt": "?", "completion": said}]))["gold"][0]

    for said in ("2+3 = \\boxed{5}", "2+3\n#### 5", "2+3 is five. The answer is 5.", "5"):
        assert gold(said) == "5"
    for said in ("61.bb:pq", "Add the numbers", ""):
        with pytest.raises(
            RecipeError, match=r"row 1: its solution or completion .* marks no final answer.*final_answer, answer"
        ):
            gold(said)


LOOPS = [
    "the answer is ",
    "answer ",
    "answer: ",
    "A ",
    "A. ",
    "option A ",
    "not the most likely ",
    "*_",
    "(",
    " ",
    "\n",
    "aly ",
]
LOOPS += [
    "A is definite ",
    "\\boxed{x} ",
    "\\boxed{",
    "}",
    "A. Ibuprofen B. Bed rest C. Cortisone D. Dialysis ",
    "<think>",
    "#### ",
]


class Counting:
    """The module `re`, which notes how many characters it is given, and with which patterns."""

    def __init__(self):
        self.characters, self.patterns = 0, set()

    def __getattr__(self, name):
        plain = getattr(re, name)
        if name not in ("sub", "findall", "finditer", "fullmatch", "search", "split", "match"):
            return plain

        def counted(pattern, *args, **kwargs):
            text = args[1] if name == "sub" else args[0]
            self.characters += len(text)
            if len(text) > 1000:
                self.patterns.add(pattern)
            return plain(pattern, *args, **kwargs)

        return counted


def is_bounded(pattern):
    """Whether no match reaches further than 2,000 characters, but for a run at the end, which is taken as a whole."""
    parsed = parser.parse(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)
    *most, last = parsed.data
    run = last[0] in (parser.MAX_REPEAT,) or (len(parsed.data) == 2 and "\\1" in str(pattern))
    _, high = parser.SubPattern(parsed.state, most).getwidth() if run and most else (0, 0) if run else parsed.getwidth()
    return high <= 2000


@pytest.mark.parametrize("loop", LOOPS)
def test_reading_a_letter_takes_steps_in_proportion_to_the_answer(loop, monkeypatch):
    steps = []
    for length in (8000, 16000, 32000):
        counting = Counting()
        for module in (letters, exam):
            monkeypatch.setattr(module, "re", counting)
        letter((loop * length)[:length], CHOICES)
        assert all(map(is_bounded, counting.patterns)), counting.patterns
        steps.append(counting.characters / length)
    assert max(steps) <= 60
    assert steps[2] <= 1.2 * steps[0] + 1


def test_patterns_over_whole_answers_are_bounded():
    for pattern in (math.BRACE, prose.STATED, exam.MARK):
        assert is_bounded(pattern)
    assert not is_bounded(r"a.*b")


HUGE = [
    "9^{9^{9^{9}}}",
    "9^9^9^9^9",
    "((((9!)!)!)!)",
    "10^{10^{100}}!",
    "\\binom{9999\\cdot 9999}{99\\cdot 9999}",
    "e^{e^{e^{e^{10}}}}",
]
HUGE += ["\\sum_{k=1}^{10^{12}} k", "\\gcd(9^{9^9},3)", "1.5e999999999", "1e-999999999", "{" * 5000, "(" * 5000, "1," * 5000]
HUGE += ["\\frac" * 300, "x^-" * 300, "5" + "%" * 900, "(1," * 500 + "1" + ")" * 500, "x=" * 900 + "1", "|x" * 300, "9" * 1900]


@pytest.mark.parametrize("answer", HUGE, ids=lambda answer: answer[:12])
def test_no_answer_is_too_much(answer, monkeypatch):
    """math-verify reads few and short expressions, and no number is computed beyond its bound."""
    read, plain = [], values.math_verify().parse
    values._parsed.cache_clear()
    monkeypatch.setattr(
        values.math_verify(), "parse", lambda text, *args, **kwargs: read.append(len(text)) or plain(text, *args, **kwargs)
    )
    for said in (f"\\boxed{{{answer}}}", f"The answer is {answer}.", answer * 3):
        for gold in ("7", "(1,2)", "\\frac{x^2+1}{2}"):
            assert grade_math({"gold": gold}, [said]) == {"accuracy": 0.0}
    assert len(read) <= 30
    assert max(read, default=0) <= 2 * values.MOST_READ
    if "{" * 9 not in answer and "(" * 9 not in answer:
        assert grade_math({"gold": answer}, [f"\\boxed{{{answer}}}"]) == {"accuracy": 1.0}


def test_sizes_are_bounded_before_they_are_computed():
    for text in ("9^{9^{9^{9}}}", "((9!)!)!", "10^{10^{10}}"):
        with pytest.raises(values.TooLarge):
            values._bits(values.parsed(text))
    assert values._bits(values.parsed("2006!")) < values.MOST_BITS


def test_boxes_within_boxes_are_read_once():
    many = 20000
    assert math.final_answer("\\boxed{" * many) is None
    assert math.final_answer("\\boxed{" * many + "1" + "}" * many) == "1"
    assert len(math.BRACE.findall("\\boxed{" * many + "1" + "}" * many)) == 2 * many
