"""Logits, a block of rows at a time: what they say about target tokens, and the gradient that is made of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from ..objectives.pricing import Price
from .sums import Sums, TokenScores

if TYPE_CHECKING:
    from .lm_head import Head, Shard

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    from . import kernels

psutil: Any = None  # torch does not bring it: without it a CPU's blocks have their full size
with suppress(ImportError):
    psutil = import_module("psutil")

# Bytes of a block of logits if memory has room: more rows read the weight less often, up to these nothing else is gained
BLOCK_BYTES = {"cpu": 128 * 2**20, "other": 384 * 2**20}

ROW_MULTIPLE = 128  # of the rows of a block: by other numbers a CPU's head was up to a sixth slower

CACHE_BYTES = 2 * 2**20  # of the rows that a CPU works on at a time: twice that fits two cores' second-level caches

ALIGNED = 16  # elements that the rows of a GPU's blocks begin at: of odd vocabularies each load would be of one number

SLICE = 16384  # rows of a half-precision weight that are widened at a time where the device can't accumulate in float32


class RowBlocks(ABC):
    """
    N rows of logits, a block at a time. `dtype`: of what makes them; `wide`: their own, float32 or wider.

    `vocabulary`: of the rows, this process's part of it where `shard` says so. `held`: numbers that will be kept beside the
    blocks, in the wide type: the memory they take is not free.
    """

    def __init__(
        self, count: int, vocabulary: int, dtype: torch.dtype, device: torch.device, softcap: float | None = None,
        shard: "Shard | None" = None, held: int = 0,
    ):  # fmt: skip
        kind = device.type
        self.count, self.vocabulary, self.dtype, self.device = count, vocabulary, dtype, device
        self.softcap, self.shard = softcap, shard
        self.wide = torch.promote_types(dtype, torch.float32)
        room = BLOCK_BYTES["cpu" if kind == "cpu" else "other"]
        self.free = _free_bytes(device) - held * self.wide.itemsize
        while room > max(self.free // 8, 1):  # by halves: the size of blocks is in the rounding of sums
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
        width = math.ceil(self.vocabulary / ALIGNED) * ALIGNED if self.uses_triton else self.vocabulary
        return torch.empty(rows, width, dtype=dtype or self.wide, device=self.device)[:, : self.vocabulary]

    @abstractmethod
    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Return the logits of `rows`, in the first rows of `out`."""

    def block(
        self, rows: slice, out: Tensor, target: Tensor, extras: tuple[str, ...], differs: bool = False
    ) -> "_EagerBlock | _TritonBlock":
        """Return the scores of `rows`, and their difference from the target if `differs`, for which `out` is used."""
        eager = _EagerBlock if self.shard is None else _ShardBlock
        kind = _TritonBlock if self.uses_triton else eager
        return kind(self.logits(rows, out), target[rows], self, extras, differs)


class Blocks(RowBlocks):
    """The rows of N hidden states, whose logits `head` makes. `held`: as in `RowBlocks`."""

    def __init__(self, hidden: Tensor, head: "Head", held: int = 0):
        kind, self.head = hidden.device.type, head
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        self.hidden, self.weight = hidden.detach().to(dtype), head.weight.detach().to(dtype)
        super().__init__(len(hidden), len(head.weight), dtype, hidden.device, head.softcap, head.shard, held)

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


class _EagerBlock:
    """Scores a block of logits and turns it, in place, into softmax - onehot(target).

    A few rows at a time, which stay in a CPU's cache meanwhile.
    """

    def __init__(self, logits: Tensor, target: Tensor, blocks: RowBlocks, extras: tuple[str, ...], differs: bool):
        self.logits, self.target, self.step = logits, target, max(blocks.cached_rows, 1)
        self.is_here: Tensor | None = None  # rows whose target is in this process's part of the vocabulary; None: all rows
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
        scores = Sums(at_target[:, 0], top[:, 0], top1[:, 0], others, weighted, squares, rank).scores()
        if differs:
            share = scores.top1_logp.exp()[:, None]
            torch.mul(odds, share, out=logits).scatter_(1, top1, share)
            logits.scatter_(1, target, torch.expm1(scores.logp)[:, None])  # p - 1 without cancellation
        return scores

    def write(self, weighs: Tensor, price: Price, gain: float, rows: Tensor, used: int) -> int:
        """Write `gain` times the rows that `weighs` marks, (rows,) bool, to `rows` from `used` on; return how many are used.

        That place may be the first rows of the block itself. With an entropy slope they are the whole gradient in the logits.
        With a softcap times its slope.
        """
        index = weighs.nonzero()[:, 0]
        out = rows[used : used + len(index)]
        if price.entropy_slope is not None:
            self._add_entropy_slope_(price.weight, price.entropy_slope)
        if self.slope is not None:
            self.logits.mul_(self.slope)
        if gain != 1:
            self.logits.mul_(gain)
        if len(index) == len(self.logits):
            if out.data_ptr() != self.logits.data_ptr():
                out.copy_(self.logits)
            return used + len(index)
        for start in range(0, len(index), self.step):
            part = index[start : start + self.step]
            out[start : start + len(part)] = self.logits.index_select(0, part)
        return used + len(index)

    def _add_entropy_slope_(self, weight: Tensor, slope: Tensor) -> None:
        """Make it the whole gradient in the logits; the entropy's is -p (log p + entropy)."""
        one = torch.ones_like(weight) if self.is_here is None else self.is_here.to(weight.dtype)
        p = self.logits.scatter_add(1, self.target[:, None], one[:, None]).clamp_(min=0)
        in_logits = torch.xlogy(p, p).addcmul_(p, self.scores.entropy[:, None])
        self.logits.mul_(weight[:, None]).addcmul_(in_logits, -slope[:, None])


class _ShardBlock(_EagerBlock):
    """The same of a part of the vocabulary, with what the other processes know of the rest: a few numbers per row."""

    def __init__(self, logits: Tensor, target: Tensor, blocks: RowBlocks, extras: tuple[str, ...], differs: bool):
        shard, self.step, softcap = _shard_of(blocks), max(blocks.cached_rows, 1), blocks.softcap
        self.logits, (self.target, self.is_here) = logits, shard.own(target, logits.shape[1])
        self.slope = 1 - (logits / softcap) ** 2 if differs and softcap is not None else None
        index, rank = self.target[:, None], None
        at_target = torch.where(self.is_here, logits.gather(1, index)[:, 0], -torch.inf)
        if "rank" in extras:
            at_target = shard.reduced(at_target, ReduceOp.MAX)
            rank = shard.reduced((logits > at_target[:, None]).sum(dim=1), ReduceOp.SUM)
        top, top1 = logits.max(dim=1, keepdim=True)
        top = top.clamp(min=torch.finfo(top.dtype).min)  # a part that is masked altogether
        odds = logits.sub_(top).exp().scatter_(1, top1, 0.0)
        squares = torch.linalg.vecdot(odds, odds) if "log_sum_sq_probs" in extras else None
        weighted = logits.mul_(odds).nansum(dim=1)
        sums = Sums(at_target, top[:, 0], top1[:, 0] + shard.start, odds.sum(dim=1), weighted, squares, rank).joined(shard)
        self.scores = sums.scores()
        if differs:
            share = (top - sums.top[:, None] + self.scores.top1_logp[:, None]).exp()
            torch.mul(odds, share, out=logits).scatter_(1, top1, share)
            in_target = torch.where(self.is_here, torch.expm1(self.scores.logp), logits.gather(1, index)[:, 0])
            logits.scatter_(1, index, in_target[:, None])


def _shard_of(blocks: RowBlocks) -> "Shard":
    assert blocks.shard is not None
    return blocks.shard


class _TritonBlock:
    """The same by kernels, which leave the logits as they are until they write the difference."""

    def __init__(self, logits: Tensor, target: Tensor, blocks: RowBlocks, extras: tuple[str, ...], differs: bool):
        self.logits, self.target, self.softcap = logits, target, blocks.softcap
        at_target, shard = None, blocks.shard
        if shard is not None:
            own, is_here = shard.own(target, logits.shape[1])
            self.target = torch.where(is_here, own, -1)
            at_target = torch.where(is_here, logits.gather(1, own[:, None])[:, 0], -torch.inf)
            at_target = shard.reduced(at_target, ReduceOp.MAX) if "rank" in extras else at_target
        self.sums = Sums(*kernels.sums(logits, target, at_target))
        if shard is not None:
            found = self.sums.rank if "rank" in extras else None
            rank = None if found is None else shard.reduced(found, ReduceOp.SUM)
            self.sums = self.sums._replace(top1=self.sums.top1 + shard.start, rank=rank).joined(shard)
        self.scores = self.sums.scores()

    def write(self, weighs: Tensor, price: Price, gain: float, rows: Tensor, used: "int | Tensor") -> Tensor:
        """Write `gain` times the rows that `weighs` marks to `rows`, which are not the block itself, from `used` on.

        Returns how many are used, as a tensor on the device: to know it here would be to wait for the device.
        """
        columns = [self.sums.top, self.scores.top1_logp, torch.expm1(self.scores.logp)]
        if price.entropy_slope is not None:
            columns += [price.weight, price.entropy_slope, self.scores.entropy]
        count = weighs.cumsum(0) + used
        place = torch.where(weighs, count - 1, -1)
        kernels.difference(self.logits, place, self.target, columns, self.softcap, gain, rows)
        return count[-1]


def _free_bytes(device: torch.device) -> int:
    """Return how much memory the device has left, with what torch holds of it unused."""
    if device.type != "cuda":
        return 8 * BLOCK_BYTES["other"] if psutil is None else psutil.virtual_memory().available
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
