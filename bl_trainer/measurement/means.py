"""Means over tokens, with intervals over examples."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._util.intervals import mean_interval, unequal
from ..tokens.annotation import TokenBatch

VALUES = ("prob", "nll", "entropy", "top1", "above_paper", "conflicts")

# Which values a mean can have, if not all
BOUNDS = {
    **dict.fromkeys(("prob", "base_prob", "top1", "base_top1", "above_paper", "conflicts", "low", "contradicted"), (0.0, 1.0)),
    **dict.fromkeys(("nll", "base_nll", "entropy", "kl", "reverse_kl"), (0.0, math.inf)),
    "js": (0.0, math.log(2)),
    "learnable": (-1.0, 1.0),
    "noise": (0.0, 2.0),
}

RESIDUAL = 1e-12  # a share of a sum of squares that may be the rounding of it

MAX_PARTS = 10_000  # examples, cut up by packing, of which further parts are waited for


class Means:
    """Means over tokens whose uncertainty counts examples, not tokens, since the tokens of one example are alike.

    With s_i the sum of a value over the n_i tokens of example i, the mean is R = sum s_i / sum n_i. Its variance, by
    linearisation, is c sum (s_i - R n_i)^2 / (sum n_i)^2, with c of `unequal`. All that is kept is the Gram matrix of
    (1, n_i, s_i, ..., n_i^2, n_i^3).
    """

    def __init__(self, names: Sequence[str] = VALUES):
        self.names = tuple(names)
        self.gram = torch.zeros(len(names) + 4, len(names) + 4, dtype=torch.float64)

    def add(self, num_tokens: Tensor, sums: Tensor) -> None:
        """Add m examples: `num_tokens` (m,), and `sums` (names, m) of each value over their tokens."""
        size = num_tokens.double()[None]
        rows = torch.cat([torch.ones_like(size), size, sums.double(), size**2, size**3])[:, num_tokens > 0]
        self.gram += rows @ rows.T

    @property
    def num_examples(self) -> int:
        return int(self.gram[0, 0])

    @property
    def num_tokens(self) -> int:
        return int(self.gram[0, 1])

    def mean(self, name: str) -> float:
        """Return the mean over tokens; NaN if there are none."""
        return (self.gram[0, 2 + self.names.index(name)] / self.gram[0, 1]).item()

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of `mean`, or None below 10 examples, where it would be a guess.

        It is for the source that the examples were drawn from, and within `BOUNDS`. None, too, of examples that are all alike
        in a value without bounds.
        """
        if self.num_examples < 10:
            return None
        j, mean, total = 2 + self.names.index(name), self.mean(name), self.gram[0, 1]
        residual = (self.gram[j, j] - 2 * mean * self.gram[1, j] + mean**2 * self.gram[1, 1]).item()
        if residual <= RESIDUAL * self.gram[j, j].item():
            residual = 0.0
        sums = (self.gram[1, 1], self.gram[1, -2], self.gram[-2, -2], self.gram[-2, -1])
        factor, free = unequal(*((each / total**k).item() for k, each in enumerate(sums, 2)))
        error = math.sqrt(factor * residual) / total.item()
        return mean_interval(mean, error, free, (total**2 / self.gram[1, 1]).item(), BOUNDS.get(name))

    def summary(self) -> dict[str, Any]:
        """Return counts, means and the interval of the first value."""
        first = self.names[0]
        counts = {"examples": self.num_examples, "tokens": self.num_tokens}
        means = {name: self.mean(name) for name in self.names}
        return {**counts, **means, f"{first}_interval": self.interval(first)}


ExampleKey = tuple[int, str | None]  # row and group


class ExampleSums:
    """Hands sums over examples on to `count(keys, num_tokens, sums)`, each example once, also where packing cuts it up.

    `keys`: (row, group) of each example.
    Of an example that is cut up, the parts come one by one; at most `MAX_PARTS` such examples wait for more.
    """

    def __init__(self, count: Callable[[list[ExampleKey], Tensor, Tensor], None]):
        self.count = count
        self.waiting: dict[ExampleKey, Any] = {}

    def add(self, batch: TokenBatch, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add `values`, (names, N), of a batch's tokens. Returns number of tokens and sums by example, (m,) and (names, m)."""
        examples = batch.examples
        num_tokens = torch.bincount(batch.example, minlength=len(examples))
        sums = values.new_zeros(len(values), len(examples)).index_add_(1, batch.example, values)
        whole = torch.tensor([not example["is_part"] for example in examples], dtype=torch.bool)
        keys = [(example["row"], example["group"]) for example in examples]
        self.count([keys[e] for e in whole.nonzero().flatten().tolist()], num_tokens[whole], sums[:, whole])
        for e in (~whole).nonzero().flatten().tolist():
            key = keys[e]
            tokens, total = self.waiting.pop(key, (0, 0))
            self.waiting[key] = (tokens + num_tokens[e], total + sums[:, e])
        self.finish(MAX_PARTS)
        return num_tokens, sums

    def finish(self, keep: int = 0) -> None:
        """Count the examples whose last part came longest ago, down to `keep`."""
        keys = list(itertools.islice(self.waiting, max(0, len(self.waiting) - keep)))
        if keys:
            tokens, sums = zip(*(self.waiting.pop(key) for key in keys), strict=True)
            self.count(keys, torch.stack(tokens), torch.stack(sums, dim=1))
