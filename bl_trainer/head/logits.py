"""Costs of target tokens from logits that a model has made itself, and their gradient in the logits."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..objectives.pricing import Price
from .blocks import RowBlocks
from .ops import TokenCosts, price_blocks


class LogitBlocks(RowBlocks):
    """Rows of given logits, (..., vocabulary), copied in float32 or wider a block at a time. `index`: (N,), which rows."""

    def __init__(self, logits: Tensor, index: Tensor):
        self.source, self.index = logits.detach().reshape(-1, logits.shape[-1]), index
        super().__init__(len(index), logits.shape[-1], logits.dtype, logits.device)

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        return out[: rows.stop - rows.start].copy_(self.source.index_select(0, self.index[rows]))


@torch.compiler.disable
def objective_of_logits(
    logits: Tensor,
    index: Tensor,
    target: Tensor,
    price: Callable[[dict[str, Tensor]], Price],
    extras: tuple[str, ...] = (),
    columns: Mapping[str, Tensor] | None = None,
) -> TokenCosts:
    """Return the cost of each target token, as `objective_head` does, from `logits`, (..., vocabulary).

    `index`: (N,) int64, the rows of logits that predict `target`, (N,) int64. The rest as there. The gradient in the logits,
    in their type, is formed in the backward pass, from blocks in float32 or wider. It may be taken with any weights of the
    tokens, and has no derivative (RuntimeError).
    """
    blocks = LogitBlocks(logits, index)
    buffer = blocks.empty(blocks.rows)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        costs, slope = price_blocks(blocks, target, price, extras, columns, lambda rows: buffer)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return costs
    scores = costs.scores
    known = (index, target, costs.weight, slope, scores.logp, scores.top1, scores.top1_logp, scores.entropy)
    return costs._replace(cost=_OfLogits.apply(costs.cost, logits, *known))


KNOWN = 8  # what the backward pass is given beside the logits; it unpacks saved tensors once, as offloading wants


class _OfLogits(torch.autograd.Function):
    """Gives costs their gradient in the logits, w (softmax - onehot) - s p (log p + entropy), with s = df/dentropy."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, logits: Tensor, *known: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, *known)
        return cost.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph
            raise RuntimeError("The objective's loss has no second derivative. Take the gradient without `create_graph`.")
        logits, index, target, weight, slope, logp, top1, top1_logp, entropy = ctx.saved_tensors
        weight = weight * incoming[0]
        slope = None if slope is None else slope * incoming[0]
        trains = (weight != 0) if slope is None else (weight != 0) | (slope != 0)
        some = trains.nonzero()[:, 0]
        columns = [None if each is None else each[some] for each in (target, weight, slope, logp, top1, top1_logp, entropy)]
        with torch.autocast(logits.device.type, enabled=False):
            grad = _gradient(LogitBlocks(logits, index[some]), columns)
        grad = grad.reshape(logits.shape)
        return None, grad, *[None] * KNOWN


def _gradient(blocks: LogitBlocks, columns: list[Any]) -> Tensor:
    """Return the gradient in the logits that `blocks` reads, in their type; `columns`, (N,) each, as `_gradient_` takes."""
    grad, buffer, step = torch.zeros_like(blocks.source), blocks.empty(blocks.rows), max(blocks.cached_rows, 1)
    for rows in blocks:
        block = blocks.logits(rows, buffer)
        for start in range(0, len(block), step):
            few = slice(rows.start + start, min(rows.start + start + step, rows.stop))
            here: list[Any] = [None if each is None else each[few, None] for each in columns]
            _gradient_(block[start : start + step], *here)
        grad.index_copy_(0, blocks.index[rows], block.to(grad.dtype))
    return grad


def _gradient_(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    logp: Tensor,
    top1: Tensor,
    top1_logp: Tensor,
    entropy: Tensor,
) -> None:
    """Turn logits, (rows, vocabulary), in place into the gradient of their tokens' costs; the rest is (rows, 1)."""
    p = logits.sub_(logits.gather(1, top1)).add_(top1_logp).exp_()
    in_entropy = None if slope is None else torch.xlogy(p, p).addcmul_(p, entropy).mul_(slope)
    # p - 1 of the target without cancellation
    p.scatter_(1, target, torch.expm1(logp)).mul_(weight)
    if in_entropy is not None:
        p.sub_(in_entropy)
