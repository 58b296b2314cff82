"""What several answers to an item say beside their mean: whether a checkpoint still explores, as RL after SFT needs."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from .grading.math import final_answer

DISTINCT = "distinct_answers"
ENTROPY = "answer_entropy"
FORMAT = "format"


UNDIRECTED = re.compile(rf"(^|/)({DISTINCT}|{ENTROPY})($|[@:])")  # more is neither better nor worse; maybe TASK/METRIC


def has_direction(metric: str) -> bool:
    """Whether more of a metric, or less, is better; not of how answers differ."""
    return UNDIRECTED.search(metric) is None


def bounds_of(metric: str, values: Iterable[float]) -> tuple[float, float] | None:
    """Return the bounds of a metric, as far as its name and `values` tell: 0 and 1 if all lie between these; None of others."""
    found = UNDIRECTED.search(metric)
    if found and found[2] == ENTROPY:
        return 0.0, math.inf
    return (0.0, 1.0) if all(0 <= value <= 1 for value in values) else None


def pass_at(right: int, answers: int, k: int) -> float:
    """Return 1 - C(n - c, k) / C(n, k): without bias, the probability that one of `k` answers is right.

    `right`: c, of n `answers`, n >= k. Source: Chen et al., https://arxiv.org/abs/2107.03374, sec. 2.1.
    """
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def pass_name(metric: str, k: int) -> str:
    """Return the name in results of pass@k by a metric of single answers."""
    return f"{metric},pass@{k}"


def names_of(metrics: Iterable[str], ks: Collection[int], samples: int) -> list[str]:
    """Return the names of what is added to a task's `metrics`, if all of these are 0 or 1."""
    return [pass_name(metric, k) for metric in metrics for k in ks] + ([DISTINCT, ENTROPY] if samples > 1 else [])


def at_temperature(metric: str, temperature: float | None) -> str:
    """Return the name of a metric of answers sampled at a temperature: `accuracy@T0.5,pass@2:macro`; of None, as it is."""
    name, rest = re.match(r"([^,:]*)(.*)", metric, re.DOTALL).groups()  # type: ignore[union-attr]
    return metric if temperature is None else f"{name}@T{temperature:g}{rest}"


def is_of_all(metric: str) -> bool:
    """Whether a metric, maybe of a group of items, is one of all answers together, not the mean of those of each."""
    return re.split("[:@]", metric)[0] in (DISTINCT, ENTROPY) or is_pass(metric)


def is_pass(metric: str) -> bool:
    """Whether a metric is a pass@k, maybe of a group of items."""
    return re.search(r",pass@\d+(:|$)", metric) is not None


def diversity(answers: Sequence[str]) -> dict[str, float]:
    """Return the share of distinct answers to an item, and the entropy in nats of their shares, from 0 to log n.

    Two answers are the same if their final answers are, whitespace apart: what a \\boxed{} or #### marks, else the whole text.
    The entropy is that of the sample; with few answers it is below the model's own.
    """
    counts = Counter(" ".join((found if (found := final_answer(each)) is not None else each).split()) for each in answers)
    shares = [count / len(answers) for count in counts.values()]
    return {DISTINCT: len(counts) / len(answers), ENTROPY: math.fsum(-share * math.log(share) for share in shares) + 0.0}
