"""What the rows themselves say of their target tokens: which are a format's, and which do rows of the same context share."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..measurement.means import Means
from .report import Foretold

BELOW = 0.1  # p under the base model below which a target is improbable
FORMAT = 2 / 3  # share of examples with one token at one place, from which the token is a format's
VALID = 0.25  # share of the rows of one context, from which a token there is an answer of its own
VALUES = ("learnable", "noise", "contradicted", "low", "gain")
SURE = math.log(20)  # of one hypothesis against the other: an error in 20 at most


class Evidence(NamedTuple):
    """Of N target tokens, each (N,), bool. `is_format`: `FORMAT` of the examples have it at its place, counted from the first
    target or from the last. `is_repeated`: rows of the same context have it more often than chance explains.
    `is_contradicted`: these rows have other tokens, and have it less often than a share of `VALID` explains.
    """

    is_format: Tensor
    is_repeated: Tensor
    is_contradicted: Tensor

    @property
    def is_known(self) -> Tensor:
        """Whether the rows show the target to be predictable."""
        return self.is_format | self.is_repeated

    @property
    def is_decided(self) -> Tensor:
        """Whether the rows decide, so that no control is needed."""
        return self.is_known | self.is_contradicted


def evidence(token: Tensor, example: Tensor, context: Tensor) -> Evidence:
    """Return what N target tokens, in reading order, say of each other.

    `token`: ids. `example`: numbers of examples. `context`: numbers, equal where all tokens before the target are. Each is
    int64 and (N,).

    Chernoff's bounds on binomials decide: P(k or more of n) <= exp(-n KL(k/n, q)). k of n other rows of the context agree. q is
    the token's share at that place in other contexts, counted with one more.
    """
    if not len(token):
        return Evidence(*[torch.zeros(0, dtype=torch.bool)] * 3)
    example = _numbers(example)
    count, place = int(example.max()) + 1, torch.arange(len(token))
    first = torch.full((count,), len(token)).scatter_reduce_(0, example, place, "amin")[example]
    last = torch.zeros(count, dtype=torch.long).scatter_reduce_(0, example, place, "amax")[example]
    starts, ends = place - first, last - place
    formats = [_sizes(_pairs(each, token)) / count for each in (starts, ends)]
    size, same = _sizes(_numbers(context)), _sizes(_pairs(_numbers(context), token))
    others = size - 1
    rate = (same - 1) / others.clamp(min=1)
    elsewhere = ((_sizes(_pairs(starts, token)) - same + 1) / (_sizes(starts) - size + 1)).clamp(1 / len(token), 1 - 1e-9)
    return Evidence(
        torch.maximum(*formats) >= FORMAT,
        (rate > elsewhere) & (others * _divergence(rate, elsewhere) >= SURE),
        (rate < VALID) & (others * _divergence(rate, torch.full_like(rate, VALID)) >= SURE),
    )


def contexts(rows: Sequence[Iterable[int]], example: Tensor, place: Tensor) -> Tensor:
    """Return a hash of the tokens before each target, (N,) int64; `place`: its index in the ids `rows[example]`."""
    hashes = []
    for ids in rows:
        own = [0]
        for token in ids:
            own.append(hash((own[-1], int(token))))
        hashes.append(own)
    return torch.tensor([hashes[i][j] for i, j in zip(example.tolist(), place.tolist(), strict=True)], dtype=torch.long)


def matched(places: Tensor, logp: Tensor, is_same: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of each improbable target's control, (N,), and the target's log p there; NaN where none will do.

    `places`: C candidates of each, (N, C). `logp`: under the base model, of the target at its own place, then at those,
    (N, 1 + C). `is_same`: whether a candidate's target is the same token. The control is the candidate of the nearest log p.
    """
    gap = (logp[:, 1:] - logp[:, :1]).abs()
    gap[is_same | (logp[:, 1:] >= math.log(BELOW))] = math.inf
    nearest, best = gap.min(dim=1, keepdim=True)
    found = logp[:, 1:].gather(1, best).masked_fill(nearest.isinf(), math.nan)
    return places.gather(1, best)[:, 0], found[:, 0]


def shares(base: Tensor, gain: Tensor, control: Tensor, found: Evidence) -> Tensor:
    """Return the probe's values of N targets, (5, N) float64, in the order of `VALUES`.

    `base`: log p under the base model; `gain`: its rise, both (N,). `control`: the rise of each improbable target's token at
    its control, NaN without one. What is a format's, or repeated in its context, is predictable. What its context contradicts
    is not. Of the rest the sign of the gain less the control's decides.
    """
    is_low = base < math.log(BELOW)
    learnable = torch.zeros_like(gain, dtype=torch.float64)
    learnable[is_low] = (gain[is_low] - control).nan_to_num().sign().double()
    learnable[found.is_contradicted] = 0
    learnable[is_low & found.is_known] = 1
    contradicted = is_low & found.is_contradicted & ~found.is_known
    return torch.stack([learnable, is_low.double() - learnable, contradicted.double(), is_low.double(), gain.double()])


def summed(values: Tensor, owner: Tensor, count: int) -> Means:
    """Return the means of `shares` over targets; `owner`: which of `count` examples each is of, (N,)."""
    sums = torch.zeros(len(values), count, dtype=torch.float64).index_add_(1, owner, values)
    means = Means(VALUES)
    means.add(torch.bincount(owner, minlength=count), sums)
    return means


def foretold(means: Means) -> Foretold:
    """Return what a report has of these means."""
    noise, contradicted = map(means.interval, ("noise", "contradicted"))
    return Foretold(**means.summary(), noise_interval=noise, contradicted_interval=contradicted)


def _numbers(values: Tensor) -> Tensor:
    return values.unique(return_inverse=True)[1]


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    second = _numbers(second)
    return _numbers(first * (second.max() + 1) + second)


def _sizes(numbers: Tensor) -> Tensor:
    """Return how many have each one's number."""
    return numbers.bincount()[numbers]


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return KL between two coins, in nats."""
    return torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))
