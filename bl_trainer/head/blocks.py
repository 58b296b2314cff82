"""Logits, a block of rows at a time: what they say about target tokens, and the gradient that is made of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..objectives.pricing import Price

if TYPE_CHECKING:
    from .lm_head import Head

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    from . import kernels

virtual_memory: Any = None  # of psutil, which torch does not bring: without it a CPU's blocks have their full size
with suppress(ImportError):
    from psutil import virtual_memory

# Bytes of a block of logits if memory has room: more rows read the weight less often, up to these nothing else is gained
BLOCK_BYTES = {"cpu": 128 * 2**20, "other": 384 * 2**20}

ROW_MULTIPLE = 128  # of the rows of a block: by other numbers a CPU's head was up to a sixth slower

CACHE_BYTES = 2 * 2**20  # of the rows that a CPU works on at a time: twice that fits two cores' second-level caches

SLICE = 16384  # rows of a half-precision weight that are widened at a time where the device can't accumulate in float32


@dataclass
class TokenScores:
    """What a model says about each of N target tokens; all tensors are (N,), float32 or wider where not said otherwise.

    `logp`: log-probability of the target. `entropy`: of the next-token distribution, in nats. `top1`, `top1_logp`: the most
    probable token (its id, int64) and its log-probability. `rank`: how many tokens are more probable than the target
    (int64), 0 if it is the most probable. `log_sum_sq_probs`: log of the sum of squared probabilities. The last two may be None
    where they were not asked for.
    """

    logp: Tensor
    entropy: Tensor
    top1: Tensor
    top1_logp: Tensor
    rank: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None

    @classmethod
    def join(cls, parts: "list[TokenScores]") -> "TokenScores":
        """Return the scores of all the parts' tokens."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        return cls(**{name: torch.cat(column) for name, column in columns.items() if column[0] is not None})

    def cpu(self) -> "TokenScores":
        """Return the same on the CPU."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return TokenScores(**{name: value.cpu() for name, value in values.items() if value is not None})


class RowBlocks(ABC):
    """N rows of logits, a block at a time. `dtype`: of what makes them; `wide`: their own, float32 or wider."""

    def __init__(self, count: int, vocabulary: int, dtype: torch.dtype, device: torch.device, softcap: float | None = None):
        kind = device.type
        self.count, self.vocabulary, self.dtype, self.device, self.softcap = count, vocabulary, dtype, device, softcap
        self.wide = torch.promote_types(dtype, torch.float32)
        room, free = BLOCK_BYTES["cpu" if kind == "cpu" else "other"], _free_bytes(device)
        while room > max(free // 8, 1):  # by halves: the size of blocks is in the rounding of sums
            room //= 2
        most = max(1, room // (vocabulary * self.wide.itemsize))
        most = most // ROW_MULTIPLE * ROW_MULTIPLE or most
        even = math.ceil(count / max(1, math.ceil(count / most)))
        self.rows = min(most, math.ceil(even / ROW_MULTIPLE) * ROW_MULTIPLE, count)
        self.cached_rows = max(1, CACHE_BYTES // (vocabulary * self.wide.itemsize)) if kind == "cpu" else self.rows
        self.uses_triton = HAS_TRITON and kind == "cuda" and self.wide == torch.float32

    def __iter__(self) -> Iterator[slice]:
        """Yield slices of rows; one, empty, if there are none."""
        for start in range(0, max(self.count, 1), max(self.rows, 1)):
            yield slice(start, min(start + self.rows, self.count))

    def empty(self, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return memory for that many rows of logits."""
        return torch.empty(rows, self.vocabulary, dtype=dtype or self.wide, device=self.device)

    @abstractmethod
    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Return the logits of `rows`, in the first rows of `out`."""

    def block(
        self, rows: slice, out: Tensor, target: Tensor, extras: tuple[str, ...], differs: bool = False
    ) -> "_EagerBlock | _TritonBlock":
        """Return the scores of `rows`, and their difference from the target if `differs`, for which `out` is used."""
        kind = _TritonBlock if self.uses_triton else _EagerBlock
        return kind(self.logits(rows, out), target[rows], self, extras, differs)


class Blocks(RowBlocks):
    """The rows of N hidden states, whose logits `head` makes."""

    def __init__(self, hidden: Tensor, head: "Head"):
        kind, self.head = hidden.device.type, head
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        self.hidden, self.weight = hidden.detach().to(dtype), head.weight.detach().to(dtype)
        super().__init__(len(hidden), len(head.weight), dtype, hidden.device, head.softcap)

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        head, out = self.head, out[: rows.stop - rows.start]
        _project(self.hidden[rows], self.weight, out)
        if head.bias is not None:
            out += head.bias.detach()
        if head.scale != 1:
            out *= head.scale
        if head.softcap is not None:
            out.div_(head.softcap).tanh_().mul_(head.softcap)
        return out


class _Sums(NamedTuple):
    """What scores are made of, each (rows,): sums over all tokens but `top1`, the most probable, of odds = exp(logit - `top`).

    `others`: of the odds. `weighted`: of odds (logit - top). `squares`: of odds^2. `rank`: how many are above the target.
    """

    at_target: Tensor
    top: Tensor
    top1: Tensor
    others: Tensor
    weighted: Tensor
    squares: Tensor | None
    rank: Tensor | None

    def scores(self) -> TokenScores:
        log_total = self.others.log1p()
        squares = None if self.squares is None else self.squares.log1p() - 2 * log_total
        entropy = log_total - self.weighted / (1 + self.others)
        return TokenScores(self.at_target - self.top - log_total, entropy, self.top1, -log_total, self.rank, squares)


class _EagerBlock:
    """Scores a block of logits and turns it, in place, into softmax - onehot(target).

    A few rows at a time, which stay in a CPU's cache meanwhile.
    """

    def __init__(self, logits: Tensor, target: Tensor, blocks: RowBlocks, extras: tuple[str, ...], differs: bool):
        self.logits, self.target, self.step = logits, target, max(blocks.cached_rows, 1)
        work = torch.empty_like(logits[: self.step])
        pieces = zip(logits.split(self.step), target.split(self.step), strict=True)
        self.slope = 1 - (logits / blocks.softcap) ** 2 if differs and blocks.softcap is not None else None
        self.scores = TokenScores.join([self._score_(*piece, work, extras, differs) for piece in pieces])

    @staticmethod
    def _score_(logits: Tensor, target: Tensor, work: Tensor, extras: tuple[str, ...], differs: bool) -> TokenScores:
        work, target = work[: len(logits)], target[:, None]
        at_target = logits.gather(1, target)
        top, top1 = logits.max(dim=1, keepdim=True)
        # as floats: counting booleans is several times slower
        rank = torch.gt(logits, at_target, out=work).sum(dim=1).long() if "rank" in extras else None
        odds = torch.exp(logits.sub_(top), out=work).scatter_(1, top1, 0.0)
        others = odds.sum(dim=1)
        squares = torch.linalg.vecdot(odds, odds) if "log_sum_sq_probs" in extras else None
        weighted = logits.mul_(odds).nansum(dim=1)  # not a number: a logit of -inf, times zero
        scores = _Sums(at_target[:, 0], top[:, 0], top1[:, 0], others, weighted, squares, rank).scores()
        if differs:
            share = scores.top1_logp.exp()[:, None]
            torch.mul(odds, share, out=logits).scatter_(1, top1, share)
            logits.scatter_(1, target, torch.expm1(scores.logp)[:, None])  # p - 1 without cancellation
        return scores

    def write(self, index: Tensor, price: Price, gain: float, out: Tensor) -> None:
        """Write `gain` times the rows at `index`, ascending, to `out`, which may be the first of the block itself.

        With an entropy slope they are the whole gradient in the logits. With a softcap times its slope.
        """
        if price.entropy_slope is not None:
            self._add_entropy_slope_(price.weight, price.entropy_slope)
        if self.slope is not None:
            self.logits.mul_(self.slope)
        if gain != 1:
            self.logits.mul_(gain)
        if len(index) == len(self.logits):
            if out.data_ptr() != self.logits.data_ptr():
                out.copy_(self.logits)
            return
        for start in range(0, len(index), self.step):
            part = index[start : start + self.step]
            out[start : start + len(part)] = self.logits.index_select(0, part)

    def _add_entropy_slope_(self, weight: Tensor, slope: Tensor) -> None:
        """Make it the whole gradient in the logits; the entropy's is -p (log p + entropy)."""
        p = self.logits.scatter_add(1, self.target[:, None], torch.ones_like(weight)[:, None]).clamp_(min=0)
        in_logits = torch.xlogy(p, p).addcmul_(p, self.scores.entropy[:, None])
        self.logits.mul_(weight[:, None]).addcmul_(in_logits, -slope[:, None])


class _TritonBlock:
    """The same by kernels, which leave the logits as they are until they write the difference."""

    def __init__(self, logits: Tensor, target: Tensor, blocks: RowBlocks, extras: tuple[str, ...], differs: bool):
        self.logits, self.target, self.softcap = logits, target, blocks.softcap
        self.sums = _Sums(*kernels.sums(logits, target))
        self.scores = self.sums.scores()

    def write(self, index: Tensor, price: Price, gain: float, out: Tensor) -> None:
        """Write `gain` times the rows at `index` to `out`, which is not the block itself."""
        columns = [self.sums.top, self.scores.top1_logp, torch.expm1(self.scores.logp)]
        if price.entropy_slope is not None:
            columns += [price.weight, price.entropy_slope, self.scores.entropy]
        kernels.difference(self.logits, index, self.target, columns, self.softcap, gain, out)


def _free_bytes(device: torch.device) -> int:
    """Return how much memory the device has left, with what torch holds of it unused."""
    if device.type != "cuda":
        return 8 * BLOCK_BYTES["other"] if virtual_memory is None else virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def has_wide_products(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def slices(vocabulary: int) -> Iterator[slice]:
    return (slice(start, start + SLICE) for start in range(0, vocabulary, SLICE))


def _project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write hidden @ weight^T into `out`."""
    if out.dtype == weight.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif has_wide_products(out):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for part in slices(len(weight)):
            out[:, part] = wide @ weight[part].to(out.dtype).t()
