"""The row statistics of a block of logits and its gradient, in Triton: each reads the block once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns at a time. `_sums` then takes 48 registers (sm_90), so that five rows are worked on per multiprocessor; for 2048
# columns it takes 97, two rows; for 4096 it takes 188, one
TILE = 1024


def sums(logits: Tensor, target: Tensor, at_target: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return, per row of `logits`, (rows, vocabulary) float32, with odds = exp(logit - top) and sums over all but the top:

    logit at `target`, (rows,) int64, unless `at_target` is given; top logit and its index (int64); sums of odds, of odds
    (logit - top) and of odds^2; how many logits are above the target's (int64). Of equal top logits the first counts.
    """
    rows, vocabulary = logits.shape
    if at_target is None:
        at_target = logits.gather(1, target[:, None])[:, 0]
    top, others, weighted, squares = logits.new_empty(4, rows).unbind()
    top1, rank = target.new_empty(2, rows).unbind()
    if rows:
        with torch.cuda.device_of(logits):  # on which Triton starts a kernel
            _sums[(rows,)](
                logits, logits.stride(0), at_target, top, top1, others, weighted, squares, rank, vocabulary, TILE=TILE,
                num_warps=8,
            )  # fmt: skip
    return at_target, top, top1, others, weighted, squares, rank


def difference(
    logits: Tensor, place: Tensor, target: Tensor, columns: list[Tensor], softcap: float | None, gain: float, out: Tensor
) -> None:
    """Write `gain` (softmax - onehot(target)) of each row to the row `place` of `out`, of any float type; none where it is -1.

    `columns`, (rows,) float32 each: the top logit, its log-probability, and p - 1 of the target. With three more, a weight w,
    a slope s and the entropy, it is `gain` (w (softmax - onehot) - s p (log p + entropy)). With a softcap times its slope.
    `out` may not overlap `logits`.
    """
    vocabulary = logits.shape[1]
    top, top_logp, in_target, *rest = columns
    weight, slope, entropy = rest or (top, top, top)
    with torch.cuda.device_of(logits):
        _difference[(len(logits), triton.cdiv(vocabulary, TILE))](
            logits, logits.stride(0), place, target, top, top_logp, in_target, weight, slope, entropy, out, out.stride(0),
            vocabulary, softcap or 1.0, gain, HAS_ENTROPY=bool(rest), HAS_SOFTCAP=softcap is not None, TILE=TILE, num_warps=8,
        )  # fmt: skip


@triton.jit
def _sums(
    logits, stride, at_target_of, top_of, top1_of, others_of, weighted_of, squares_of, rank_of, vocabulary, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at_target = tl.load(at_target_of + row)
    # What earlier tops add is kept apart from the columns' own sums, which are added up at the end
    top, top1, others, weighted, squares = -1e30, -1, 0.0, 0.0, 0.0
    column_others = tl.zeros((TILE,), tl.float32)
    column_weighted = tl.zeros((TILE,), tl.float32)
    column_squares = tl.zeros((TILE,), tl.float32)
    column_rank = tl.zeros((TILE,), tl.int32)
    # Loads cover whole strides, a multiple of 16, so that they can be wide; columns past the vocabulary are masked below.
    # The next tile is loaded while this one is added up
    column = tl.arange(0, TILE)
    ahead = tl.load(logits + row * stride + column, mask=column < stride, other=float("-inf"))
    for start in range(0, vocabulary, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < vocabulary
        x = tl.where(inside, ahead, float("-inf"))
        ahead = tl.load(logits + row * stride + column + TILE, mask=column + TILE < stride, other=float("-inf"))
        highest, where = tl.max(x, axis=0, return_indices=True)
        column_rank += (x > at_target).to(tl.int32)
        is_new = highest > top
        gap = tl.where(is_new, top - highest, 0.0)
        carry = tl.exp(gap)
        moved = tl.where(is_new, 1.0, 0.0)
        top = tl.where(is_new, highest, top)
        top1 = tl.where(is_new, start + where, top1)
        below = x - top
        odds = tl.where(inside & (column != top1), tl.exp(below), 0.0)
        below = tl.where(odds > 0, below, 0.0)
        weighted = (weighted + (others + moved) * gap) * carry
        others = (others + moved) * carry
        squares = (squares + moved) * carry * carry
        column_weighted = (column_weighted + column_others * gap) * carry + odds * below
        column_others = column_others * carry + odds
        column_squares = column_squares * carry * carry + odds * odds
    tl.store(top_of + row, top)
    tl.store(top1_of + row, top1)
    tl.store(others_of + row, others + tl.sum(column_others, 0))
    tl.store(weighted_of + row, weighted + tl.sum(column_weighted, 0))
    tl.store(squares_of + row, squares + tl.sum(column_squares, 0))
    tl.store(rank_of + row, tl.sum(column_rank, 0))


@triton.jit
def _difference(
    logits, stride, place, target, top_of, top_logp_of, in_target_of, weight_of, slope_of, entropy_of, out, out_stride,
    vocabulary, softcap, gain, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    to = tl.load(place + row)
    if to < 0:
        return
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < vocabulary
    x = tl.where(inside, tl.load(logits + row * stride + column, mask=column < stride, other=0.0), 0.0)
    logp = x - tl.load(top_of + row) + tl.load(top_logp_of + row)
    p = tl.exp(logp)
    value = tl.where(column == tl.load(target + row), tl.load(in_target_of + row), p)
    if HAS_ENTROPY:
        entropy_slope = p * tl.where(p > 0, logp + tl.load(entropy_of + row), 0.0)
        value = value * tl.load(weight_of + row) - entropy_slope * tl.load(slope_of + row)
    if HAS_SOFTCAP:
        value = value * (1 - (x / softcap) * (x / softcap))
    value = tl.where(inside, value * gain, 0.0)
    tl.store(out + to * out_stride + column, value.to(out.dtype.element_ty), mask=column < out_stride)
