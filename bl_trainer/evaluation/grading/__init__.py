"""What an answer is worth: mathematics by value, options by their letter, words by exact match and Jaro-Winkler."""

from .letters import grade_letter, letter, letter_docs
from .math import final_answer, grade_math, is_same_math, math_docs
from .reasoning import split_reasoning, without_reasoning
from .words import grade_word, word_docs

__all__ = [
    "final_answer",
    "grade_letter",
    "grade_math",
    "grade_word",
    "is_same_math",
    "letter",
    "letter_docs",
    "math_docs",
    "split_reasoning",
    "without_reasoning",
    "word_docs",
]
