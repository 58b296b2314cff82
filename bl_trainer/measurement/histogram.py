"""Counts of tokens by p."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import MeasurementError

# p, or 1 - p from 1/2 on, is binned by the leading bits of its float64 form: exponent and MANTISSA bits. So every bin is at
# most 2^-MANTISSA of min(p, 1 - p) wide. Bin 0 has what is below 2^LEAST.
MANTISSA, LEAST = 11, -126

_SHIFT = 52 - MANTISSA

_FIRST = (1023 + LEAST << MANTISSA) - 1  # the leading bits of bin 0

_HALF = (1022 << MANTISSA) - _FIRST  # the bin of 1/2

PERCENTILE_ERROR = 2.0**-MANTISSA

TINY = 1e-300  # a threshold in place of p = 0, which would be none


class ProbabilityHistogram:
    """Counts of tokens by p, fine enough for percentiles and for the mean of any function of p.

    Its resolution is `PERCENTILE_ERROR` = 2^-11 of min(p, 1 - p): 0.0005 relative, near 0 as near 1. `rows` histograms side
    by side. Below 2^LEAST, p counts as 0 (and likewise 1 - p).
    """

    def __init__(self, rows: int = 1):
        self.counts = torch.zeros(rows, 2 * _HALF + 1, dtype=torch.int64)

    def add(self, logp: Tensor, row: int = 0) -> None:
        """Count tokens by their log-probability, a float tensor of any shape. Raises MeasurementError on NaN."""
        wide = logp.detach().flatten().cpu().double()
        if wide.isnan().any():
            raise MeasurementError("The model gives probabilities that are NaN. Check the checkpoint, or try `dtype: float32`.")
        p, rest = wide.exp(), -wide.expm1()
        small = torch.minimum(p, rest).clamp(min=0)
        bins = ((small.view(torch.int64) >> _SHIFT) - _FIRST).clamp(min=0)
        bins = torch.where(p <= 0.5, bins, 2 * _HALF - bins)
        self.counts[row] += torch.bincount(bins, minlength=self.counts.shape[1])

    def values(self) -> tuple[Tensor, Tensor]:
        """Return log p and log(1 - p) at the middle of each bin, float64."""
        edges = self._edges()
        middle = (edges[:-1] + edges[1:]) / 2
        middle[0] = 0
        middle = torch.cat([middle, edges[-1:]])  # of its own bin only p = 1/2 is in use
        log_p = torch.cat([middle.log(), torch.log1p(-middle[:-1].flip(0))])
        log_rest = torch.cat([torch.log1p(-middle), middle[:-1].flip(0).log()])
        return log_p, log_rest

    @staticmethod
    def _edges() -> Tensor:
        """Return the lower edge of each bin up to that of 1/2, float64."""
        edges = (torch.arange(_HALF + 1) + _FIRST << _SHIFT).view(torch.float64)
        edges[0] = 0
        return edges

    def _lowest(self) -> Tensor:
        """Return for each bin a p that none of its tokens is below, float64."""
        edges = self._edges()
        rest = edges[1:].flip(0)
        above_half = 1 - rest
        rounded_up = 1 - above_half < rest
        return torch.cat([edges, torch.where(rounded_up, above_half.nextafter(torch.zeros(())), above_half)])

    def percentiles(self, ranks: Sequence[float], row: int = 0) -> list[float]:
        """Return for each of `ranks` (0 to 100) the smallest p with at least that share of tokens at or below it.

        It is the lower edge of its bin, so that a threshold there keeps all tokens of that p. At most `PERCENTILE_ERROR` *
        min(p, 1 - p) too low, or what a float64 can't hold. NaN if nothing was counted.
        """
        cumulative = self.counts[row].cumsum(0)
        total = int(cumulative[-1])
        if not total:
            return [math.nan] * len(ranks)
        # rounded, so that 10 % of 30 tokens is the third although 0.1 * 30 exceeds 3 in floating point
        needed = torch.tensor([max(1, math.ceil(round(rank / 100 * total, 6))) for rank in ranks])
        found = torch.searchsorted(cumulative, needed).clamp(max=len(cumulative) - 1)
        return self._lowest()[found].tolist()

    def cut(self, rank: float) -> float:
        """Return this percentile as a threshold, which has to be above 0."""
        return max(self.percentiles([rank])[0], TINY)

    def buckets(self, count: int, row: int = 0) -> Tensor:
        """Return the number of tokens in each of `count` equal parts of [0, 1], by the middle of their bins."""
        p = self.values()[0].exp()
        index = (p * count).long().clamp(max=count - 1)
        return torch.zeros(count, dtype=torch.int64).index_add_(0, index, self.counts[row])

    def state(self) -> dict[str, list[int]]:
        """Return the first row's counts, without the empty bins, for JSON."""
        index = self.counts[0].nonzero().flatten()
        return {"bins": index.tolist(), "counts": self.counts[0][index].tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, list[int]]) -> "ProbabilityHistogram":
        """Read what `state` returned."""
        made = cls()
        made.counts[0, torch.tensor(state["bins"], dtype=torch.int64)] = torch.tensor(state["counts"], dtype=torch.int64)
        return made
