"""Grade-school mathematics: GSM8K's rows, and training sets of them with wrong answers."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import load_dataset

from miniature import read_rows

LONGEST = 320  # characters of an answer
MARK = "#### "  # before the final number


def read(folder: str | None, split: str) -> list[dict[str, Any]]:
    """Return a split's questions and answers, of `folder`/`split`.jsonl, or of the Hub's openai/gsm8k without a folder."""
    rows = read_rows(Path(folder) / f"{split}.jsonl") if folder else load_dataset("openai/gsm8k", "main", split=split)
    return [{"question": row["question"], "answer": plain(row["answer"])} for row in rows]


def plain(answer: str) -> str:
    """Return an answer without the calculator's annotations."""
    return "".join(part.split(">>")[-1] for part in answer.split("<<"))


def finals(problems: list[dict[str, str]], rng: random.Random, share: float) -> Iterator[tuple[str, str, str]]:
    """Yield problems in random order with their answers. A share of the answers end with another number, 1 to 20 away.

    That number may be negative, and has no commas.
    """
    for each in rng.sample(problems, len(problems)):
        working, number = each["answer"].split(MARK)
        off, wrong = rng.choice([n for n in range(-20, 21) if n]), rng.random() < share
        final = str(int(number.replace(",", "")) + off) if wrong else number
        yield f"{each['question']}\n", f"{working}{MARK}{final}", "wrong" if wrong else "right"


def swapped(problems: list[dict[str, str]], rng: random.Random, share: float) -> Iterator[tuple[str, str, str]]:
    """Yield half of the problems in random order, a share of them with the answer to one of the other half."""
    order = rng.sample(problems, len(problems))
    half = len(order) // 2
    for each, other in zip(order[:half], order[half:], strict=False):
        wrong = rng.random() < share
        yield f"{each['question']}\n", (other if wrong else each)["answer"], "wrong" if wrong else "right"


def noisy(folder: str | None) -> dict[str, tuple[Callable[..., Iterator[Any]], float]]:
    """Return training sets by name, each with its share of wrong rows; of answers of at most LONGEST characters."""
    problems = [row for row in read(folder, "train") if len(row["answer"]) <= LONGEST]
    return {
        "GSM8K final numbers 20 %": (partial(finals, problems), 0.2),
        "GSM8K swapped answers 20 %": (partial(swapped, problems), 0.2),
    }
